"""Owns where each array lies in the state of a device: the same in RAM and in an image file.

    superblock (2 x 4 KiB) | chunk table | L2P | out-of-band entries | data

Every region starts at a multiple of 2 MiB, so that huge pages can back it; the file is sparse, so gaps cost nothing.
Offsets are bytes from the start of the image, little endian throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ocssd_daemon.nand.geometry import Geometry

SUPERBLOCK_BYTES = 4096
SUPERBLOCK_SLOTS = 2
ALIGN_BYTES = 2 << 20

# Mirrors ocssd_chunk in native/media.pxd; a test holds the two together.
CHUNK_DTYPE = np.dtype(
    [
        ("state", "u1"),
        ("type", "u1"),
        ("wear_index", "u1"),
        ("flags", "u1"),
        ("wp", "<u4"),
        ("cnlb", "<u4"),
        ("pe_cycles", "<u4"),
        ("pe_limit", "<u4"),
        ("reads", "<u4"),
        ("programmed_ns", "<u8"),
    ]
)


class Region(NamedTuple):
    offset: int
    size_bytes: int


class Layout(NamedTuple):
    chunks: Region
    l2p: Region
    oob: Region
    data: Region
    size_bytes: int


def layout_of(geometry: Geometry) -> Layout:
    """Regions of an image of *geometry*."""
    sizes = (
        geometry.total_chunks * CHUNK_DTYPE.itemsize,
        geometry.total_sectors * 4,
        geometry.total_sectors * geometry.oob_bytes,
        geometry.raw_bytes,
    )
    at = SUPERBLOCK_BYTES * SUPERBLOCK_SLOTS
    regions: list[Region] = []
    for size in sizes:
        at = -(-at // ALIGN_BYTES) * ALIGN_BYTES
        regions.append(Region(at, size))
        at += size
    chunks, l2p, oob, data = regions
    return Layout(chunks, l2p, oob, data, at)
