"""Owns the arithmetic of Linux 5.10's pblk on a device: what its lines, its spare space and its rate limiter come to.

The names are pblk's own. Sizes are sectors, chunks where it says so; a line is one chunk of every parallel unit. The
sizes of its structures are those of drivers/lightnvm/pblk.h.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_VLBA = 64                   # addresses of one command
OP_PERCENT = 11                 # over-provisioning unless the user names one
SMETA_BYTES, EMETA_BYTES, COUNTERS_BYTES = 64, 72, 24
LBA_BYTES, COUNT_BYTES, LONG_BITS = 8, 4, 64
PAGE_BYTES = 4096
OOB_BYTES = 16                  # of a sector; with fewer the last sector of each write unit holds the metadata


def up(count: int, unit: int) -> int:
    """Units that *count* takes."""
    return -(-count // unit)


def order(count: int) -> int:
    """get_count_order: the power of two that holds *count*."""
    return (count - 1).bit_length() if count > 0 else 0


@dataclass(frozen=True)
class Shape:
    """What pblk is given: parallel units, lines, sectors of a chunk and of a write unit (ws_opt), bytes."""

    luns: int
    lines: int
    clba: int
    ws_opt: int
    mw_cunits: int
    csecs: int
    sos: int


@dataclass(frozen=True)
class Needs:
    """``min_blk_line`` chunks of a line must be good; ``high_chunks`` free ones let garbage collection rest;
    ``capacity`` is the disk's size; the write buffer has ``buffer`` entries.
    """

    smeta: int
    emeta: int
    min_blk_line: int
    op_chunks: int
    meta_chunks: int
    high_chunks: int
    capacity: int
    buffer: int

    @property
    def windows(self) -> int:
        """Of 64 entries, in the write buffer."""
        return self.buffer // MAX_VLBA


def _bitmap_bytes(bits: int) -> int:
    return up(bits, LONG_BITS) * 8


def _in_units(size_bytes: int, s: Shape) -> int:
    """Sectors of the write units that hold so many bytes."""
    return up(size_bytes, s.ws_opt * s.csecs) * s.ws_opt


def _emeta(s: Shape) -> int:
    """The LBA list is the longer the fewer sectors the metadata takes itself, so it is grown until it fits."""
    emeta = s.ws_opt
    while True:
        head = up(EMETA_BYTES + _bitmap_bytes(s.luns) + COUNTERS_BYTES, s.csecs)
        lbas = up(max(0, s.clba * s.luns - emeta) * LBA_BYTES, s.csecs)
        counts = up(s.lines * COUNT_BYTES, s.csecs)
        if head + lbas + counts <= emeta:
            return emeta
        emeta += s.ws_opt


def needs(s: Shape) -> Needs:
    """For all of the device, with the default over-provisioning, which pblk raises where it is not enough."""
    smeta, emeta = _in_units(SMETA_BYTES + _bitmap_bytes(s.luns), s), _emeta(s)
    chunks, minimum = s.lines * s.luns, up(100, OP_PERCENT) * s.luns
    provisioned = chunks * (100 - OP_PERCENT) // 100
    if chunks - provisioned < minimum:
        provisioned = max(0, chunks - minimum)
    op_chunks, meta_chunks = chunks - provisioned, up((smeta + emeta) * s.lines, s.clba)
    data = s.ws_opt if s.sos >= OOB_BYTES else s.ws_opt - 1
    buffer = 1 << order((max(s.mw_cunits, s.ws_opt) + s.ws_opt) * s.luns)
    return Needs(
        smeta, emeta, 1 + (up(smeta + emeta, s.clba) if s.luns > 1 else 0), op_chunks, meta_chunks,
        op_chunks - meta_chunks - s.luns, max(0, provisioned - meta_chunks) * (s.clba // s.ws_opt) * data, buffer)
