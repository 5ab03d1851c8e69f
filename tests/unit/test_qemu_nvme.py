"""The reference emulator's command lines are taken as they were meant, and wrong ones refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ocssd_daemon import settings as sets
from ocssd_daemon.cli.qemu_nvme import OPTIONS, Backing, translate
from ocssd_daemon.ftl.target import capacity_of
from ocssd_daemon.nand.geometry import Geometry

GIB = 1 << 30
NO_FILE = Backing()


def settings(line: str, backing: Backing = NO_FILE, **extra: Any) -> sets.Settings:
    more = sets.from_assignments([f"{key}={value}" for key, value in extra.items()])
    return sets.build(sets.from_preset("default"), translate(line, backing).layer(), more)


# Every parameter of both branches and of the rewrite: a line with it, and the settings that it must become, or the note
# that says why it means nothing here. Then a value that is refused, where there is one.
LINES: list[tuple[str, str, dict[str, Any] | str, str | None]] = [
    # option, its value with what it needs, what comes of it, a value that cannot be
    ("drive", "drive=d0", "use --store", None),
    ("serial", "serial=deadbeef", {"nvme.serial": "deadbeef"}, None),
    ("namespaces", "lver=1,namespaces=2", {"nvme.namespaces": ["ocssd12"] * 2, "geometry.groups": 2}, "257"),
    ("queues", "queues=64", {"nvme.queues": 63}, "2048"),
    ("num_queues", "num_queues=8", {"nvme.queues": 7}, "1"),
    ("entries", "entries=0x7ff", {"nvme.entries": 2048}, "0"),
    ("max_cqes", "max_cqes=4", {}, "3"),
    ("max_sqes", "max_sqes=7", "submission entries have 64 bytes", "16"),
    ("stride", "stride=4", {"nvme.stride": 4}, "13"),
    ("aerl", "aerl=7", {"nvme.aerl": 7}, "256"),
    ("acl", "acl=3", {"nvme.acl": 3}, "256"),
    ("elpe", "elpe=3", {"nvme.error_entries": 4}, "64"),
    ("mdts", "mdts=10", {"nvme.mdts": 10}, "99"),
    ("cqr", "cqr=0", "queues are always contiguous", "2"),
    ("vwc", "vwc=0", {"nvme.write_cache": False}, "2"),
    ("intc", "intc=1,intc_thresh=7,intc_time=2", {"nvme.coalesce_commands": 7, "nvme.coalesce_us": 200}, "2"),
    ("intc_thresh", "intc_thresh=7", "coalescing is off (intc=0)", "256"),
    ("intc_time", "intc=1,intc_time=255", {"nvme.coalesce_us": 25_500}, "256"),
    ("mpsmin", "mpsmin=0", {}, "1"),
    ("mpsmax", "mpsmax=2", {"nvme.mpsmax": 2}, "16"),
    ("nlbaf", "nlbaf=5", {}, "17"),
    ("lba_index", "lver=0,lba_index=0", {"ftl.block_bytes": 512}, "5"),
    ("extended", "extended=0", {}, "1"),
    ("dpc", "dpc=1", "protection information is not offered", None),
    ("dps", "dps=0", {}, None),
    ("mc", "mc=2", {}, "4"),
    ("meta", "meta=16", "a block namespace carries no metadata", "5000"),
    ("ms", "ms=32", {"geometry.oob_bytes": 32}, "48"),
    ("ms_max", "ms_max=64", {}, "5000"),
    ("cmbsz", "cmbsz=1", "there is no controller memory buffer", None),
    ("cmbloc", "cmbloc=0", {}, None),
    ("cmb_size_mb", "cmb_size_mb=64", "there is no controller memory buffer", None),
    ("oacs", "oacs=2", {}, "6"),
    ("oncs", "oncs=4", "all optional commands are offered", "16"),
    ("vid", "vid=0x1d1d", {"nvme.vid": 0x1D1D}, "65536"),
    ("did", "did=0x1f1f", {"nvme.did": 0x1F1F}, "65536"),
    ("dlfeat", "dlfeat=2", {"nvme.dlfeat": 2}, "3"),
    ("ldebug", "ldebug=1", "use --log-level debug", "256"),
    ("bootindex", "bootindex=1", "QEMU's own affair", None),
    ("logical_block_size", "logical_block_size=512", "QEMU's own affair", None),
    ("physical_block_size", "physical_block_size=512", "QEMU's own affair", None),
    ("min_io_size", "min_io_size=512", "QEMU's own affair", None),
    ("opt_io_size", "opt_io_size=512", "QEMU's own affair", None),
    ("discard_granularity", "discard_granularity=512", "QEMU's own affair", None),
    ("share-rw", "share-rw=on", "QEMU's own affair", None),
    ("write-cache", "write-cache=off", {"nvme.write_cache": False}, "maybe"),
    ("id", "id=nvme0", "QEMU's own affair", None),
    ("addr", "addr=4", "QEMU's own affair", None),
    ("bus", "bus=pcie.0", "QEMU's own affair", None),
    # OCSSD 1.2
    ("lver", "lver=1", {"nvme.namespaces": ["ocssd12"], "geometry.pus": 1, "geometry.groups": 1}, "7"),
    ("ll2pmode", "ll2pmode=0", {}, "1"),
    ("lsec_size", "lver=1,lsec_size=8192", {"geometry.sector_bytes": 8192}, "100"),
    ("lsecs_per_pg", "lver=1,lsecs_per_pg=4", {"geometry.ws_min": 4, "geometry.sectors": 1024}, "0"),
    ("lpgs_per_blk", "lver=1,lpgs_per_blk=64", {"geometry.sectors": 64}, "0"),
    ("lmax_sec_per_rq", "lmax_sec_per_rq=32", "a command has up to 64 addresses", "65"),
    ("lmtype", "lmtype=0", {}, "1"),
    ("lfmtype", "lfmtype=0", {}, "1"),
    ("lnum_ch", "lnum_ch=2,namespaces=2", {"geometry.groups": 4}, "0"),
    ("lnum_lun", "lnum_lun=4", {"geometry.pus": 4}, "0"),
    ("lnum_pln", "lnum_pln=2", {"nvme.planes": 2}, "3"),
    ("lreadl2ptbl", "lreadl2ptbl=0", "there is no L2P table to read (ll2pmode=0)", "2"),
    ("lbbtable", "lbbtable=bb,,old.qemu", {"nvme.bad_block_file": "bb,old.qemu"}, None),
    ("lbbfrequency", "lbbfrequency=50", {"faults.bad": "2.000000%"}, "256"),
    ("lmetadata", "lmetadata=meta.qemu", "metadata and chunk states are kept in the image (--store)", None),
    ("lmetasize", "lver=1,lmetasize=64", {"geometry.oob_bytes": 64}, "5000"),
    ("lb_err_write", "lb_err_write=64,lsecs_per_pg=4", {"faults.rules": ["on=write do=fail after=16 once"]}, "-1"),
    ("ln_err_write", "ln_err_write=2", "counts with lb_err_write only", "-1"),
    ("lstrict", "lstrict=1", "an erase may always name several blocks", None),
    # OCSSD 2.0
    ("dialect", "dialect=0", {"nvme.namespaces": ["block"], "nvme.vid": 0x8086, "nvme.did": 0x5845}, "2"),
    ("lmccap", "lmccap=6", {"nvme.multi_reset": True, "nvme.early_reset": True}, "8"),
    ("lws_min", "lws_min=8", {"geometry.ws_min": 8}, "0"),
    ("lws_opt", "lws_opt=16", {"geometry.ws_opt": 16}, "0"),
    ("lmw_cunits", "lmw_cunits=32", {"geometry.mw_cunits": 32}, "-1"),
    ("lchunkstate", "lchunkstate=chunks.txt", {"faults.chunk_states": "chunks.txt"}, None),
    ("lresetfail", "lresetfail=r.txt", {"faults.reset_failures": "r.txt"}, None),
    ("lwritefail", "lwritefail=w.txt", {"faults.write_failures": "w.txt"}, None),
    ("learly_reset", "learly_reset=0", {"nvme.early_reset": False}, "2"),
    ("lsgl_lbal", "lsgl_lbal=0", {}, "1"),
    ("lnum_pu", "lnum_pu=4,lnum_ch=2", {"nvme.namespaces": ["ocssd20"], "geometry.pus": 4, "geometry.groups": 2}, "0"),
    ("lsecs_per_chk", "lsecs_per_chk=4096", {"geometry.sectors": 4096}, "0"),
    ("lchunktable", "lchunktable=chunk.qemu", "metadata and chunk states are kept in the image (--store)", None),
    # the rewrite
    ("nsid", "nsid=1", {}, "257"),
    ("num_grp", "num_grp=4", {"geometry.groups": 4}, "0"),
    ("num_pu", "num_pu=4", {"geometry.pus": 4}, "0"),
    ("num_chk", "num_chk=60", {"geometry.chunks": 60}, "0"),
    ("clba", "clba=4096", {"geometry.sectors": 4096}, "0"),
    ("lbads", "lbads=13", {"geometry.sector_bytes": 8192}, "8"),
    ("pe_cycles", "pe_cycles=1000", {"wear.pe_limit": 1000}, "-1"),
    ("mccap", "mccap=5", {"nvme.multi_reset": False, "nvme.early_reset": True}, "8"),
    ("ws_min", "ws_min=8", {"geometry.ws_min": 8}, "0"),
    ("ws_opt", "ws_opt=16", {"geometry.ws_opt": 16}, "0"),
    ("mw_cunits", "mw_cunits=32", {"geometry.mw_cunits": 32}, "-1"),
    ("wit", "wit=10", {"nvme.wear_threshold": 10}, "256"),
    ("early_reset", "early_reset=1", {"nvme.early_reset": True}, "x"),
    ("chunkinfo", "chunkinfo=c.txt", {"faults.chunk_states": "c.txt"}, None),
    ("resetfail", "resetfail=r.txt", {"faults.reset_failures": "r.txt"}, None),
    ("writefail", "writefail=w.txt", {"faults.write_failures": "w.txt"}, None),
]


def test_every_option_is_tried() -> None:
    assert {name for name, *_ in LINES} == set(OPTIONS)


@pytest.mark.parametrize(("name", "line", "comes", "wrong"), LINES, ids=[row[0] for row in LINES])
def test_an_option_does_what_it_meant_or_is_named(
    name: str, line: str, comes: dict[str, Any] | str, wrong: str | None
) -> None:
    made = translate(line)
    if isinstance(comes, str):
        assert f"{name}: {comes}" in made.notes
    else:
        assert {key: made.values.get(key) for key in comes} == comes
        assert [note for note in made.notes if note.startswith(f"{name}:")] == []
    sets.build(sets.from_preset("default"), made.layer())            # every setting exists and takes the value
    if wrong is not None:
        others = [word for word in line.split(",") if not word.startswith(f"{name}=")]
        with pytest.raises(sets.SettingsError, match=f"^{name}="):
            translate(",".join([*others, f"{name}={wrong}"]))


def test_a_line_of_the_12_branch_makes_its_device_out_of_a_1_gib_file() -> None:
    """127 blocks per plane, as the emulator counts for this very line: it sets 8 bytes of each sector aside."""
    line = ("nvme,drive=d,serial=deadbeef,lver=1,lmtype=0,nlbaf=5,lba_index=3,mdts=10,namespaces=1,lnum_ch=1,"
            "lnum_lun=4,lnum_pln=2,lsec_size=4096,lsecs_per_pg=4,lpgs_per_blk=64,lbbtable=bb.qemu,lmetasize=16")
    made = settings(line, Backing(GIB))
    g = made.geometry
    assert made.nvme.namespaces == ("ocssd12",)
    assert (g.groups, g.pus, g.ws_min, g.sectors, g.oob_bytes, made.nvme.planes) == (1, 4, 4, 256, 16, 2)
    assert g.chunks == 127 * 2
    assert (made.nvme.serial, made.nvme.mdts, made.nvme.bad_block_file) == ("deadbeef", 10, "bb.qemu")


def test_a_256_gib_file_is_not_cut_to_16_bits_of_blocks() -> None:
    with pytest.raises(sets.SettingsError, match="make 261632 blocks in each plane of 1 LUNs; must be from 1 to 65535"):
        settings("lver=1", Backing(256 * GIB))
    assert settings("lver=1,lnum_lun=4", Backing(255 * GIB)).geometry.chunks > 65000


def test_lsecs_and_namespaces_share_the_file() -> None:
    one, two = (settings(f"lver=1,namespaces={n}", Backing(GIB)).geometry for n in (1, 2))
    assert (one.groups, two.groups, two.chunks) == (1, 2, one.chunks // 2)


def test_a_line_of_the_20_branch_makes_its_device() -> None:
    """lws_min and the like were documented and ignored; here they count."""
    made = settings("serial=deadbeef,num_queues=8,lws_min=8,lws_opt=16,lmw_cunits=48,learly_reset=0,dlfeat=2,dialect=1",
                    Backing(GIB))
    assert (made.geometry.ws_min, made.geometry.ws_opt, made.geometry.mw_cunits) == (8, 16, 48)
    assert (made.nvme.early_reset, made.nvme.dlfeat, made.nvme.queues) == (False, 2, 7)
    assert made.nvme.namespaces == ("ocssd20",)
    assert made.geometry.raw_bytes == GIB


@pytest.mark.parametrize("line", ["lver=0", "dialect=0", "lver=0,lba_index=4"])
def test_without_lightnvm_the_disk_is_at_least_as_large_as_the_file(line: str) -> None:
    made = settings(line, Backing(GIB))
    assert made.nvme.namespaces == ("block",)
    disk_bytes = capacity_of(made.geometry, made.ftl.op) * made.geometry.sector_bytes
    assert GIB <= disk_bytes < 1.1 * GIB


@pytest.mark.parametrize("line", ["serial=x", "lver=1", "lver=0"])
def test_an_image_that_exists_decides_and_a_line_that_says_otherwise_still_shows(line: str) -> None:
    image = Geometry(groups=4, pus=4, chunks=77, sectors=512)
    made = settings(line, Backing(9 * GIB, image))
    assert made.geometry.chunks == 77
    assert settings(f"{line},lmetasize=64", Backing(9 * GIB, image)).geometry.oob_bytes == 64


def test_the_branch_is_told_by_its_options() -> None:
    assert settings("lnum_lun=4").nvme.namespaces == ("ocssd12",)
    assert "lver: not given" in translate("lnum_lun=4").notes[-1]
    assert settings("lnum_lun=4,lws_min=4").nvme.namespaces == ("ocssd20",)
    with pytest.raises(sets.SettingsError, match="give one"):
        translate("lver=1,dialect=1")


@pytest.mark.parametrize(("line", "says"), [
    ("lchannels=1", "no option of the reference emulator"), ("lnum_chs=1", "did you mean lnum_ch"),
    ("lmtype=1", "only NAND"), ("mdts=99", "from 0 to 16"), ("lver=7", "from 0 to 2"),
    ("namespaces=0", "from 1 to 256"), ("lnum_lun=x", "must be a number"), ("serial", "needs a value"),
    ("lba_index=5,nlbaf=5", "from 0 to 4"), ("ms=16,mc=0", "needs mc bit 1"),
])
def test_what_is_wrong_is_refused_by_name(line: str, says: str) -> None:
    with pytest.raises(sets.SettingsError, match=says):
        settings(line)


def test_no_options_are_no_mistake() -> None:
    assert translate("").notes == []
