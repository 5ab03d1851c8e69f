"""Owns the translation of the reference emulator's ``-device nvme,…`` options into settings (``--qemu-nvme``).

Every parameter of its branches (OCSSD 1.2, OCSSD 2.0, and the later rewrite as ``ocssd``) is a row of ``OPTIONS``: the
setting it becomes, the values it may have, and what is said when it has no meaning here. What the reference ignored is
done as it was meant. Which branch a line is for is told by its options; what the line leaves out is as that branch had
it, as far as it decides the shape of the flash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ocssd_daemon.cli.qemu_img import mccap
from ocssd_daemon.cli.reference_options import (
    Line,
    Result,
    Rule,
    Translation,
    any_text,
    apply,
    number,
    only,
    parse,
    ranged,
    refused,
    switch,
    switch_to,
    text_to,
    to,
    unless,
)
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.settings import SettingsError

SOURCE = "--qemu-nvme"
L2P_ENTRY_BYTES = 8             # that the 1.2 branch sets aside for each sector of its backing file
MAX_NAMESPACES = 256


@dataclass(frozen=True)
class Backing:
    """The file behind ``--store``: its size, and the geometry if it is an image already."""

    size_bytes: int = 0
    geometry: Geometry | None = None


NO_FILE = Backing()


# Rules of single options.


def _kind(line: Line) -> str:
    """What each namespace is. ``lver`` speaks for 1.2, ``dialect`` for 2.0."""
    if "lver" in line.options:
        return {0: "block", 2: "ocssd20"}.get(line.number("lver"), "ocssd12")
    if "dialect" in line.options:
        return "block" if line.number("dialect") == 0 else "ocssd20"
    tells_20 = line.options.keys() & (OCSSD_20.keys() | REWRITE.keys())
    return "ocssd12" if line.options.keys() & ONLY_12 and not tells_20 else "ocssd20"


def _version(name: str, text: str, line: Line) -> Result:
    ranged(name, text, line, 0, 2 if name == "lver" else 1)
    if {"lver", "dialect"} <= line.options.keys():
        raise refused(name, "lver is an option of the 1.2 branch, dialect of the 2.0 branch; give one", text, line)
    if name == "dialect" and line.number(name) == 0:
        return {key: value for option, key, value in (("vid", "nvme.vid", 0x8086), ("did", "nvme.did", 0x5845))
                if option not in line.options}
    return {}


def _namespaces(name: str, text: str, line: Line) -> Result:
    ranged(name, text, line, 1, MAX_NAMESPACES)
    return {}


def _queues(name: str, text: str, line: Line) -> Result:
    """Its number of queue pairs has the admin pair in it."""
    return {"nvme.queues": ranged(name, text, line, 2, 2047) - 1}


def _pages(name: str, text: str, line: Line) -> Result:
    """1.2: a flash page is ws_min sectors, a block its pages."""
    ranged(name, text, line, 1, 4096 if name == "lsecs_per_pg" else 65535)
    return {}


def _channels(name: str, text: str, line: Line) -> Result:
    """The reference computed addresses as if there was one channel; namespaces share out the groups."""
    return {"geometry.groups": ranged(name, text, line, 1, 256) * line.number("namespaces", 1)}


def _planes(name: str, text: str, line: Line) -> Result:
    count = number(name, text, line)
    if count not in (1, 2, 4):
        raise refused(name, "must be 1, 2 or 4", text, line)
    return {"nvme.planes": count}


def _formats(name: str, text: str, line: Line) -> Result:
    ranged(name, text, line, 1, 16)
    return {}


def _lba_index(name: str, text: str, line: Line) -> Result:
    """Formats begin at 512 bytes and double. Flash has one format, and so has the disk."""
    index = ranged(name, text, line, 0, line.number("nlbaf", 5) - 1)
    block_bytes = 512 << index
    if _kind(line) == "block":
        if block_bytes > 65536:
            raise refused(name, "the largest block is 65536 bytes (7)", text, line)
        return {"ftl.block_bytes": block_bytes, "geometry.sector_bytes": max(4096, block_bytes)}
    if block_bytes == line.number("lsec_size", 4096):
        return {}
    return f"the LBA format follows lsec_size ({line.number('lsec_size', 4096)})"


def _metadata(name: str, text: str, line: Line) -> Result:
    """2.0: bytes of OOB. It only checked them, and took the image's."""
    value, most = number(name, text, line), line.number("ms_max", 64)
    if value < 0 or value & (value - 1) or value > most:
        raise refused(name, f"must be 0 or a power of two up to ms_max={most}", text, line)
    if value and not line.number("mc", 2) & 2:
        raise refused(name, "metadata in a separate buffer needs mc bit 1", text, line)
    return {"geometry.oob_bytes": value} if _kind(line) != "block" else _NO_METADATA


def _write_cache(name: str, text: str, line: Line) -> Result:
    return {} if text == "auto" else {"nvme.write_cache": switch(name, text, line)}


def _coalescing(name: str, text: str, line: Line) -> Result:
    """``intc`` switches the two others on."""
    value = ranged(name, text, line, 0, 1 if name == "intc" else 255)
    if name == "intc":
        return {"nvme.coalesce_commands": line.number("intc_thresh"),
                "nvme.coalesce_us": line.number("intc_time") * 100} if value else {}
    return {} if line.number("intc") else "coalescing is off (intc=0)"


def _optional_commands(name: str, text: str, line: Line) -> Result:
    """What it could leave out is always there."""
    bits = number(name, text, line)
    allowed, here = (0x2, 0x2) if name == "oacs" else (0xF, 0xD)
    if bits & ~allowed:
        raise refused(name, f"has bits of {allowed:#x} only", text, line)
    if bits & ~here:
        return "Write Uncorrectable is not offered"
    return {} if bits == here else "all optional commands are offered"


def _frequency(name: str, text: str, line: Line) -> Result:
    """One block in so many is bad from the factory. The reference parsed it and did nothing."""
    each = ranged(name, text, line, 0, 255)
    return {"faults.bad": f"{100 / each:.6f}%"} if each else {}


def _failing_writes(name: str, text: str, line: Line) -> Result:
    """After so many written sectors one write fails; ln_err_write is how many of its sectors do."""
    after = ranged(name, text, line, 0, 0xFFFF_FFFF)
    if not after:
        return {}
    page = line.number("lsecs_per_pg", 1) or 1
    return {"faults.rules": [f"on=write do=fail after={-(-after // page)} once"]}


def _failing_sectors(name: str, text: str, line: Line) -> Result:
    ranged(name, text, line, 0, 0xFFFF_FFFF)
    return "a failing write fails as a whole page" if line.number("lb_err_write") else "counts with lb_err_write only"


def _sector_shift(name: str, text: str, line: Line) -> Result:
    return {"geometry.sector_bytes": 1 << ranged(name, text, line, 9, 16)}


# The table.

_NO_METADATA = "a block namespace carries no metadata"
_FILES = any_text("metadata and chunk states are kept in the image (--store)")
_QEMU = any_text("QEMU's own affair")
_NO_CMB = unless(0, "there is no controller memory buffer")
_NO_PI = unless(0, "protection information is not offered")

COMMON: dict[str, Rule] = {
    "drive": any_text("use --store"), "serial": text_to("nvme.serial"), "namespaces": _namespaces,
    "entries": to("nvme.entries", 1, 65535, plus=1), "stride": to("nvme.stride", 0, 12),
    "max_cqes": unless(4, "completion entries have 16 bytes", 4, 15),
    "max_sqes": unless(6, "submission entries have 64 bytes", 6, 15),
    "aerl": to("nvme.aerl", 0, 255), "acl": to("nvme.acl", 0, 255), "elpe": to("nvme.error_entries", 0, 63, plus=1),
    "mdts": to("nvme.mdts", 0, 16), "cqr": unless(1, "queues are always contiguous", 0, 1),
    "vwc": switch_to("nvme.write_cache"), "intc": _coalescing, "intc_thresh": _coalescing, "intc_time": _coalescing,
    "mpsmin": only(0, "must be 0: the smallest memory page is 4 KiB"), "mpsmax": to("nvme.mpsmax", 0, 4),
    "extended": only(0, "must be 0: metadata is a separate buffer, as the kernel's pblk wants it"),
    "dpc": _NO_PI, "dps": _NO_PI, "mc": unless(2, "metadata is a separate buffer (2), where there is any", 0, 3),
    "oacs": _optional_commands, "oncs": _optional_commands,
    "vid": to("nvme.vid", 0, 0xFFFF), "did": to("nvme.did", 0, 0xFFFF),
    "ldebug": unless(0, "use --log-level debug", 0, 255),
    **dict.fromkeys(("bootindex", "logical_block_size", "physical_block_size", "min_io_size", "opt_io_size",
                     "discard_granularity", "share-rw", "id", "addr", "bus"), _QEMU),
    "write-cache": _write_cache,
}

OCSSD_12: dict[str, Rule] = {
    "queues": _queues, "nlbaf": _formats, "lba_index": _lba_index, "meta": unless(0, _NO_METADATA, 0, 4096),
    "cmbsz": _NO_CMB, "cmbloc": _NO_CMB,
    "lver": _version, "ll2pmode": only(0, "must be 0, the host's map; lver=0 is a disk whose map the device keeps"),
    "lsec_size": to("geometry.sector_bytes", 512, 65536), "lsecs_per_pg": _pages, "lpgs_per_blk": _pages,
    "lmax_sec_per_rq": unless(64, "a command has up to 64 addresses", 1, 64),
    "lmtype": only(0, "only NAND (0) is emulated"), "lfmtype": only(0, "only SLC (0) is reported"),
    "lnum_ch": _channels, "lnum_lun": to("geometry.pus", 1, 256), "lnum_pln": _planes,
    "lreadl2ptbl": unless(1, "there is no L2P table to read (ll2pmode=0)", 0, 1),
    "lbbtable": text_to("nvme.bad_block_file"), "lbbfrequency": _frequency, "lmetadata": _FILES,
    "lmetasize": to("geometry.oob_bytes", 0, 4096),
    "lb_err_write": _failing_writes, "ln_err_write": _failing_sectors,
    "lstrict": unless(0, "an erase may always name several blocks", 0, 1),
}

OCSSD_20: dict[str, Rule] = {
    "num_queues": _queues, "ms": _metadata, "ms_max": unless(64, "the OOB has one size (ms)", 0, 4096),
    "dlfeat": to("nvme.dlfeat", 0, 2), "cmb_size_mb": _NO_CMB, "dialect": _version,
    "lmccap": mccap, "lws_min": to("geometry.ws_min", 1, 4096), "lws_opt": to("geometry.ws_opt", 1, 4096),
    "lmw_cunits": to("geometry.mw_cunits", 0, 1 << 24),
    "lchunkstate": text_to("faults.chunk_states"), "lresetfail": text_to("faults.reset_failures"),
    "lwritefail": text_to("faults.write_failures"), "learly_reset": switch_to("nvme.early_reset"),
    "lsgl_lbal": only(0, "must be 0: a list of addresses lies at a bus address"),
    # The first draft of that branch.
    "lnum_pu": to("geometry.pus", 1, 256), "lsecs_per_chk": to("geometry.sectors", 1, 1 << 24), "lchunktable": _FILES,
}

REWRITE: dict[str, Rule] = {        # -device ocssd,… and -device ocssd-ns,…
    "nsid": unless(1, "namespaces are numbered from 1", 0, MAX_NAMESPACES),
    "num_grp": _channels, "num_pu": to("geometry.pus", 1, 256), "num_chk": to("geometry.chunks", 1, 65536),
    "clba": to("geometry.sectors", 1, 1 << 24), "lbads": _sector_shift, "pe_cycles": to("wear.pe_limit", 0, 1 << 31),
    "mccap": mccap, "ws_min": to("geometry.ws_min", 1, 4096), "ws_opt": to("geometry.ws_opt", 1, 4096),
    "mw_cunits": to("geometry.mw_cunits", 0, 1 << 24), "wit": to("nvme.wear_threshold", 0, 255),
    "early_reset": switch_to("nvme.early_reset"), "chunkinfo": text_to("faults.chunk_states"),
    "resetfail": text_to("faults.reset_failures"), "writefail": text_to("faults.write_failures"),
}

ONLY_12 = OCSSD_12.keys() - {"nlbaf", "lba_index", "meta", "cmbsz", "cmbloc", "queues", "lver"}
OPTIONS: dict[str, Rule] = {**COMMON, **OCSSD_12, **OCSSD_20, **REWRITE}


# The line as a whole.


def translate(text: str, backing: Backing = NO_FILE) -> Translation:
    """Settings for a line such as ``serial=deadbeef,lver=1,lnum_lun=4``, over *backing*. Raises SettingsError."""
    words = text
    for device in ("nvme,", "ocssd,", "ocssd-ns,"):
        words = words.removeprefix(device)
    line = parse(words, OPTIONS, SOURCE, "the reference emulator")
    done = apply(line, OPTIONS)
    kind, count = _kind(line), line.number("namespaces", 1)
    done.values["nvme.namespaces"] = [kind] * count
    if kind == "ocssd12" and "lver" not in line.options:
        done.notes.append("lver: not given, taken as 1, as its documentation says (the emulator itself took 0)")
    shape = {"ocssd12": _shape_12, "block": _shape_block, "ocssd20": _shape_20}[kind]
    done.values = {**shape(line, backing, done.values), **done.values}
    if backing.geometry is not None:
        done.values = {**_fields(backing.geometry), **done.values}
    return done


def _fields(geometry: Geometry) -> dict[str, Any]:
    """What an image that exists decides; a line that says otherwise is refused when it is opened."""
    return {f"geometry.{name}": getattr(geometry, name) for name in Geometry.__struct_fields__}


def _shape_12(line: Line, backing: Backing, given: dict[str, Any]) -> dict[str, Any]:
    """The branch's defaults. Blocks are as many as the file has room for."""
    page, pages = line.number("lsecs_per_pg", 1), line.number("lpgs_per_blk", 256)
    shape = {
        "geometry.groups": line.number("namespaces", 1), "geometry.pus": 1, "geometry.sector_bytes": 4096,
        "geometry.oob_bytes": 16, "nvme.planes": 1, "nvme.mdts": 10, "geometry.ws_min": page, "geometry.ws_opt": page,
        "geometry.sectors": page * pages, "geometry.mw_cunits": 0,
    }
    if backing.geometry is None and backing.size_bytes:
        shape["geometry.chunks"] = _blocks_12(backing.size_bytes, {**shape, **given})
    return shape


def _blocks_12(size_bytes: int, shape: dict[str, Any]) -> int:
    """Chunks (blocks of one plane) per LUN in a file of that size, as the branch counts them."""
    planes, luns = shape["nvme.planes"], shape["geometry.groups"] * shape["geometry.pus"]
    row = luns * planes * shape["geometry.sectors"] * (shape["geometry.sector_bytes"] + L2P_ENTRY_BYTES)
    blocks = size_bytes // row
    if not 1 <= blocks <= 65535:
        raise SettingsError(
            "store", f"{size_bytes} bytes make {blocks} blocks in each plane of {luns} LUNs; must be from 1 to 65535",
            source=SOURCE)
    return int(blocks * planes)


def _shape_block(line: Line, backing: Backing, given: dict[str, Any]) -> dict[str, Any]:
    """A disk: as large as the file, the flash behind it larger by what garbage collection needs."""
    shape: dict[str, Any] = {"ftl.block_bytes": 4096, "nvme.mdts": 10 if "lver" in line.options else 7}
    if backing.geometry is None and backing.size_bytes:
        shape["geometry.chunks"] = _chunks_for_disk(backing.size_bytes, Geometry(
            sector_bytes=given.get("geometry.sector_bytes", 4096)))
    return shape


def _chunks_for_disk(disk_bytes: int, g: Geometry) -> int:
    """Chunks per PU so that the disk has *disk_bytes* at the default over-provisioning."""
    from ocssd_daemon.ftl.target import SPARE_LINES
    from ocssd_daemon.settings import FtlSettings

    line_bytes = g.total_pus * g.sectors * g.sector_bytes
    lines = -(-disk_bytes * round(1000 * (1 + FtlSettings().op)) // (1000 * line_bytes))
    return int(max(lines, -(-disk_bytes // line_bytes) + SPARE_LINES))


def _shape_20(line: Line, backing: Backing, given: dict[str, Any]) -> dict[str, Any]:
    """Its geometry came with the image; a file without one is as large as the flash is to be."""
    count = line.number("namespaces", 1)
    shape: dict[str, Any] = {"geometry.groups": 2 * count} if count > 1 else {}
    if backing.geometry is None and backing.size_bytes and "geometry.chunks" not in given:
        shape["size"] = backing.size_bytes
    return shape
