"""Owns the layout of an image as the reference emulator's ``qemu-img create -f ocssd`` makes it (OCSSD 2.0).

    header | namespace 0 | namespace 1 …       a namespace: geometry | chunk descriptors | (gap) | data | OOB

The header fills one sector. Geometry and descriptors are the structures of ``ocssd20``. Little endian (the emulator
wrote host order, and ran on x86). Offsets are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from construct import Bytes, Container, Int32ul, Int64ul, Struct

from .ocssd20 import CHUNK_DESCRIPTOR_BYTES, GEOMETRY_BYTES

# A parsed structure, for those who may not know construct.
Record: TypeAlias = Container

MAGIC = int.from_bytes(b"MVNL", "little")
VERSION = 1
HEADER_BYTES = 40
HOST_BLOCK_BYTES = 512          # QEMU rounds the length of a file up to this

Header = Struct(
    "magic" / Int32ul, "version" / Int32ul, "num_namespaces" / Int32ul, "reserved" / Int32ul,
    "sector_bytes" / Int64ul, "md_bytes" / Int32ul, "pad" / Bytes(4), "ns_bytes" / Int64ul,
)


@dataclass(frozen=True)
class Places:
    """Where the parts of a namespace lie, from the start of the file."""

    geometry: int
    chunks: int
    data: int
    oob: int


def chunk_table_bytes(chunks: int, sector_bytes: int) -> int:
    """The descriptors of *chunks* chunks, rounded up to whole sectors."""
    return -(-chunks * CHUNK_DESCRIPTOR_BYTES // sector_bytes) * sector_bytes


def namespace_bytes(chunks: int, sectors: int, sector_bytes: int, md_bytes: int) -> int:
    """Distance from one namespace to the next, as the image's maker computed it (``ns_bytes`` of the header)."""
    return (sectors * (sector_bytes + md_bytes) + GEOMETRY_BYTES + chunk_table_bytes(chunks, sector_bytes)
            + sector_bytes)


def places(header: Record, nsid_0: int, chunks: int, file_bytes: int) -> Places:
    """Where the emulator looks for the parts of a namespace of *chunks* chunks.

    It computes the place of the OOB from the length of the file, which with many chunks comes out some sectors short:
    then the last sectors' data and the first sectors' OOB share bytes.
    """
    size, table = header.sector_bytes, chunk_table_bytes(chunks, header.sector_bytes)
    base = size + nsid_0 * header.ns_bytes
    rounded = -(-file_bytes // HOST_BLOCK_BYTES) * HOST_BLOCK_BYTES
    sectors = rounded // header.num_namespaces // (size + header.md_bytes) - (2 + table // size)
    data = base + 2 * size + table
    return Places(base, base + GEOMETRY_BYTES, data, data + size * sectors)
