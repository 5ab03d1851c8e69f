"""Owns the translation of the options of the reference's ``qemu-img create -f ocssd`` (``ocssd create --qemu-img``).

Names and meanings are its own, so are the defaults: 2 groups of 8 parallel units (its help says 4, but it makes 8). It
checked nothing; here a geometry that cannot be is refused.
"""

from __future__ import annotations

from ocssd_daemon.cli.reference_options import (
    Line,
    Result,
    Rule,
    Translation,
    any_text,
    apply,
    number,
    parse,
    ranged,
    refused,
    size_to,
    to,
)

SOURCE = "--qemu-img"
MCCAP_MULTI_RESET, MCCAP_EARLY_RESET, MCCAP_BITS = 2, 4, 7
PREALLOCATIONS = ("off", "metadata", "falloc", "full")

DEFAULTS = {
    "geometry.groups": 2, "geometry.pus": 8, "geometry.chunks": 60, "geometry.sectors": 4096,
    "geometry.sector_bytes": 4096, "geometry.oob_bytes": 16, "geometry.ws_min": 4, "geometry.ws_opt": 8,
    "geometry.mw_cunits": 24,
}


def _groups(name: str, text: str, line: Line) -> Result:
    """All namespaces are alike; here they share out the groups of one device."""
    return {"geometry.groups": ranged(name, text, line, 1, 256) * max(1, line.number("num_ns", 1))}


def _namespaces(name: str, text: str, line: Line) -> Result:
    count = ranged(name, text, line, 1, 256)
    values: dict[str, object] = {"nvme.namespaces": ["ocssd20"] * count}
    if "num_grp" not in line.options:
        values["geometry.groups"] = DEFAULTS["geometry.groups"] * count
    return values


def mccap(name: str, text: str, line: Line) -> Result:
    """Vector copy is always there; the bits for resets are settings."""
    bits = number(name, text, line)
    if bits & ~MCCAP_BITS:
        raise refused(name, "bit 0 vector copy, bit 1 reset of free chunks, bit 2 reset of open chunks", text, line)
    early = {"nvme.early_reset": True} if bits & MCCAP_EARLY_RESET else {}
    return {"nvme.multi_reset": bool(bits & MCCAP_MULTI_RESET), **early}


def _preallocation(name: str, text: str, line: Line) -> Result:
    if text not in PREALLOCATIONS:
        raise refused(name, f"must be one of {', '.join(PREALLOCATIONS)}", text, line)
    return {}


OPTIONS: dict[str, Rule] = {
    "num_grp": _groups, "num_pu": to("geometry.pus", 1, 256), "num_chk": to("geometry.chunks", 1, 65536),
    "num_sec": to("geometry.sectors", 1, 1 << 24), "sec_size": size_to("geometry.sector_bytes", 512, 65536),
    "md_size": size_to("geometry.oob_bytes", 0, 4096), "num_ns": _namespaces, "mccap": mccap,
    "ws_min": to("geometry.ws_min", 1, 4096), "ws_opt": to("geometry.ws_opt", 1, 4096),
    "mw_cunits": to("geometry.mw_cunits", 0, 1 << 24),
    "size": any_text("the size follows from the geometry"), "preallocation": _preallocation,
    "nocow": any_text("a property of the file system; set it with chattr +C on the directory"),
}


def translate(text: str) -> Translation:
    """Settings for a line such as ``num_grp=2,num_pu=4``. Raises SettingsError."""
    line = parse(text, OPTIONS, SOURCE, "qemu-img's format ocssd") if text.strip() else Line({}, SOURCE)
    done = apply(line, OPTIONS)
    done.values = {**DEFAULTS, **done.values}
    return done


def wants_room(text: str | None) -> bool:
    """Was all of the file to be allocated on the disk?"""
    return any(word in (text or "").split(",") for word in ("preallocation=falloc", "preallocation=full"))
