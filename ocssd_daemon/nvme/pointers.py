"""Owns the walk over a command's data pointer, PRP or SGL, for whoever moves the bytes in Python (the admin
queue).

NVM Express Base 1.3, 4.3 (PRP) and 4.4 (SGL). Results are ``(address, length)`` pieces of guest memory in
order. The I/O queues do the same in C (``native/nvme_dptr.pxd``); a test holds the two walks together. PRP lists
are bounded by the transfer length, so a list that loops ends; SGLs may have empty descriptors and are bounded by
their number.
"""

from __future__ import annotations

from ..protocol.nvme.commands import Record, SglDescriptor, SglType
from ..protocol.nvme.status import Status
from .ports import GuestMemory

Piece = tuple[int, int]
PRP_BYTES = 8
SGL_BYTES = 16
MAX_SGL_SEGMENTS = 256
MAX_SGL_DESCRIPTORS = 4096


class PointerError(Exception):
    """The data pointer cannot be followed; ``status`` says why."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.text)
        self.status = status


async def pieces(memory: GuestMemory, command: Record, length_bytes: int, page_bytes: int) -> list[Piece]:
    """Where the *length_bytes* of the command's data lie. Raises :class:`PointerError` or ``MemoryFault``."""
    if not length_bytes:
        return []
    if command.psdt == 0:
        return await prp_pieces(memory, command.prp1, command.prp2, length_bytes, page_bytes)
    if command.psdt == 3:
        raise PointerError(Status.INVALID_FIELD)
    return await sgl_pieces(memory, command.dptr, length_bytes)


async def prp_pieces(memory: GuestMemory, prp1: int, prp2: int, length_bytes: int,
                     page_bytes: int) -> list[Piece]:
    if prp1 % 4:
        raise PointerError(Status.PRP_OFFSET_INVALID)
    first = min(length_bytes, page_bytes - prp1 % page_bytes)
    found, left = [(prp1, first)], length_bytes - first
    if left > page_bytes:
        return found + await _prp_list(memory, prp2, left, page_bytes)
    if left and prp2 % page_bytes:
        raise PointerError(Status.PRP_OFFSET_INVALID)
    return found + ([(prp2, left)] if left else [])


async def _prp_list(memory: GuestMemory, address: int, left: int, page_bytes: int) -> list[Piece]:
    found: list[Piece] = []
    if address % PRP_BYTES:
        raise PointerError(Status.PRP_OFFSET_INVALID)
    while left:
        pages = -(-left // page_bytes)
        room = (page_bytes - address % page_bytes) // PRP_BYTES
        count = min(pages, room)
        raw = await memory.read(address, count * PRP_BYTES)
        entries = [int.from_bytes(raw[i:i + PRP_BYTES], "little") for i in range(0, len(raw), PRP_BYTES)]
        if any(entry % page_bytes for entry in entries):
            raise PointerError(Status.PRP_OFFSET_INVALID)
        if pages > room:                # the last entry points to the next list
            address = entries.pop()
        for entry in entries:
            found.append((entry, min(left, page_bytes)))
            left -= found[-1][1]
    return found


class _SglWalk:
    """``native/nvme_dptr.pxd``, sgl_walk_t: what is left of the transfer, and which segment comes next."""

    def __init__(self, length_bytes: int) -> None:
        self.left, self.found = length_bytes, list[Piece]()
        self.segment: tuple[int, int] | None = None
        self._descriptors, self._last = 0, False

    def take(self, entry: Record, *, ends_segment: bool) -> None:
        """One descriptor: a data block, or the link at the end of a segment."""
        if entry.subtype or entry.type not in (SglType.DATA_BLOCK, SglType.SEGMENT, SglType.LAST_SEGMENT):
            raise PointerError(Status.SGL_TYPE_INVALID)
        if entry.type == SglType.DATA_BLOCK:
            taken = min(self.left, entry.length)
            self.found += [(entry.address, taken)] if taken else []
            self.left -= taken
            return
        self._descriptors += entry.length // SGL_BYTES
        if not ends_segment or self._last or not entry.length or entry.length % SGL_BYTES \
                or self._descriptors > MAX_SGL_DESCRIPTORS:
            raise PointerError(Status.SGL_SEGMENT_INVALID)
        self.segment, self._last = (entry.address, entry.length), entry.type == SglType.LAST_SEGMENT

    def take_segment(self, raw: bytes) -> None:
        """All descriptors of a segment, as far as the transfer needs them, and always the one that ends it."""
        self.segment = None
        ends = len(raw) - SGL_BYTES
        for at in range(0, len(raw), SGL_BYTES):
            if not self.left and at != ends:
                return
            self.take(SglDescriptor.parse(raw[at:at + SGL_BYTES]), ends_segment=at == ends)


async def sgl_pieces(memory: GuestMemory, descriptor: bytes, length_bytes: int) -> list[Piece]:
    walk, segments = _SglWalk(length_bytes), 0
    walk.take(SglDescriptor.parse(descriptor), ends_segment=True)
    while walk.segment is not None and walk.left:
        segments += 1
        if segments > MAX_SGL_SEGMENTS:
            raise PointerError(Status.SGL_SEGMENT_INVALID)
        walk.take_segment(await memory.read(*walk.segment))
    if walk.left:
        raise PointerError(Status.DATA_SGL_LENGTH)
    return walk.found
