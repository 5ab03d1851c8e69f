"""Owns the guest's memory as a vfio-user client lends it: mapped where a descriptor came, by messages where
none did.

A range without a descriptor gets a *copy*: a sparse file of its size, mapped like the real thing. Bytes are
pulled into it by DMA_READ before a command runs and pushed out by DMA_WRITE after it, so that the queues see
one kind of memory. As soon as a range that may be written has no descriptor, the I/O queues are run from
here, not by the reactor.

Register accesses never wait for anything in this file: QEMU serves no DMA message while a vCPU waits for a
register.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

from ocssd_daemon._nvme import GuestMemory
from ocssd_daemon.nvme.ports import MemoryFault
from ocssd_daemon.protocol.vfio_user.wire import MAX_DMA_MAPS, PAGE_BYTES, UNMAP_ALL, DmaFlags

# Bytes of one DMA message. QEMU 11.1 takes a reply for sent when its socket took any part of it, and the stream is out
# of step from then on. Linux queues a message of this size in one piece or not at all (net/unix: 32 KiB of pages and a
# head).
WHOLE_MESSAGE_BYTES = 32 << 10

KNOWN_FLAGS = DmaFlags.READ | DmaFlags.WRITE | DmaFlags.MMAP | DmaFlags.FILE_IO

DmaRead = Callable[[int, int], Awaitable[bytes]]
DmaWrite = Callable[[int, bytes], Awaitable[None]]


class Copy:
    """Our copy of a range that has no descriptor. Acquires a memfd; ``close`` releases it.

    Raises OSError, and OverflowError for more than a file can have.
    """

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address, self.size_bytes = address, size_bytes
        self.fd = os.memfd_create("dma-copy", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.fd)

    def holds(self, address: int, count_bytes: int) -> bool:
        return self.address <= address and address + count_bytes <= self.address + self.size_bytes


class ClientMemory:
    """Implements ``nvme.ports.GuestMemory``. ``dma_read`` and ``dma_write`` exchange one message each and
    raise OSError.

    ``by_message_changed(bool)`` is told when the way in which I/O queues must be run changes.
    """

    def __init__(self, mapped: GuestMemory, dma_read: DmaRead, dma_write: DmaWrite,
                 by_message_changed: Callable[[bool], None]) -> None:
        self.mapped = mapped
        self.max_message_bytes = WHOLE_MESSAGE_BYTES
        self._dma_read, self._dma_write = dma_read, dma_write
        self._changed = by_message_changed
        self._copies: dict[int, Copy] = {}          # by address
        self._read_only: dict[int, int] = {}        # ranges without a descriptor that may only be read
        self._count = 0

    # ---- the map ------------------------------------------------------------------------------------------

    def map(self, address: int, size_bytes: int, flags: int, fd: int | None, offset_bytes: int) -> int:
        """0, or the errno of the refusal."""
        if flags & ~KNOWN_FLAGS or not flags & (DmaFlags.READ | DmaFlags.WRITE):
            return errno.EINVAL
        if not size_bytes or (address | size_bytes) % PAGE_BYTES or address + size_bytes > 1 << 64:
            return errno.EINVAL
        if self.mapped.overlaps(address, size_bytes) or self._overlaps_read_only(address, size_bytes):
            return errno.EEXIST
        if self._count >= MAX_DMA_MAPS:
            return errno.ENOSPC
        failed = self._map_copy(address, size_bytes, flags) if fd is None else self._map_fd(
            address, size_bytes, flags, fd, offset_bytes)
        self._count += not failed
        return failed

    def _map_fd(self, address: int, size_bytes: int, flags: int, fd: int, offset_bytes: int) -> int:
        refusal = self.mapped.map(address, size_bytes, fd, offset_bytes, bool(flags & DmaFlags.WRITE))
        return errno.EINVAL if refusal else 0

    def _map_copy(self, address: int, size_bytes: int, flags: int) -> int:
        if not flags & DmaFlags.WRITE:              # a ROM: nothing of ours lies there
            self._read_only[address] = size_bytes
            return 0
        try:
            copy = Copy(address, size_bytes)
        except OverflowError:
            return errno.EINVAL
        except OSError as error:
            return error.errno or errno.ENOMEM
        if self.mapped.map(address, size_bytes, copy.fd, 0, True):
            copy.close()
            return errno.EINVAL
        self._copies[address] = copy
        self._changed(True)
        return 0

    def _overlaps_read_only(self, address: int, size_bytes: int) -> bool:
        return any(start < address + size_bytes and address < start + size
                   for start, size in self._read_only.items())

    def unmap(self, address: int, size_bytes: int, flags: int) -> int:
        """0, or the errno. The range must consist of whole mappings; all of them go with UNMAP_ALL."""
        if flags == UNMAP_ALL:
            return errno.EINVAL if address or size_bytes else self.clear()
        if flags:
            return errno.EINVAL
        if self._read_only.get(address) == size_bytes:
            del self._read_only[address]
        elif not self.mapped.unmap(address, size_bytes):
            return errno.ENOENT
        self._count -= 1
        self._drop_copies(address, size_bytes)
        return 0

    def _drop_copies(self, address: int, size_bytes: int) -> None:
        gone = [start for start in self._copies if address <= start < address + size_bytes]
        for start in gone:
            self._copies.pop(start).close()
        if gone and not self._copies:
            self._changed(False)

    def clear(self) -> int:
        self.mapped.clear()
        self._read_only.clear()
        self._count = 0
        self._drop_copies(0, 1 << 64)
        return 0

    # ---- bytes --------------------------------------------------------------------------------------------

    def _copy_of(self, address: int, count_bytes: int) -> Copy | None:
        return next((copy for copy in self._copies.values() if copy.holds(address, count_bytes)), None)

    async def pull(self, address: int, count_bytes: int) -> None:
        """Bring our copy of a range up to date; nothing to do where memory is mapped. Raises MemoryFault."""
        copy = self._copy_of(address, count_bytes)
        done = 0
        while copy is not None and done < count_bytes:
            piece = min(count_bytes - done, self.max_message_bytes)
            try:
                data = await self._dma_read(address + done, piece)
            except OSError as error:
                raise MemoryFault(f"DMA_READ {address + done:#x}: {error.strerror}") from None
            os.pwrite(copy.fd, data, address + done - copy.address)
            done += piece

    async def push(self, address: int, count_bytes: int) -> None:
        """Send our copy of a range to the guest."""
        copy = self._copy_of(address, count_bytes)
        done = 0
        while copy is not None and done < count_bytes:
            piece = min(count_bytes - done, self.max_message_bytes)
            try:
                await self._dma_write(address + done, self.mapped.load(address + done, piece))
            except OSError as error:
                raise MemoryFault(f"DMA_WRITE {address + done:#x}: {error.strerror}") from None
            done += piece

    async def read(self, address: int, count_bytes: int) -> bytes:
        await self.pull(address, count_bytes)
        return self.mapped.load(address, count_bytes)

    async def write(self, address: int, data: bytes) -> None:
        self.mapped.store(address, data)
        await self.push(address, len(data))
