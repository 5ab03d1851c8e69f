"""Owns the question whether those who use flash will take a given one: Linux's lightnvm driver, its pblk, and SPDK.

Each rule is one row with the sentence that it breaks with, numbers included. Linux 5.10 drivers/lightnvm and
drivers/nvme/host/lightnvm.c; pblk limits as its allocation and rate limiter need them. Sizes are sectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ocssd_daemon.nand.geometry import Geometry

MAX_VLBA = 64                   # addresses of one command in Linux
PBLK_OOB_BYTES = 16
PBLK_OP_PERCENT = 11
PBLK_LINES_WANTED = 60
PBLK_LINES_GOOD = 100
DRIVER, PBLK, SPDK = "lightnvm driver", "pblk", "SPDK"


@dataclass(frozen=True)
class Problem:
    """``fatal``: it will refuse; otherwise it works, but badly."""

    who: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.who}: {'' if self.fatal else 'warning: '}{self.text}"


def problems(g: Geometry, version: str, *, planes: int = 1, mdts: int = 7) -> list[Problem]:
    """All that *version* (``ocssd20``, ``ocssd12``) of *g* breaks; empty when everybody takes it."""
    rules = {"ocssd20": _rules20, "ocssd12": _rules12}[version]
    return [*_common(g, version, planes, mdts), *rules(g, planes)]


def _unit(g: Geometry, version: str, planes: int) -> int:
    """ws_opt as the kernel computes it."""
    return g.ws_min * planes if version == "ocssd12" else g.ws_opt


def _common(g: Geometry, version: str, planes: int, mdts: int) -> Iterator[Problem]:
    unit, limit = _unit(g, version, planes), (4096 << mdts) // g.sector_bytes if mdts else MAX_VLBA
    if g.groups > 256 or g.pus > 256 or g.chunks > 65536:
        yield Problem(DRIVER, f"{g.groups} groups, {g.pus} PUs, {g.chunks} chunks: at most 256, 256 and 65536")
    if g.sector_bytes != 4096:
        yield Problem(PBLK, f"geometry.sector_bytes = {g.sector_bytes}: pblk works with 4096 only")
    if unit > MAX_VLBA:
        yield Problem(PBLK, f"write unit of {unit} sectors: a command has at most {MAX_VLBA} addresses")
    if unit > limit:
        yield Problem(PBLK, f"write unit of {unit} sectors: nvme.mdts = {mdts} lets {limit} sectors through")
    yield from _lines(g, version, planes, unit)


def _lines(g: Geometry, version: str, planes: int, unit: int) -> Iterator[Problem]:
    """What a pblk instance over all PUs needs."""
    lines, size = g.chunks // planes, g.sectors * planes
    needed = -(-100 // PBLK_OP_PERCENT)
    if size % unit:
        yield Problem(PBLK, f"{size} sectors in a chunk: must be a multiple of the write unit {unit}")
    if g.oob_bytes < PBLK_OOB_BYTES:
        fatal = unit < 2 or unit * PBLK_OOB_BYTES > 4096
        yield Problem(PBLK,
                      f"geometry.oob_bytes = {g.oob_bytes}: below {PBLK_OOB_BYTES} each write unit of {unit} sectors "
                            "gives one to metadata", fatal)
    if lines <= needed + 2:
        yield Problem(PBLK,
                      f"{lines} chunks per PU: {needed} lines of {PBLK_OP_PERCENT} % over-provisioning, two to write, "
                            "are needed; smaller devices stop writing (\"no free lines\")")
    elif lines < PBLK_LINES_WANTED:
        yield Problem(PBLK, f"{lines} chunks per PU: below {PBLK_LINES_WANTED} its rate limiter has little room; "
                            f"{PBLK_LINES_GOOD} are good", fatal=False)


def _rules20(g: Geometry, planes: int) -> Iterator[Problem]:
    if planes != 1:
        yield Problem(DRIVER, f"nvme.planes = {planes}: OCSSD 2.0 has no planes")
    if g.mw_cunits:
        yield Problem(PBLK, f"geometry.mw_cunits = {g.mw_cunits}: after a crash it takes what cannot be read yet for "
                            "good and loses it, unless DULBE is on; set it to 0", fatal=False)
    if g.mw_cunits > g.sectors:
        yield Problem(SPDK, f"geometry.mw_cunits = {g.mw_cunits}: more than the {g.sectors} sectors of a chunk")
    if g.ws_opt > 64:
        yield Problem(SPDK, f"geometry.ws_opt = {g.ws_opt}: its FTL writes at most 64 sectors at once")


def _rules12(g: Geometry, planes: int) -> Iterator[Problem]:
    for name, count in (("groups (channels)", g.groups), ("pus (LUNs)", g.pus)):
        if count & count - 1:
            yield Problem(PBLK, f"geometry.{name} = {count}: OCSSD 1.2 needs a power of two")
    if g.chunks % planes:
        yield Problem(DRIVER, f"geometry.chunks = {g.chunks}: must be a multiple of nvme.planes = {planes}")
    if g.sectors % g.ws_min:
        yield Problem(DRIVER,
                      f"geometry.sectors = {g.sectors}: must be a multiple of the flash page, ws_min = {g.ws_min}")
    if g.mw_cunits:
        yield Problem(PBLK,
                      f"geometry.mw_cunits = {g.mw_cunits}: 1.2 hosts expect to read what was written; set it to 0",
                      fatal=False)
    yield Problem(SPDK, "supports OCSSD 2.0 only", fatal=False)
