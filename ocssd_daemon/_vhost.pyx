# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=False
"""Facade of the vhost-user-blk hot path: VhostDevice. The contract is documented in _vhost.pyi.

Owns the border between Python and native/vhost*.pxd: takes the reactor's lock, converts values, turns refusals into
ValueError. The headers under native/ own everything else.
"""

import os
import struct

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from ocssd_daemon._fast cimport Disk, Reactor
from ocssd_daemon.native cimport chain, vblk, vhost_rings
from ocssd_daemon.native.gmem cimport gmem_poisoned
from ocssd_daemon.native.reactor cimport reactor_add, reactor_lock, reactor_unlock
from ocssd_daemon.native.vhost cimport vhost_arm, vhost_disarm, vhost_poll, vhost_queue_t, vhost_relist, vhost_t
from ocssd_daemon.native.vhost_setup cimport (
    MEMORY_REGIONS, vhost_break_unmapped, vhost_close, vhost_inflight_bytes, vhost_inflight_refusal,
    vhost_inflight_set, vhost_init, vhost_log_base, vhost_mem_add, vhost_mem_remove, vhost_mem_reset, vhost_reset,
    vhost_set_features, vhost_stop, vhost_vring_addr, vhost_vring_base, vhost_vring_call, vhost_vring_err,
    vhost_vring_kick, vhost_vring_num,
)

MAX_MEMORY_REGIONS = MEMORY_REGIONS
VHOST_F_LOG_ALL = 1 << vhost_rings.VHOST_F_LOG_ALL
VHOST_USER_F_PROTOCOL_FEATURES = 1 << vhost_rings.VHOST_USER_F_PROTOCOL_FEATURES
CONFIG_WCE_OFFSET = 32
FAULT_MEMORY_LOST = chain.FAULT_MEMORY_LOST

# Sentences for the faults of native/chain.pxd.
_FAULTS = {
    chain.FAULT_AVAIL_JUMP: "more is available than the ring holds",
    chain.FAULT_HEAD_RANGE: "a head index or buffer id is outside the ring",
    chain.FAULT_NEXT_RANGE: "a next index is outside its table",
    chain.FAULT_CHAIN_LOOP: "a descriptor chain loops",
    chain.FAULT_CHAIN_LONG: "a descriptor chain is too long",
    chain.FAULT_DUPLICATE: "a buffer was made available again before it was used",
    chain.FAULT_ORDER: "a readable descriptor follows a writable one",
    chain.FAULT_NO_STATUS: "a request has no writable status byte",
    chain.FAULT_INDIRECT: "an indirect descriptor is malformed",
    chain.FAULT_PACKED_FLAGS: "a descriptor is marked used before it was available",
    chain.FAULT_UNMAPPED: "the ring is not in guest memory",
    chain.FAULT_INFLIGHT: "the in-flight region does not fit the ring",
    chain.FAULT_BASE: "the base index does not fit the ring",
    chain.FAULT_MEMORY: "the ring's memory was removed",
    chain.FAULT_MEMORY_LOST: "a memory file was truncated",
}

_VIRTIO = (vhost_rings.VIRTIO_F_VERSION_1, vhost_rings.VIRTIO_F_INDIRECT_DESC, vhost_rings.VIRTIO_F_EVENT_IDX,
           vhost_rings.VIRTIO_F_RING_PACKED, vhost_rings.VIRTIO_F_RING_RESET, vhost_rings.VHOST_F_LOG_ALL)
_BLOCK = (vblk.VIRTIO_BLK_F_SEG_MAX, vblk.VIRTIO_BLK_F_BLK_SIZE, vblk.VIRTIO_BLK_F_FLUSH, vblk.VIRTIO_BLK_F_TOPOLOGY,
          vblk.VIRTIO_BLK_F_CONFIG_WCE)
_BLOCK_WRITABLE = (vblk.VIRTIO_BLK_F_DISCARD, vblk.VIRTIO_BLK_F_WRITE_ZEROES)

# virtio_blk_config (virtio 1.3, 5.2.4) up to write_zeroes_may_unmap.
_CONFIG = struct.Struct("<Q II HBB I BBHI BBH III II B 3x")


@cython.no_gc_clear         # __dealloc__ needs the reactor, also at the end of a cycle
cdef class VhostDevice:
    cdef vhost_t *dev
    cdef readonly Disk disk
    cdef readonly Reactor reactor
    cdef readonly int num_queues

    def __cinit__(self, Disk disk, Reactor reactor, int num_queues, str serial, uint64_t token, *, bint attach=True):
        if not 1 <= num_queues <= 1024:
            raise ValueError(f"num_queues = {num_queues}: must be in 1..1024")
        self.disk = disk
        self.reactor = reactor
        self.num_queues = num_queues
        self.dev = <vhost_t *>calloc(1, sizeof(vhost_t))
        if self.dev == NULL or not vhost_init(self.dev, &disk.d, &reactor.r, num_queues, token):
            raise MemoryError
        cdef bytes name = serial.encode("ascii", "replace")[:vblk.VBLK_ID_BYTES].ljust(vblk.VBLK_ID_BYTES, b"\0")
        memcpy(self.dev.blk.id, <const char *>name, vblk.VBLK_ID_BYTES)
        if attach:
            self._lock()
            reactor_add(&reactor.r, &self.dev.source)
            self._unlock()

    def __dealloc__(self):
        if self.dev != NULL:
            self.close()

    cdef int _check_open(self) except -1:
        if self.dev == NULL:
            raise ValueError("the device is closed")
        return 0

    cdef int _lock(self) except -1:
        self._check_open()
        with nogil:
            reactor_lock(self.dev.reactor)
        return 0

    cdef void _unlock(self) noexcept:
        reactor_unlock(self.dev.reactor)

    cdef int _answer(self, const char *refusal) except -1:
        """Give the lock back; a refusal becomes a ValueError."""
        self._unlock()
        if refusal != NULL:
            raise ValueError((<bytes>refusal).decode())
        return 0

    cdef vhost_queue_t *_queue(self, index) except NULL:
        """The queue, with the lock taken."""
        if not 0 <= index < self.num_queues:
            raise ValueError(f"ring {index} does not exist (there are {self.num_queues})")
        self._lock()
        return &self.dev.queues[<int>index]

    # ---- features and configuration ------------------------------------------------------------------------------

    @property
    def device_features(self):
        self._check_open()
        bits = _VIRTIO + _BLOCK
        bits += (vblk.VIRTIO_BLK_F_RO,) if self.dev.blk.read_only else _BLOCK_WRITABLE
        if self.num_queues > 1:
            bits += (vblk.VIRTIO_BLK_F_MQ,)
        return sum(1 << bit for bit in bits)

    def set_features(self, uint64_t features):
        cdef uint64_t offered = self.device_features
        self._lock()
        self._answer(vhost_set_features(self.dev, features, offered))

    def config(self):
        self._check_open()
        cdef uint32_t block_bytes = self.disk.d.block_bytes
        cdef uint32_t blocks_per_sector = self.disk.d.sector_bytes // block_bytes
        cdef bint writable = not self.dev.blk.read_only
        sectors = vblk.VBLK_RANGE_SECTORS if writable else 0
        ranges = vblk.VBLK_RANGES if writable else 0
        return _CONFIG.pack(
            self.disk.d.size_bytes >> 9,
            0, vblk.VBLK_SEG_MAX,
            0, 0, 0,                                                    # geometry: not offered
            block_bytes,
            blocks_per_sector.bit_length() - 1, 0, blocks_per_sector, blocks_per_sector,
            self.dev.blk.writeback, 0, self.num_queues,
            sectors, ranges, self.disk.d.sector_bytes >> 9,
            sectors, ranges,
            writable,
        )

    def set_wce(self, int wce):
        if wce not in (0, 1):
            raise ValueError(f"wce = {wce}: must be 0 or 1")
        self._lock()
        self.dev.blk.writeback = wce
        self._unlock()

    def set_read_only(self, bint read_only):
        self._lock()
        self.dev.blk.read_only = read_only or self.disk.d.read_only
        self._unlock()

    def set_gpa_addresses(self, bint gpa_addresses):
        self._lock()
        self.dev.gpa_addresses = gpa_addresses
        self._unlock()

    # ---- memory --------------------------------------------------------------------------------------------------

    def mem_reset(self):
        self._lock()
        with nogil:
            vhost_mem_reset(self.dev)
        self._unlock()

    def mem_add(self, uint64_t gpa, uint64_t size, uint64_t user_addr, uint64_t mmap_offset, int fd):
        cdef const char *refusal
        self._lock()
        with nogil:
            refusal = vhost_mem_add(self.dev, gpa, size, user_addr, mmap_offset, fd)
        self._answer(refusal)

    def mem_remove(self, uint64_t gpa, uint64_t size, uint64_t user_addr):
        cdef const char *refusal
        self._lock()
        with nogil:
            refusal = vhost_mem_remove(self.dev, gpa, size, user_addr)
        self._answer(refusal)

    def mem_commit(self):
        self._lock()
        vhost_break_unmapped(self.dev)
        self._unlock()

    # ---- rings ---------------------------------------------------------------------------------------------------

    def vring_num(self, index, uint64_t num):
        cdef vhost_queue_t *queue = self._queue(index)
        self._answer(vhost_vring_num(self.dev, queue, num))

    def vring_addr(self, index, uint32_t flags, uint64_t desc, uint64_t used, uint64_t avail, uint64_t log):
        cdef vhost_queue_t *queue = self._queue(index)
        cdef const char *refusal
        with nogil:
            refusal = vhost_vring_addr(self.dev, queue, flags, desc, used, avail, log)
        self._answer(refusal)

    def vring_base(self, index, uint64_t value):
        cdef vhost_queue_t *queue = self._queue(index)
        self._answer(vhost_vring_base(self.dev, queue, value))

    def vring_get_base(self, index):
        cdef vhost_queue_t *queue = self._queue(index)
        with nogil:
            vhost_stop(self.dev, queue)
        cdef uint32_t base = queue.base
        self._unlock()
        return base

    def vring_kick(self, index, int fd):
        cdef vhost_queue_t *queue = self._queue(index)
        cdef const char *refusal
        with nogil:
            refusal = vhost_vring_kick(self.dev, queue, fd)
        self._answer(refusal)

    def vring_call(self, index, int fd):
        cdef vhost_queue_t *queue = self._queue(index)
        self._answer(vhost_vring_call(self.dev, queue, fd))

    def vring_err(self, index, int fd):
        cdef vhost_queue_t *queue = self._queue(index)
        self._answer(vhost_vring_err(self.dev, queue, fd))

    def vring_enable(self, index, bint enable):
        cdef vhost_queue_t *queue = self._queue(index)
        queue.enabled = enable
        vhost_relist(self.dev)
        self._unlock()

    # ---- dirty log and in-flight region --------------------------------------------------------------------------

    def log_base(self, int fd, uint64_t size, uint64_t offset):
        self._lock()
        self._answer(vhost_log_base(self.dev, fd, size, offset))

    def inflight_get(self, uint64_t num_queues, uint64_t queue_size):
        self._lock()
        cdef const char *refusal = vhost_inflight_refusal(self.dev, num_queues, queue_size)
        cdef uint64_t size = 0
        if refusal == NULL:
            size = vhost_inflight_bytes(self.dev, num_queues, queue_size)
        self._answer(refusal)
        fd = os.memfd_create("ocssd-inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return fd, size, 0

    def inflight_set(self, int fd, uint64_t mmap_size, uint64_t offset, uint64_t num_queues, uint64_t queue_size):
        self._lock()
        self._answer(vhost_inflight_set(self.dev, fd, mmap_size, offset, num_queues, queue_size))

    # ---- the whole device ----------------------------------------------------------------------------------------

    def reset_device(self):
        self._lock()
        with nogil:
            vhost_reset(self.dev)
        self._unlock()

    def process(self, int budget):
        cdef int done
        self._lock()
        with nogil:
            done = vhost_poll(&self.dev.source, budget)
        self._unlock()
        return done

    def arm(self):
        self._lock()
        cdef bint work = vhost_arm(&self.dev.source)
        self._unlock()
        return work

    def disarm(self):
        self._lock()
        vhost_disarm(&self.dev.source)
        self._unlock()

    def fault(self, index):
        cdef int fault = self._queue(index).fault
        self._unlock()
        return _FAULTS.get(fault)

    def broken(self, index):
        return self.fault(index) is not None

    @property
    def poisoned(self):
        return self.dev != NULL and gmem_poisoned(&self.dev.memory)

    def stats(self):
        self._lock()
        counters = dict(self.dev.blk.stats)
        counters["signals"] = sum([self.dev.queues[i].ring.signals for i in range(self.num_queues)])
        self._unlock()
        return counters

    def close(self):
        if self.dev == NULL:
            return
        self._lock()
        with nogil:
            vhost_close(self.dev)
        self._unlock()
        free(self.dev)
        self.dev = NULL
