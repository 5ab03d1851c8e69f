# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of the core: argument checks, pointers, ``with nogil`` and nothing else.

The flash (Media), the map over it (Ftl), the block view (Disk) and the loop that serves it (Reactor). The rules live in
``native/*.pxd``. Arrays are numpy views of the store: one state, seen from Python by name and from here by pointer.

Not thread-safe by themselves: whoever changes or reads them while a Reactor runs does so inside ``reactor.paused()``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

import os
import threading

import numpy as np

from ocssd_daemon.native.disk cimport (
    DISK_FUA, DISK_UNMAP, disk_check, disk_discard, disk_extent, disk_flush, disk_read, disk_write, disk_write_zeroes,
)
from ocssd_daemon.native.ftl cimport (
    LINE_CLOSED, LINE_DEAD, LINE_FREE, LINE_OPEN, LINE_PENDING, NO_LINE, NO_PPA,
    VICTIM_COST_BENEFIT, VICTIM_D_CHOICES, VICTIM_FIFO, VICTIM_GREEDY, VICTIM_RANDOM,
    ftl_program_buffers, ftl_trim,
)
from ocssd_daemon.native.gc cimport ftl_commit, ftl_slot, recount_spare, spare_lines
from ocssd_daemon.native.media cimport (
    CHUNK_FAIL_RESET, CHUNK_FAIL_WRITE, CHUNK_OPEN, MEDIA_EARLY_RESET, MEDIA_HIGH_ECC, MEDIA_MULTI_RESET, MEDIA_OK,
    chunk_t, media_copy, media_done_ns, media_read, media_readable, media_reset, media_write,
)
from ocssd_daemon.native.reactor cimport (
    late_bucket_end, reactor_adapt, reactor_caught, reactor_close, reactor_init, reactor_lock, reactor_run, reactor_stop,
    reactor_t, reactor_unlock,
)
from ocssd_daemon.native.recovery cimport RECOVERY_BAD_MAP, RECOVERY_NO_MEMORY, ftl_load_map, ftl_recover
from ocssd_daemon.native.slice cimport short_slices
from ocssd_daemon.native.sys cimport iovec, keep_heap, trim_heap

VICTIMS = {
    "greedy": VICTIM_GREEDY,
    "cost-benefit": VICTIM_COST_BENEFIT,
    "d-choices": VICTIM_D_CHOICES,
    "fifo": VICTIM_FIFO,
    "random": VICTIM_RANDOM,
}

FAULTS = {"write": CHUNK_FAIL_WRITE, "reset": CHUNK_FAIL_RESET}

LINE_STATES = {
    "free": LINE_FREE,
    "open": LINE_OPEN,
    "closed": LINE_CLOSED,
    "pending": LINE_PENDING,
    "dead": LINE_DEAD,
}


cdef void *pointer_of(object array) except? NULL:
    """Address of a contiguous array's data; NULL for an empty one."""
    if array.size == 0:
        return NULL
    if not array.flags["C_CONTIGUOUS"]:
        raise ValueError("array must be contiguous")
    return <void *><uint64_t>array.ctypes.data


cdef const unsigned char[::1] bytes_view(object data, Py_ssize_t expected, str what):
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    if view.shape[0] != expected:
        raise ValueError(f"{what}: {view.shape[0]} bytes, expected {expected}")
    return view


cdef class Media:
    """The flash of one *store* (``nand.store.Store``), with the rules of OCSSD 2.0.

    Status values are NVMe's (SCT << 8 | SC); 0 is success. A ppa is ``chunk_index << sector_bits | sector``.
    """

    def __cinit__(self, store, bint early_reset=True, bint multi_reset=False):
        shape = store.geometry.as_tuple()
        g = &self.m.geometry
        (g.groups, g.pus, g.chunks, g.sectors, g.sector_bytes, g.oob_bytes, g.ws_min, g.ws_opt,
         g.mw_cunits, g.maxoc, g.maxocpu, g.total_pus, g.total_chunks, g.sector_bits) = shape
        self.geometry = store.geometry
        self.store = store
        self.attached = {}
        open_of_pu = np.zeros(g.total_pus, np.uint32)
        self._views = (store.chunks, store.oob, store.data, open_of_pu)
        self.m.chunks = <chunk_t *>pointer_of(store.chunks)
        self.m.oob = <char *>pointer_of(store.oob)
        self.m.data = <char *>pointer_of(store.data)
        self.m.open_of_pu = <uint32_t *>pointer_of(open_of_pu)
        self.m.flags = (MEDIA_EARLY_RESET if early_reset else 0) | (MEDIA_MULTI_RESET if multi_reset else 0)
        self.m.store_fd = store.fd
        self.m.data_offset = store.layout.data.offset
        self.m.oob_offset = store.layout.oob.offset
        self._count_open()

    cdef _count_open(self):
        states = self._views[0]["state"].reshape(self.m.geometry.total_pus, self.m.geometry.chunks)
        self._views[3][:] = (states == CHUNK_OPEN).sum(axis=1)
        self.m.open_total = int(self._views[3].sum())

    @property
    def now_ns(self):
        """Time of the last command. In virtual time it is set before each command."""
        return self.m.now_ns

    @now_ns.setter
    def now_ns(self, uint64_t value):
        self.m.now_ns = value

    @property
    def done_ns(self):
        """When the last command ends; its own time when nothing takes any."""
        return max(self.m.now_ns, media_done_ns(&self.m))

    def recount_open(self):
        """After chunk states were changed from outside: how many chunks are open, for maxoc and maxocpu."""
        self._count_open()

    @property
    def chunks(self):
        """The chunk table: one record per chunk, in chunk-log order (``nand.layout.CHUNK_DTYPE``)."""
        return self._views[0]

    @property
    def early_reset(self):
        """May an OPEN chunk be reset? pblk needs it; the specification's state machine has no such step."""
        return bool(self.m.flags & MEDIA_EARLY_RESET)

    @early_reset.setter
    def early_reset(self, bint allowed):
        self.m.flags = self.m.flags | MEDIA_EARLY_RESET if allowed else self.m.flags & ~<uint32_t>MEDIA_EARLY_RESET

    @property
    def multi_reset(self):
        """May a FREE chunk be reset? (MCCAP bit 1)"""
        return bool(self.m.flags & MEDIA_MULTI_RESET)

    @multi_reset.setter
    def multi_reset(self, bint allowed):
        self.m.flags = self.m.flags | MEDIA_MULTI_RESET if allowed else self.m.flags & ~<uint32_t>MEDIA_MULTI_RESET

    def ppa(self, uint32_t group, uint32_t pu, uint32_t chunk, uint32_t sector=0):
        """Address of a sector by its place. Raises ValueError outside the geometry."""
        g = &self.m.geometry
        if group >= g.groups or pu >= g.pus or chunk >= g.chunks or sector >= g.sectors:
            raise ValueError(f"no sector at group {group}, pu {pu}, chunk {chunk}, sector {sector}")
        return (<uint64_t>((group * g.pus + pu) * g.chunks + chunk) << g.sector_bits) | sector

    def write(self, uint64_t ppa, data, oob=None):
        """Write whole sectors of one chunk from *ppa* on. Returns a status."""
        cdef Py_ssize_t n = memoryview(data).nbytes // self.m.geometry.sector_bytes
        cdef const unsigned char[::1] d = bytes_view(data, n * self.m.geometry.sector_bytes, "data")
        cdef const unsigned char[::1] o
        cdef const char *oob_at = NULL
        if oob is not None:
            o = bytes_view(oob, n * self.m.geometry.oob_bytes, "oob")
            if o.shape[0]:
                oob_at = <const char *>&o[0]
        if n == 0:
            raise ValueError("data: at least one sector")
        return media_write(&self.m, ppa, <uint32_t>n, <const char *>&d[0], oob_at)

    def read(self, uint64_t ppa):
        """One sector: (status, data, oob); data and oob are None unless the status is 0."""
        data = bytearray(self.m.geometry.sector_bytes)
        oob = bytearray(self.m.geometry.oob_bytes)
        cdef unsigned char[::1] d = data
        cdef unsigned char[::1] o = oob
        cdef int status = media_read(&self.m, ppa, <char *>&d[0], <char *>&o[0] if len(oob) else NULL)
        return (status, bytes(data), bytes(oob)) if status in (MEDIA_OK, MEDIA_HIGH_ECC) else (status, None, None)

    def readable(self, uint64_t ppa):
        return bool(media_readable(&self.m, ppa))

    def reset(self, uint32_t chunk):
        """Erase the chunk of this index. Returns a status."""
        return media_reset(&self.m, chunk)

    def copy(self, sources, uint64_t target):
        """Copy sectors at *sources* to consecutive sectors from *target* on. Returns a status."""
        addresses = np.ascontiguousarray(sources, dtype=np.uint64)
        if addresses.size == 0:
            raise ValueError("sources: at least one address")
        return media_copy(&self.m, <const uint64_t *>pointer_of(addresses), target, <uint32_t>addresses.size)

    def arm_fault(self, uint32_t chunk, str what):
        """Make the next program (``write``) or reset (``reset``) of a chunk fail."""
        if chunk >= self.m.geometry.total_chunks:
            raise ValueError(f"chunk {chunk}: there are {self.m.geometry.total_chunks}")
        self.m.chunks[chunk].flags |= <uint8_t>FAULTS[what]

    def stats(self):
        return {
            "sectors_written": self.m.sectors_written,
            "sectors_read": self.m.sectors_read,
            "chunks_reset": self.m.chunks_reset,
            "write_failures": self.m.write_failures,
            "reset_failures": self.m.reset_failures,
            "chunks_open": self.m.open_total,
            "store_full": self.m.store_full,
        }


cdef class Ftl:
    """The host FTL over *pus* (PU numbers, default all) of *media*, offering *capacity_sectors*.

    Starts on what the flash holds: ``load`` after a clean stop, ``recover`` otherwise; one of them must be called first.
    """

    def __cinit__(self, Media media, uint32_t capacity_sectors, *, pus=None, str victim="greedy", int frontiers=2,
                  uint32_t reserve_lines=2, uint32_t d_choices=8, uint32_t wear_spread=16, double settle=0.5,
                  uint64_t seed=1, bint host_durable=False, bint retire=True):
        cdef ftl_t *f = &self.f
        g = &media.m.geometry
        targets = np.arange(g.total_pus, dtype=np.uint32) if pus is None else np.ascontiguousarray(pus, dtype=np.uint32)
        if capacity_sectors > targets.size * g.chunks * g.sectors:
            raise ValueError(f"capacity of {capacity_sectors} sectors is larger than the flash")
        if g.oob_bytes < 16:
            raise ValueError(f"geometry.oob_bytes = {g.oob_bytes}: the FTL needs at least 16")
        if 0 < g.maxocpu < frontiers:
            raise ValueError(f"geometry.maxocpu = {g.maxocpu}: the FTL keeps ftl.frontiers = {frontiers} chunks open per PU")
        if 0 < g.maxoc < frontiers * targets.size:
            raise ValueError(f"geometry.maxoc = {g.maxoc}: the FTL keeps {frontiers * targets.size} chunks open, "
                             f"ftl.frontiers = {frontiers} on each of {targets.size} PUs")
        if host_durable and media.m.data == NULL:
            raise ValueError("durability host needs sector data")
        self.media = media
        f.media = &media.m
        f.capacity_sectors = capacity_sectors
        f.n_pus = targets.size
        f.n_lines = g.chunks
        f.unit = g.ws_opt
        f.words = (g.sectors + 63) // 64
        self._allocate(targets)
        f.user.line = f.gc.line = f.victim = NO_LINE
        f.notify_fd = -1
        f.moved = &f.user if frontiers == 1 else &f.gc
        f.policy = VICTIMS[victim]
        f.reserve_lines = reserve_lines
        f.d_choices = d_choices
        f.wear_spread = wear_spread
        f.settle = settle if victim == "greedy" and frontiers == 2 else 0
        f.rng = seed * 2 + 1
        f.host_durable = host_durable
        f.retire = retire

    cdef _allocate(self, targets):
        cdef ftl_t *f = &self.f
        g = &self.media.m.geometry
        views = {
            "pus": targets,
            "l2p": self.media.store.l2p,
            "valid": np.zeros((g.total_chunks, f.words), np.uint64),
            "line_valid": np.zeros(f.n_lines, np.uint32),
            "line_state": np.zeros(f.n_lines, np.uint8),
            "line_failed": np.zeros(f.n_lines, np.uint8),
            "line_erases": np.zeros(f.n_lines, np.uint32),
            "line_closed_seq": np.zeros(f.n_lines, np.uint64),
            "line_settled_at": np.zeros(f.n_lines, np.uint64),
            "user_chunks": np.zeros(f.n_pus, np.uint32),
            "gc_chunks": np.zeros(f.n_pus, np.uint32),
        }
        self._views = views
        f.pus = <uint32_t *>pointer_of(views["pus"])
        f.l2p = <uint32_t *>pointer_of(views["l2p"])
        f.valid = <uint64_t *>pointer_of(views["valid"])
        f.line_valid = <uint32_t *>pointer_of(views["line_valid"])
        f.line_state = <uint8_t *>pointer_of(views["line_state"])
        f.line_failed = <uint8_t *>pointer_of(views["line_failed"])
        f.line_erases = <uint32_t *>pointer_of(views["line_erases"])
        f.line_closed_seq = <uint64_t *>pointer_of(views["line_closed_seq"])
        f.line_settled_at = <uint64_t *>pointer_of(views["line_settled_at"])
        f.user.chunks = <uint32_t *>pointer_of(views["user_chunks"])
        f.gc.chunks = <uint32_t *>pointer_of(views["gc_chunks"])

    # -- start and stop

    def load(self, uint64_t seq):
        """Start from the L2P as a checkpoint. Raises ValueError when it contradicts itself."""
        cdef int result
        self.f.seq = seq
        with nogil:
            result = ftl_load_map(&self.f)
        if result == RECOVERY_BAD_MAP:
            raise ValueError("the L2P checkpoint points outside the flash or twice at one sector")

    def recover(self, bint trust_trims=True, bint verify_data=False):
        """Rebuild the map from the out-of-band entries. Returns the number of mapped sectors."""
        cdef int result
        with nogil:
            result = ftl_recover(&self.f, trust_trims, verify_data)
        if result == RECOVERY_NO_MEMORY:
            raise MemoryError(f"recovery needs {4 * self.f.capacity_sectors} bytes")
        return self.f.mapped_sectors

    def program_buffers(self):
        """Program everything that is in the write buffers."""
        with nogil:
            ftl_program_buffers(&self.f)

    def recount(self):
        """After chunk states were changed from outside: is there still spare space?"""
        recount_spare(&self.f)
        return not self.f.read_only

    # -- what it does, for tests, benchmarks and simulation

    def random_writes(self, uint64_t sectors, uint64_t seed=1, uint32_t first=0, uint32_t span=0):
        """Write *sectors* random logical sectors of [first, first + span) without moving user data, without the GIL.

        Returns how many were written; fewer only when no space could be made.
        """
        cdef uint64_t done = 0
        cdef uint64_t x = seed * 2685821657736338717u + 1
        cdef uint32_t lba
        cdef uint32_t limit = span if span else self.f.capacity_sectors - first
        if first + <uint64_t>limit > self.f.capacity_sectors:
            raise ValueError(f"range [{first}, {first + limit}) is beyond {self.f.capacity_sectors} sectors")
        with nogil:
            while done < sectors:
                x ^= x << 13
                x ^= x >> 7
                x ^= x << 17
                lba = first + <uint32_t>(((x >> 32) * limit) >> 32)
                if ftl_slot(&self.f) == <uint32_t>NO_PPA:
                    break
                ftl_commit(&self.f, lba)
                done += 1
        return done

    def fill(self, uint32_t first=0, uint32_t sectors=0):
        """Write [first, first + sectors) in order (default: everything), as ``random_writes`` does."""
        cdef uint32_t lba
        cdef uint32_t end = first + (sectors if sectors else self.f.capacity_sectors - first)
        cdef uint64_t done = 0
        if end > self.f.capacity_sectors:
            raise ValueError(f"range ends at {end}, beyond {self.f.capacity_sectors} sectors")
        with nogil:
            for lba in range(first, end):
                if ftl_slot(&self.f) == <uint32_t>NO_PPA:
                    break
                ftl_commit(&self.f, lba)
                done += 1
        return done

    def notify(self, int fd):
        """Signal the eventfd *fd* when the disk becomes read-only; -1: none."""
        self.f.notify_fd = fd

    def trim(self, uint32_t lba, uint32_t n):
        if <uint64_t>lba + n > self.f.capacity_sectors:
            raise ValueError(f"range ends at {lba + n}, beyond {self.f.capacity_sectors} sectors")
        with nogil:
            ftl_trim(&self.f, lba, n)

    @property
    def arrays(self):
        """The FTL's state by name: l2p (ppa + 1, 0 unmapped), valid, line_valid, line_state, line_erases, ..."""
        return dict(self._views)

    @property
    def capacity_sectors(self):
        return self.f.capacity_sectors

    @property
    def seq(self):
        return self.f.seq

    @property
    def read_only(self):
        """True once spare space has ended: writes fail, reads go on."""
        return bool(self.f.read_only)

    @property
    def spare_lines(self):
        """Lines that must exist besides the data."""
        return spare_lines(&self.f)

    COUNTERS = (
        "user_sectors_written", "user_sectors_read", "user_sectors_trimmed", "gc_sectors_moved", "padded_sectors",
        "gc_runs", "wear_runs", "stalls", "chunks_failed", "chunks_erased", "flushes", "recovered_sectors",
        "lost_sectors",
    )

    def stats(self):
        """Counters since the image was made, and the present state. Sectors unless the name says otherwise."""
        cdef ftl_t *f = &self.f
        states = np.bincount(self._views["line_state"], minlength=len(LINE_STATES))
        flash = f.user_sectors_written + f.gc_sectors_moved + f.padded_sectors
        return {
            "capacity_sectors": f.capacity_sectors,
            "mapped_sectors": f.mapped_sectors,
            "user_sectors_written": f.user_sectors_written,
            "user_sectors_read": f.user_sectors_read,
            "user_sectors_trimmed": f.user_sectors_trimmed,
            "gc_sectors_moved": f.gc_sectors_moved,
            "padded_sectors": f.padded_sectors,
            "flash_sectors_written": flash,
            "waf": flash / f.user_sectors_written if f.user_sectors_written else 0.0,
            "gc_runs": f.gc_runs,
            "wear_runs": f.wear_runs,
            "stalls": f.stalls,
            "chunks_failed": f.chunks_failed,
            "chunks_erased": f.chunks_erased,
            "flushes": f.flushes,
            "recovered_sectors": f.recovered_sectors,
            "lines_refreshed": f.lines_refreshed,
            "chunks_retired": f.chunks_retired,
            "lost_sectors": f.lost_sectors,
            "read_failures": f.read_failures,
            "read_only": bool(f.read_only),
            "lines": {name: int(states[value]) for name, value in LINE_STATES.items()},
        }

    def restore_counters(self, dict counters):
        """Go on counting where an image was left."""
        cdef ftl_t *f = &self.f
        f.user_sectors_written = counters.get("user_sectors_written", 0)
        f.user_sectors_read = counters.get("user_sectors_read", 0)
        f.user_sectors_trimmed = counters.get("user_sectors_trimmed", 0)
        f.gc_sectors_moved = counters.get("gc_sectors_moved", 0)
        f.padded_sectors = counters.get("padded_sectors", 0)
        f.gc_runs = counters.get("gc_runs", 0)
        f.wear_runs = counters.get("wear_runs", 0)
        f.stalls = counters.get("stalls", 0)
        f.chunks_failed = counters.get("chunks_failed", 0)
        f.chunks_erased = counters.get("chunks_erased", 0)
        f.flushes = counters.get("flushes", 0)
        f.recovered_sectors = counters.get("recovered_sectors", 0)
        f.lost_sectors = counters.get("lost_sectors", 0)


cdef class Disk:
    """The block view of *ftl* in blocks of *block_bytes* (512 to the sector size). Methods return 0 or an errno."""

    def __cinit__(self, Ftl ftl, uint32_t block_bytes=512, bint read_only=False):
        cdef uint32_t sector_bytes = ftl.media.m.geometry.sector_bytes
        if block_bytes < 512 or block_bytes & (block_bytes - 1) or block_bytes > sector_bytes:
            raise ValueError(f"ftl.block_bytes = {block_bytes}: must be a power of two from 512 to {sector_bytes}")
        self.ftl = ftl
        memset(&self.d, 0, sizeof(self.d))
        self.d.ftl = &ftl.f
        self.d.block_bytes = block_bytes
        self.d.sector_bytes = sector_bytes
        self.d.sector_shift = sector_bytes.bit_length() - 1
        self.d.size_bytes = <uint64_t>ftl.f.capacity_sectors << self.d.sector_shift
        self.d.read_only = read_only

    @property
    def size_bytes(self):
        return self.d.size_bytes

    @property
    def block_bytes(self):
        return self.d.block_bytes

    @property
    def sector_bytes(self):
        return self.d.sector_bytes

    @property
    def read_only(self):
        return bool(self.d.read_only)

    @property
    def done_at_ns(self):
        """When the last request ends; 0: at once."""
        return self.d.done_at_ns

    cdef _need_data(self):
        if self.ftl.media.m.data == NULL:
            raise ValueError("this disk keeps no data")

    def read(self, uint64_t offset, uint64_t length):
        """*length* bytes at *offset*. Raises OSError with the errno."""
        data = bytearray(length)
        cdef unsigned char[::1] view = data
        cdef iovec iov
        cdef int failed
        self._need_data()
        if length == 0:
            return b""
        iov.iov_base = &view[0]
        iov.iov_len = length
        with nogil:
            failed = disk_read(&self.d, offset, &iov, 1, length)
        if failed:
            raise OSError(failed, os.strerror(failed))
        return bytes(data)

    def write(self, uint64_t offset, data, bint fua=False):
        """Write *data* at *offset*. Returns 0 or an errno."""
        cdef const unsigned char[::1] view = memoryview(data).cast("B")
        cdef iovec iov
        cdef uint64_t length = view.shape[0]
        cdef int failed
        self._need_data()
        if length == 0:
            return disk_check(&self.d, offset, 0)
        iov.iov_base = <void *>&view[0]
        iov.iov_len = length
        with nogil:
            failed = disk_write(&self.d, offset, &iov, 1, length, DISK_FUA if fua else 0)
        return failed

    def flush(self):
        cdef int failed
        with nogil:
            failed = disk_flush(&self.d)
        return failed

    def discard(self, uint64_t offset, uint64_t length):
        cdef int failed
        with nogil:
            failed = disk_discard(&self.d, offset, length)
        return failed

    def write_zeroes(self, uint64_t offset, uint64_t length, bint unmap=True):
        cdef int failed
        self._need_data()
        with nogil:
            failed = disk_write_zeroes(&self.d, offset, length, DISK_UNMAP if unmap else 0)
        return failed

    def extent(self, uint64_t offset, uint64_t end):
        """(mapped, length in bytes) of the run at *offset*, looking at a bounded number of sectors."""
        cdef uint64_t length = 0
        if end > self.d.size_bytes or offset >= end:
            raise ValueError(f"range [{offset}, {end}) is not inside {self.d.size_bytes} bytes")
        return bool(disk_extent(&self.d, offset, end, &length)), length


cdef uint64_t late_below(const reactor_t *r, uint64_t percent):
    """Upper bound of that percentile of completions' lateness: the end of its histogram bucket, at most a quarter above."""
    cdef uint64_t seen = 0
    cdef uint32_t bucket
    for bucket in range(252):
        seen += r.late_hist[bucket]
        if seen and seen * 100 >= percent * r.late_count:
            return min(r.late_max_ns, late_bucket_end(bucket) - 1)
    return 0


cdef class _Paused:
    """Holds the reactor's lock for a ``with`` block."""

    cdef Reactor reactor

    def __init__(self, Reactor reactor):
        self.reactor = reactor

    def __enter__(self):
        with nogil:
            reactor_lock(&self.reactor.r)

    def __exit__(self, *exc):
        with nogil:
            reactor_unlock(&self.reactor.r)


def give_back_memory():
    """Have the C library return what the start has freed."""
    trim_heap()


cdef enum:
    SLICE_NS = 100000       # the shortest that Linux grants


cdef class Reactor:
    """The loop. ``run`` blocks without the GIL until ``stop``; give it a thread of its own.

    *poll_us*: longest time to spin after work before sleeping; 0 sleeps at once.
    """

    def __cinit__(self, uint64_t poll_us=50):
        keep_heap()
        cdef int failed = reactor_init(&self.r, poll_us * 1000)
        if failed:
            raise OSError(failed, os.strerror(failed))
        self.open = True

    def __dealloc__(self):
        if self.open:
            reactor_close(&self.r)

    def run(self):
        with nogil:
            short_slices(SLICE_NS)
            reactor_run(&self.r)

    def start(self):
        """Run in a new thread named ``reactor``; returns it."""
        thread = threading.Thread(target=self.run, name="reactor")
        thread.start()
        return thread

    def stop(self):
        reactor_stop(&self.r)

    @property
    def turn(self):
        """Number of the turn that is being made; None while the loop sleeps. Looked at without the lock."""
        return None if self.r.sleeping else self.r.turns

    def follow(self, Media media):
        """Let completions follow what suspends the programs of *media* that they wait for. The media must outlive the loop."""
        self.media = media
        with self.paused():
            self.r.timing = &media.m.timing

    def paused(self):
        """Context manager: the loop stands still, and shared state may be looked at and changed."""
        return _Paused(self)

    @property
    def event_fd(self):
        """Readable when ``events`` has something."""
        return self.r.event_fd

    def events(self):
        """Take the queued reports: a list of (token, code)."""
        cdef list taken = []
        try:
            os.eventfd_read(self.r.event_fd)
        except BlockingIOError:
            pass
        with self.paused():
            while self.r.reports_tail != self.r.reports_head:
                i = self.r.reports_tail % 1024
                taken.append((self.r.reports[i].token, self.r.reports[i].code))
                self.r.reports_tail += 1
        return taken

    def stats(self):
        return {
            "turns": self.r.turns,
            "sleeps": self.r.sleeps,
            "wakeups_by_fd": self.r.wakeups_by_fd,
            "poll_ns": self.r.poll_ns,
            "poll_max_ns": self.r.poll_max_ns,
            "deferred": self.r.heap_len,
            "reports_dropped": self.r.reports_dropped,
            "early_ns": self.r.early_ns,
            "late_count": self.r.late_count,
            "late_p50_ns": late_below(&self.r, 50),
            "late_p99_ns": late_below(&self.r, 99),
            "late_max_ns": self.r.late_max_ns,
        }


def poll_times_ns(uint64_t poll_us, idle_ns):
    """How long a loop polls after each of these waits for work, counted from the end of the last work; for tests."""
    cdef reactor_t r
    cdef uint64_t wait
    cdef list found = []
    memset(&r, 0, sizeof(r))
    r.poll_ns = r.poll_max_ns = poll_us * 1000
    r.patience = 1
    for wait in idle_ns:
        if wait < r.poll_ns:
            reactor_caught(&r)
        else:
            reactor_adapt(&r, wait - r.poll_ns)
        found.append(r.poll_ns)
    return found
