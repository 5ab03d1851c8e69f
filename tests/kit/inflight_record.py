"""Owns the in-flight record as bytes, to write what a killed daemon left (vhost-user, "Inflight I/O tracking").

``SplitRecord`` and ``PackedRecord`` read and write single fields of one queue's region, by the specification's names.
"""

from __future__ import annotations

import mmap
import struct
from typing import ClassVar

Fields = dict[str, tuple[str, int]]

SPLIT_HEADER, SPLIT_ENTRY = 16, 16
PACKED_HEADER, PACKED_ENTRY = 32, 32


class Record:
    """Fields of a queue region: (struct format, offset)."""

    HEADER: ClassVar[Fields]
    ENTRY: ClassVar[Fields]
    header_bytes: ClassVar[int]
    entry_bytes: ClassVar[int]

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        self.view = mmap.mmap(fd, size)
        self.offset = offset

    def get(self, name: str) -> int:
        form, at = self.HEADER[name]
        return struct.unpack_from(form, self.view, self.offset + at)[0]

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            form, at = self.HEADER[name]
            struct.pack_into(form, self.view, self.offset + at, value)

    def _entry(self, index: int, name: str) -> tuple[str, int]:
        form, at = self.ENTRY[name]
        return form, self.offset + self.header_bytes + self.entry_bytes * index + at

    def get_entry(self, index: int, name: str) -> int:
        form, at = self._entry(index, name)
        return struct.unpack_from(form, self.view, at)[0]

    def set_entry(self, index: int, **fields: int) -> None:
        for name, value in fields.items():
            form, at = self._entry(index, name)
            struct.pack_into(form, self.view, at, value)

    def inflight(self, num: int) -> list[int]:
        """Entries that are marked."""
        return [i for i in range(num) if self.get_entry(i, "inflight")]


class SplitRecord(Record):
    header_bytes, entry_bytes = SPLIT_HEADER, SPLIT_ENTRY
    HEADER: ClassVar[Fields] = {
        "features": ("<Q", 0),
        "version": ("<H", 8),
        "desc_num": ("<H", 10),
        "last_batch_head": ("<H", 12),
        "used_idx": ("<H", 14),
    }
    ENTRY: ClassVar[Fields] = {"inflight": ("<B", 0), "next": ("<H", 6), "counter": ("<Q", 8)}


class PackedRecord(Record):
    header_bytes, entry_bytes = PACKED_HEADER, PACKED_ENTRY
    HEADER: ClassVar[Fields] = {
        "features": ("<Q", 0),
        "version": ("<H", 8),
        "desc_num": ("<H", 10),
        "free_head": ("<H", 12),
        "old_free_head": ("<H", 14),
        "used_idx": ("<H", 16),
        "old_used_idx": ("<H", 18),
        "used_wrap": ("<B", 20),
        "old_used_wrap": ("<B", 21),
    }
    ENTRY: ClassVar[Fields] = {
        "inflight": ("<B", 0),
        "next": ("<H", 2),
        "last": ("<H", 4),
        "num": ("<H", 6),
        "counter": ("<Q", 8),
        "id": ("<H", 16),
        "flags": ("<H", 18),
        "len": ("<I", 20),
        "addr": ("<Q", 24),
    }
