"""Owns where the flash is kept: in RAM, or in one image file that is mapped and exclusively locked.

The superblock has two slots that are written in turn, each with a generation and a checksum, so that a crash while
one is written leaves the other. It says what the image is (geometry, uuid) and how it was left: ``clean`` means that
the L2P is a checkpoint; ``boot_id`` tells a kill of the daemon (page cache intact) from a crash of the host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ocssd_daemon.nand.geometry import Geometry, GeometryError, from_dict
from ocssd_daemon.nand.layout import (
    CHUNK_DTYPE,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_SLOTS,
    Layout,
    Region,
    layout_of,
)

MAGIC = b"OCSSDIMG"
REFERENCE_MAGIC = b"MVNL\1\0\0\0"  # qemu-img create -f ocssd: protocol/nvme/reference_image.py
VERSION = 1
_HEADER = struct.Struct("<8sIIQI")  # magic, version, payload bytes, generation, crc32 of the payload
HUGE_OOB_BYTES = 64 << 20  # from here on TLB misses cost more than memory that is taken ahead of use
CHUNK_FREE = 1
CHUNK_OFFLINE = 8
CHUNK_SEQUENTIAL = 1


class StoreError(Exception):
    """The image cannot be used: one sentence that names the file, what is wrong and what to do."""


class Superblock(msgspec.Struct):
    """What the image says of itself (JSON inside its slot)."""

    geometry: Geometry
    uuid: str
    formatted: bool = False  # the chunk table was made; until then a killed first start is simply repeated
    clean: bool = False
    boot_id: str = ""
    durability: str = "process"
    capacity_sectors: int = 0
    ftl_pus: list[int] = []  # of the block target, when it does not have all of them
    seq: int = 0
    l2p_crc: int = 0
    counters: dict[str, int] = {}
    age_ns: int = 0  # of the flash, when the wall clock (since 1970) said wall_ns; 0: not known
    wall_ns: int = 0
    write_cache: bool = True  # the mode that the block driver last chose; false: write through

    @property
    def is_fresh(self) -> bool:
        """Nothing has run on it yet."""
        return self.capacity_sectors == 0 and not self.boot_id


def boot_id() -> str:
    """The running boot of this machine; a page cache lives exactly as long."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _decode_slot(raw: bytes) -> tuple[int, Superblock] | None:
    magic, version, size, generation, crc = _HEADER.unpack_from(raw)
    if magic != MAGIC or size > SUPERBLOCK_BYTES - _HEADER.size:
        return None
    payload = raw[_HEADER.size : _HEADER.size + size]
    if zlib.crc32(payload) != crc:
        return None
    if version != VERSION:
        raise StoreError(f"image format version {version} is not known to this program (it knows {VERSION})")
    try:
        return generation, msgspec.json.decode(payload, type=Superblock)
    except msgspec.DecodeError as error:
        raise StoreError(f"superblock cannot be read: {error}") from None


class Store:
    """The bytes of one device. ``chunks``, ``l2p``, ``oob`` and ``data`` are numpy views of it.

    Acquires a mapping and, for a file, a descriptor with an exclusive lock; ``close`` releases both.
    """

    def __init__(self, memory: mmap.mmap, superblock: Superblock, fd: int, path: str | None) -> None:
        self.superblock = superblock
        self.fd = fd
        self.path = path
        self.layout: Layout = layout_of(superblock.geometry)
        self._memory = memory
        self._generation = 0
        self._bytes_before: int | None = None  # of a file that this start formatted
        self._created = False
        g = superblock.geometry
        self.chunks = self._view(self.layout.chunks, CHUNK_DTYPE)
        self.l2p = self._view(self.layout.l2p, np.dtype("<u4"))
        self.oob = self._view(self.layout.oob, np.dtype("u1")).reshape(g.total_sectors, g.oob_bytes)
        data = self.layout.data if len(memory) >= self.layout.size_bytes else Region(0, 0)
        self.data = self._view(data, np.dtype("u1")).reshape(-1, g.sector_bytes)

    def _view(self, region: Region, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        count = region.size_bytes // dtype.itemsize
        return np.frombuffer(self._memory, dtype, count, region.offset)

    @property
    def geometry(self) -> Geometry:
        return self.superblock.geometry

    @property
    def is_fresh(self) -> bool:
        return self.superblock.is_fresh

    @property
    def was_formatted(self) -> bool:
        """Did this start make an image of the file?"""
        return self._bytes_before is not None

    def format_chunks(self) -> None:
        """Every chunk FREE and sequential; nothing else of a fresh image needs to be written."""
        self.chunks["type"] = CHUNK_SEQUENTIAL
        self.chunks["cnlb"] = self.geometry.sectors
        self.chunks["state"] = CHUNK_FREE

    def damaged_chunks(self) -> int:
        """Chunks whose table entry reaches beyond the chunk; everything behind trusts these two numbers."""
        sectors = self.geometry.sectors
        beyond = (self.chunks["wp"] > sectors) & (self.chunks["state"] != CHUNK_OFFLINE)
        return int((beyond | (self.chunks["cnlb"] > sectors)).sum())

    def save_superblock(self, **changes: Any) -> None:
        """Write the changed superblock to the older slot."""
        for name, value in changes.items():
            setattr(self.superblock, name, value)
        payload = msgspec.json.encode(self.superblock)
        self._generation += 1
        header = _HEADER.pack(MAGIC, VERSION, len(payload), self._generation, zlib.crc32(payload))
        if len(header) + len(payload) > SUPERBLOCK_BYTES:
            raise StoreError(f"{self.path}: superblock of {len(payload)} bytes does not fit its slot")
        at = (self._generation % SUPERBLOCK_SLOTS) * SUPERBLOCK_BYTES
        self._memory[at : at + len(header) + len(payload)] = header + payload

    def sync(self) -> None:
        """Bring a file's content to the host's disk; raises OSError when the disk refuses."""
        if self.fd >= 0:
            self._memory.flush()
            os.fdatasync(self.fd)

    def close(self) -> None:
        """Release mapping and lock. Views handed out keep the mapping alive until they die."""
        del self.chunks, self.l2p, self.oob, self.data
        with contextlib.suppress(BufferError):  # somebody still holds a view; the mapping goes with it
            self._memory.close()
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, which may live on
            os.close(self.fd)
            self.fd = -1

    def abandon(self) -> None:
        """Close after a start that failed: a file that it formatted is again what it was."""
        if self.fd >= 0 and self.path is not None and self._bytes_before is not None:
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self._bytes_before)
            if self._created:
                os.unlink(self.path)
        self.close()


def open_ram(geometry: Geometry, keep_data: bool = True) -> Store:
    """A fresh device in anonymous memory, taken from the host only as it is written.

    *keep_data* false: no memory for sector data is mapped (simulation); ``data`` is then empty.
    """
    layout = layout_of(geometry)
    size = layout.size_bytes if keep_data else layout.data.offset
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=flags)
    _advise_huge(memory, layout.l2p)
    if layout.oob.size_bytes >= HUGE_OOB_BYTES:
        _advise_huge(memory, layout.oob)
    if keep_data:
        _advise_huge(memory, layout.data)
    superblock = Superblock(geometry, str(uuid.uuid4()))
    store = Store(memory, superblock, -1, None)
    store.format_chunks()
    return store


def _advise_huge(memory: mmap.mmap, region: Region) -> None:
    """Random reads of gigabytes miss the TLB on every access with 4 KiB pages.

    Not for a small device's out-of-band entries: the first write to each PU would take 2 MiB for 16 bytes of them.
    """
    with contextlib.suppress(OSError, AttributeError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, region.offset, region.size_bytes)


def _lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError(f"{path}: in use by another process; stop it, or choose another file") from None


def _newest_slot(head: bytes, path: str) -> tuple[int, Superblock] | None:
    head = head.ljust(SUPERBLOCK_BYTES * SUPERBLOCK_SLOTS, b"\0")
    try:
        slots = [_decode_slot(head[i * SUPERBLOCK_BYTES :]) for i in range(SUPERBLOCK_SLOTS)]
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    good = [slot for slot in slots if slot is not None]
    return max(good, key=lambda slot: slot[0]) if good else None


def _read_superblock(fd: int, path: str) -> tuple[int, Superblock] | None:
    """The newest good slot; None for an image that is empty or all zeros there. Foreign content is refused."""
    head = os.pread(fd, SUPERBLOCK_BYTES * SUPERBLOCK_SLOTS, 0)
    newest = _newest_slot(head, path)
    if newest is not None:
        return newest
    if head.startswith(REFERENCE_MAGIC):
        raise StoreError(
            f"{path}: is an image of the reference emulator; it is left alone "
            f"(make one of ours: ocssd import {path} NEW)"
        )
    if any(head) or _has_content(fd):
        raise StoreError(
            f"{path}: holds something that is not an image of this program; it is left alone "
            "(use an empty or zero-filled file)"
        )
    return None


def check_unused(path: str) -> None:
    """Nothing, or an empty or zero-filled file, is at *path*. Raises StoreError."""
    if not os.path.exists(path):
        return
    fd = _open_fd(path)
    try:
        _lock(fd, path)
        if _read_superblock(fd, path) is not None:
            raise StoreError(f"{path}: is an image already; remove it, or choose another file")
    finally:
        os.close(fd)


def peek(path: str) -> tuple[Geometry | None, int]:
    """``(geometry, file size in bytes)`` of what is at *path*, without locking it; None: no image of ours (yet)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        size = os.fstat(fd).st_size
        found = _newest_slot(os.pread(fd, SUPERBLOCK_BYTES * SUPERBLOCK_SLOTS, 0), path)
        return (found[1].geometry if found else None), size
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _has_content(fd: int) -> bool:
    """Is any byte of the file not zero? Holes are skipped, so that a sparse file costs nothing."""
    size = os.fstat(fd).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return False
        piece = os.pread(fd, 4 << 20, at)
        if not piece:
            return False
        if piece.count(0) != len(piece):
            return True
        at += len(piece)
    return False


def _open_fd(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{path}: is not a regular file")
    return fd


def reserve(fd: int, offset: int, size_bytes: int) -> None:
    """Have the file system allocate a part of the image: a full disk is an error here, a SIGBUS later.

    File systems that cannot do it ahead of time are trusted to have room. Raises OSError.
    """
    try:
        os.posix_fallocate(fd, offset, size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise


def _map(fd: int, size_bytes: int, reserved_bytes: int, path: str) -> mmap.mmap:
    try:
        if os.fstat(fd).st_size < size_bytes:
            os.ftruncate(fd, size_bytes)
        reserve(fd, 0, reserved_bytes)
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
    except OSError as error:
        raise StoreError(f"{path}: cannot be mapped ({size_bytes} bytes): {error.strerror}") from None


def open_file(path: str, wanted: Geometry, explicit: bool = False) -> Store:
    """Open or format the image at *path*.

    An image keeps the geometry that it was made with; *explicit* says that the user asked for *wanted*, and a
    difference is then refused. Raises StoreError with one sentence; nothing is left open then.
    """
    created = not os.path.exists(path)
    fd = _open_fd(path)
    try:
        store = _open_image(fd, path, wanted, explicit)
        store._created = created
        return store
    except BaseException:
        os.close(fd)
        if created:
            os.unlink(path)
        raise


def look(path: str, wanted: Geometry, explicit: bool = False) -> Geometry:
    """The geometry that the image at *path* has, judged as by :func:`open_file`; nothing is locked, made or changed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        return _judge(_read_superblock(fd, path), fd, path, wanted, explicit)[0].geometry
    finally:
        os.close(fd)


def _judge(found: tuple[int, Superblock] | None, fd: int, path: str, wanted: Geometry,
           explicit: bool) -> tuple[Superblock, Layout]:
    superblock = found[1] if found else Superblock(wanted, str(uuid.uuid4()))
    try:
        from_dict(msgspec.structs.asdict(superblock.geometry))
    except GeometryError as error:
        raise StoreError(f"{path}: damaged superblock: {error}") from None
    if explicit and superblock.geometry != wanted:
        raise StoreError(f"{path}: {_difference(superblock.geometry, wanted)}")
    layout = layout_of(superblock.geometry)
    size_bytes = os.fstat(fd).st_size
    if found and superblock.formatted and size_bytes < layout.size_bytes:
        raise StoreError(
            f"{path}: is cut short, {size_bytes} of {layout.size_bytes} bytes; restore it, or use another file"
        )
    return superblock, layout


def _open_image(fd: int, path: str, wanted: Geometry, explicit: bool) -> Store:
    _lock(fd, path)
    found = _read_superblock(fd, path)
    superblock, layout = _judge(found, fd, path, wanted, explicit)
    size_bytes = os.fstat(fd).st_size
    # Chunk table and L2P are written at any place at any time; data and OOB are reserved chunk by chunk.
    store = Store(_map(fd, layout.size_bytes, layout.oob.offset, path), superblock, fd, path)
    if found:
        if damaged := store.damaged_chunks():
            raise StoreError(f"{path}: damaged chunk table: {damaged} entries reach beyond their chunk")
        store._generation = found[0]
    else:
        store._bytes_before = size_bytes
        store.save_superblock()  # first: a start that is killed in between leaves an image that is known as ours
    if not superblock.formatted:
        store.format_chunks()
        store.save_superblock(formatted=True)
    return store


def _difference(image: Geometry, wanted: Geometry) -> str:
    for field in Geometry.__struct_fields__:
        if getattr(image, field) != getattr(wanted, field):
            return (
                f"the image was made with geometry.{field} = {getattr(image, field)}, not {getattr(wanted, field)}; "
                "leave the geometry out, or use another file"
            )
    raise AssertionError("no difference")
