"""Owns the translation of the reference emulator's ``-device nvme,…`` options into settings (``--qemu-nvme``).

Every parameter of both branches (OCSSD 1.2 and 2.0) is a row of ``OPTIONS``: the setting it becomes, the values it may
have, and what is said when it has no meaning here. What the reference ignored is done as it was meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ocssd_daemon.settings import Given, SettingsError

SOURCE = "--qemu-nvme"


@dataclass
class Translation:
    """Flat settings, and one note for each option that means nothing here."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layer(self) -> dict[str, Given]:
        return {key: Given(value, SOURCE) for key, value in self.values.items()}


Rule = Callable[[str, str, dict[str, str]], dict[str, Any] | str]


def _number(name: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise SettingsError(name, "must be a number", text, SOURCE) from None


def _to(key: str, low: int = 0, high: int = 1 << 32, plus: int = 0) -> Rule:
    """A number that becomes a setting, *plus* something."""
    def rule(name: str, text: str, _all: dict[str, str]) -> dict[str, Any] | str:
        value = _number(name, text)
        if not low <= value <= high:
            raise SettingsError(name, f"must be from {low} to {high}", value, SOURCE)
        return {key: value + plus}
    return rule


def _text_to(key: str) -> Rule:
    return lambda name, text, _all: {key: text}


def _flag_to(key: str) -> Rule:
    return lambda name, text, _all: {key: bool(_number(name, text))}


def _ignored(reason: str) -> Rule:
    return lambda name, text, _all: reason


def _only(value: int, reason: str) -> Rule:
    """An option that the reference accepted with any value but meant only with one."""
    def rule(name: str, text: str, _all: dict[str, str]) -> dict[str, Any] | str:
        if _number(name, text) != value:
            raise SettingsError(name, reason, text, SOURCE)
        return {}
    return rule


def _version(name: str, text: str, given: dict[str, str]) -> dict[str, Any] | str:
    kinds = {("lver", 0): "block", ("lver", 1): "ocssd12", ("lver", 2): "ocssd20", ("dialect", 0): "block",
             ("dialect", 1): "ocssd20"}
    kind = kinds.get((name, _number(name, text)))
    if kind is None:
        raise SettingsError(name, "must be 0, 1 or 2" if name == "lver" else "must be 0 or 1", text, SOURCE)
    return {"nvme.namespaces": [kind] * _number("namespaces", given.get("namespaces", "1"))}


def _namespaces(name: str, text: str, given: dict[str, str]) -> dict[str, Any] | str:
    count = _number(name, text)
    if not 1 <= count <= 256:
        raise SettingsError(name, "must be from 1 to 256", count, SOURCE)
    return {} if {"lver", "dialect"} & given.keys() else {"nvme.namespaces": ["ocssd20"] * count}


def _block_shape(name: str, text: str, given: dict[str, str]) -> dict[str, Any] | str:
    """1.2: a flash page is ws_min sectors, a block its pages."""
    page, pages = (_number(key, given.get(key, default)) for key, default in (("lsecs_per_pg", "1"), ("lpgs_per_blk",
                                                                                                      "256")))
    if not page or not pages:
        raise SettingsError(name, "must not be 0", text, SOURCE)
    return {"geometry.ws_min": page, "geometry.ws_opt": page, "geometry.sectors": page * pages, "geometry.mw_cunits": 0}


def _capabilities(name: str, text: str, _given: dict[str, str]) -> dict[str, Any] | str:
    bits = _number(name, text)
    return {"nvme.multi_reset": bool(bits & 2), **({"nvme.early_reset": True} if bits & 4 else {})}


def _bad_one_in(name: str, text: str, _given: dict[str, str]) -> dict[str, Any] | str:
    """One block in so many is bad from the factory; 0: none."""
    one_in = _number(name, text)
    if not 0 <= one_in <= 1 << 20:
        raise SettingsError(name, f"must be from 0 to {1 << 20}", one_in, SOURCE)
    return {"faults.bad": f"{100 / one_in:.6f}%"} if one_in else {}


_FORMAT = _ignored("the LBA format follows geometry.sector_bytes and geometry.oob_bytes")
_FILES = _ignored("metadata and chunk states are kept in the image (--store)")
_FIXED = _ignored("fixed here")

OPTIONS: dict[str, Rule] = {
    "serial": _text_to("nvme.serial"), "drive": _ignored("use --store"), "namespaces": _namespaces,
    "queues": _to("nvme.queues", 1, 2047), "num_queues": _to("nvme.queues", 1, 2047),
    "entries": _to("nvme.entries", 1, 65535, plus=1), "mdts": _to("nvme.mdts", 0, 16), "stride": _to("nvme.stride", 0,
                                                                                                     12),
    "aerl": _to("nvme.aerl", 0, 255), "acl": _to("nvme.acl", 0, 255), "elpe": _to("nvme.error_entries", 0, 63, plus=1),
    "vid": _to("nvme.vid", 0, 0xFFFF), "did": _to("nvme.did", 0, 0xFFFF), "dlfeat": _to("nvme.dlfeat", 0, 2),
    **dict.fromkeys(("max_cqes", "max_sqes", "cqr", "vwc", "intc", "intc_thresh", "intc_time", "mpsmin", "mpsmax",
                     "oacs",
                     "oncs"), _FIXED),
    **dict.fromkeys(("nlbaf", "lba_index", "dpc", "dps", "mc", "meta", "ms", "ms_max", "extended"), _FORMAT),
    **dict.fromkeys(("cmbsz", "cmbloc", "cmb_size_mb"), _ignored("there is no controller memory buffer")),
    **dict.fromkeys(("bootindex", "logical_block_size", "physical_block_size", "min_io_size", "opt_io_size",
                     "discard_granularity", "write-cache", "share-rw", "id", "addr", "bus"),
                     _ignored("QEMU's own affair")),
    # OCSSD 1.2
    "lver": _version, "lsec_size": _to("geometry.sector_bytes", 512, 65536), "lsecs_per_pg": _block_shape,
    "lpgs_per_blk": _block_shape, "lmax_sec_per_rq": _only(64, "64 sectors are the limit of the protocol"),
    "lmtype": _only(0, "only NAND (0) is emulated"), "lfmtype": _only(0, "only SLC (0) is reported"),
    "ll2pmode": _only(0, "the map is the host's (0); the hybrid mode left the specification"),
    "lnum_ch": _to("geometry.groups", 1, 256), "lnum_lun": _to("geometry.pus", 1, 256),
    "lnum_pu": _to("geometry.pus", 1, 256), "lnum_pln": _to("nvme.planes", 1, 4),
    "lmetasize": _to("geometry.oob_bytes", 0, 4096),
    "lbbtable": _text_to("nvme.bad_block_file"), "lmetadata": _FILES, "lreadl2ptbl": _FIXED,
    "lbbfrequency": _bad_one_in, "ldebug": _ignored("use --log-level debug"), "lstrict": _FIXED,
    "lb_err_write": _ignored("use a write fault file (lwritefail)"), "ln_err_write": _ignored("use lwritefail"),
    # OCSSD 2.0
    "dialect": _version, "lmccap": _capabilities, "lws_min": _to("geometry.ws_min", 1, 4096),
    "lws_opt": _to("geometry.ws_opt", 1, 4096), "lmw_cunits": _to("geometry.mw_cunits", 0, 1 << 24),
    "lsecs_per_chk": _to("geometry.sectors", 1, 1 << 24), "lchunktable": _FILES,
    "learly_reset": _flag_to("nvme.early_reset"), "lsgl_lbal": _only(0, "LBA lists lie at a bus address"),
    "lchunkstate": _text_to("faults.chunk_states"), "lresetfail": _text_to("faults.reset_failures"),
    "lwritefail": _text_to("faults.write_failures"),
}


def translate(line: str) -> Translation:
    """Settings for a line such as ``serial=deadbeef,lver=1,lnum_lun=4``. Raises SettingsError."""
    given: dict[str, str] = {}
    for word in line.removeprefix("nvme,").split(","):
        name, equals, value = word.strip().partition("=")
        if not equals or name not in OPTIONS:
            raise SettingsError(name, _unknown(name), value, SOURCE)
        given[name] = value
    done = Translation()
    for name, text in given.items():
        result = OPTIONS[name](name, text, given)
        if isinstance(result, str):
            done.notes.append(f"{name}: {result}")
        else:
            done.values.update(result)
    return done


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, OPTIONS, 1)
    return "no option of the reference emulator" + (f"; did you mean {close[0]}?" if close else "")
