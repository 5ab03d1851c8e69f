"""Owns fake guest memory: memfds that the test writes as a guest and a device maps as foreign memory.

Addresses are guest-physical unless they say ``user``; sizes in bytes. ``alloc`` never gives memory back: a test's guest
lives for one test. Knows no ring.

``write`` and ``read`` copy bytes, and a C library copies small pieces with stores that overlap: the device may see half
of a value, or an answer of its own overwritten. Fields that both sides use at the same time go through ``store_u16``
and ``load_u16``, which are one access each.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

PAGE = 4096
USER_OFFSET = 0x7F00_0000_0000  # what the front end's own addresses differ from guest-physical ones by


@dataclass
class Region:
    """One memory region and the file behind it; both go when nobody holds the region any more."""

    gpa: int
    size: int
    fd: int
    offset: int
    view: mmap.mmap

    def close(self) -> None:
        """Idempotent."""
        if not self.view.closed:
            self.view.close()
            os.close(self.fd)

    __del__ = close

    @property
    def user_addr(self) -> int:
        return self.gpa + USER_OFFSET

    def table_entry(self) -> tuple[int, int, int, int, int]:
        """The arguments of ``mem_add``."""
        return self.gpa, self.size, self.user_addr, self.offset, self.fd


class GuestMemory:
    """Guest RAM in regions of given (gpa, size)."""

    def __init__(self, *regions: tuple[int, int]) -> None:
        self.regions = [self._make(gpa, size) for gpa, size in regions or [(0, 16 << 20)]]
        self._next = self.regions[0].gpa + PAGE  # address 0 stays unused: it looks like a mistake

    @staticmethod
    def _make(gpa: int, size: int) -> Region:
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return Region(gpa, size, fd, 0, mmap.mmap(fd, size))

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions = []

    def alloc(self, size: int, align: int = 16) -> int:
        """Room in the first region."""
        at = -(-self._next // align) * align
        if at + size > self.regions[0].gpa + self.regions[0].size:
            raise MemoryError("the test's guest is too small")
        self._next = at + size
        return at

    def _find(self, gpa: int) -> tuple[Region, int]:
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return region, gpa - region.gpa
        raise IndexError(f"{gpa:#x} is not guest memory")

    def read(self, gpa: int, size: int) -> bytes:
        data = b""
        while size:
            region, at = self._find(gpa)
            piece = region.view[at : at + size]
            data += piece
            gpa += len(piece)
            size -= len(piece)
        return data

    def write(self, gpa: int, data: bytes) -> None:
        while data:
            region, at = self._find(gpa)
            room = min(len(data), region.size - at)
            region.view[at : at + room] = data[:room]
            gpa += room
            data = data[room:]

    def put(self, data: bytes, align: int = 16) -> int:
        """Allocate, write, and say where."""
        at = self.alloc(len(data), align)
        self.write(at, data)
        return at

    def unpack(self, form: str, gpa: int) -> tuple[int, ...]:
        return struct.unpack(form, self.read(gpa, struct.calcsize(form)))

    def pack(self, form: str, gpa: int, *values: int) -> None:
        self.write(gpa, struct.pack(form, *values))

    def _u16(self, gpa: int) -> memoryview:
        region, at = self._find(gpa)
        return memoryview(region.view)[at : at + 2].cast("H")

    def store_u16(self, gpa: int, value: int) -> None:
        """Write a value with one store (little-endian, as the machine that the tests run on)."""
        self._u16(gpa)[0] = value

    def load_u16(self, gpa: int) -> int:
        return self._u16(gpa)[0]

    def user(self, gpa: int) -> int:
        """The front end's own address of the same byte."""
        return gpa + USER_OFFSET
