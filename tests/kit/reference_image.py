"""An image as the reference emulator's qemu-img and device leave it, written from the layout's facts alone.

Nothing of ours is used here, so that the reader is not tested against itself: offsets are spelled out.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

FREE, CLOSED, OPEN, OFFLINE = 1, 2, 4, 8
NO_WP = 0xFFFF


def bits(count: int) -> int:
    return (count - 1).bit_length()


@dataclass
class ReferenceWriter:
    """``qemu-img create -f ocssd -o num_grp=…`` as a file, and what a guest would write into it."""

    path: Path
    num_grp: int = 2
    num_pu: int = 2
    num_chk: int = 6
    num_sec: int = 64
    sec_size: int = 4096
    md_size: int = 16
    num_ns: int = 1
    mccap: int = 0
    ws: tuple[int, int, int] = (4, 8, 24)
    header: dict[str, int] = field(default_factory=dict)        # what a damaged header says instead

    def __post_init__(self) -> None:
        self.chunks = self.num_grp * self.num_pu * self.num_chk
        self.sectors = self.chunks * self.num_sec
        size = self.sec_size
        self.table_bytes = -(-32 * self.chunks // size) * size
        self.ns_bytes = self.sectors * (size + self.md_size) + 4096 + self.table_bytes + size
        self.file_bytes = 40 + self.ns_bytes * self.num_ns
        rounded = -(-self.file_bytes // 512) * 512
        blocks = rounded // self.num_ns // (size + self.md_size) - (2 + self.table_bytes // size)
        self.data_offset = 2 * size + self.table_bytes          # from the namespace's start
        self.oob_offset = self.data_offset + size * blocks
        with open(self.path, "wb") as file:
            file.truncate(self.file_bytes)
        self._put(0, self._header())
        for ns in range(self.num_ns):
            self._put(self.base(ns), self._geometry())
            for chunk in range(self.chunks):
                self.chunk(chunk, ns=ns)

    def _put(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def base(self, ns: int) -> int:
        return self.sec_size + ns * self.ns_bytes

    def _header(self) -> bytes:
        magic = ord("L") << 24 | ord("N") << 16 | ord("V") << 8 | ord("M")
        told = {"magic": magic, "version": 1, "num_ns": self.num_ns,
                "sec_size": self.sec_size, "md_size": self.md_size, "ns_size": self.ns_bytes, **self.header}
        return struct.pack("<IIIIQIIQ", told["magic"], told["version"], told["num_ns"], 0, told["sec_size"],
                           told["md_size"], 0, told["ns_size"])

    def _geometry(self) -> bytes:
        page = bytearray(4096)
        page[0] = 2
        page[8:12] = bytes([bits(self.num_grp), bits(self.num_pu), bits(self.num_chk), bits(self.num_sec)])
        struct.pack_into("<I", page, 16, self.mccap)
        struct.pack_into("<HHII", page, 64, self.num_grp, self.num_pu, self.num_chk, self.num_sec)
        struct.pack_into("<III", page, 128, *self.ws)
        struct.pack_into("<6I", page, 192, 70000, 100000, 1900000, 3500000, 3000000, 3000000)
        return bytes(page)

    def slba(self, chunk: int) -> int:
        rest, chk = divmod(chunk, self.num_chk)
        grp, pu = divmod(rest, self.num_pu)
        at = bits(self.num_sec)
        return chk << at | pu << at + bits(self.num_chk) | grp << at + bits(self.num_chk) + bits(self.num_pu)

    def chunk(self, chunk: int, state: int = FREE, wp: int = 0, wear: int = 0, kind: int = 1, ns: int = 0,
              slba: int | None = None, cnlb: int | None = None) -> None:
        """One chunk descriptor."""
        packed = struct.pack("<BBB5xQQQ", state, kind, wear, self.slba(chunk) if slba is None else slba,
                             self.num_sec if cnlb is None else cnlb, wp)
        self._put(self.base(ns) + 4096 + 32 * chunk, packed)

    def write(self, chunk: int, sector: int, data: bytes, oob: bytes = b"", ns: int = 0) -> None:
        """Data and OOB of consecutive sectors; the descriptor is the caller's."""
        first = chunk * self.num_sec + sector
        self._put(self.base(ns) + self.data_offset + first * self.sec_size, data)
        self._put(self.base(ns) + self.oob_offset + first * self.md_size, oob)

    @property
    def allocated_bytes(self) -> int:
        return os.stat(self.path).st_blocks * 512
