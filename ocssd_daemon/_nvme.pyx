# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of the NVMe queues: guest memory, queue pairs, interrupts, namespaces. Arguments in, locks taken, no rules.

What a queue does is in ``native/nvmeq.pxd``, what a command does in ``native/nvme_exec.pxd``; the table of I/O commands is
``install_operations`` below. Every method that touches shared state holds the reactor's lock while it does.
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os

from ocssd_daemon._fast cimport Disk, Media, Reactor
from ocssd_daemon.native.disk cimport disk_discard, disk_flush
from ocssd_daemon.native.gmem cimport (
    gmem_add, gmem_at_write, gmem_clear, gmem_poisoned, gmem_remove,
)
from ocssd_daemon.native.media cimport CHUNK_FREE, CHUNK_OFFLINE, CHUNK_OPEN, chunk_close_early, chunk_t, media_begin, media_reset
from ocssd_daemon.native.nvme_dptr cimport guest_copy_in, guest_copy_out
from ocssd_daemon.native.nvme_exec cimport (
    BROADCAST, COMPARE_BYTES, DATA_FROM_HOST, DATA_NONE, DATA_TO_HOST, ON_20, ON_ALL, ON_RAW,
    check_data_blocks, check_dsm, check_vector_copy, check_vector_data, check_vector_reset, check_vector_write,
    check_write, check_zeroes, check_blocks, execute_row, find_namespace, flush_all, io_t, op_t, raw_copy,
    raw_reset, run_compare, run_flush, run_read, run_write, step_t,
)
from ocssd_daemon.native.nvme_flash cimport (
    KIND_BLOCK, MARK_SHIFT, flash_ns_t, is_foreign, marked_bad,
)
from ocssd_daemon.native.nvme_long cimport (
    jobs_arm, jobs_complete, jobs_disarm, jobs_end, jobs_forget, jobs_poll, jobs_ready, run_blocks, run_dsm,
)
from ocssd_daemon.native.nvme_wire cimport (
    IO_COMPARE, IO_DSM, IO_FLUSH, IO_READ, IO_VECTOR_COPY, IO_VECTOR_READ, IO_VECTOR_RESET, IO_VECTOR_WRITE, IO_VERIFY,
    IO_WRITE, IO_WRITE_ZEROES, NVME_INVALID_OPCODE, NVME_OK, chunk_descriptor_t, cqe_t,
    dsm_range_t, nvme_status_field, sgl_t, sqe_t,
)
from ocssd_daemon.native.nvmeq cimport (
    ERRORS_MAX, NAMESPACES_MAX, NOTICES_MAX, NO_FD, QUEUES_MAX, REGISTERS_BYTES, REPORT_BAD_DOORBELL, REPORT_NOTICE,
    REPORT_QUEUE_LOST, cq_post, cq_room, cq_signal, doorbell_slot, doorbell_take, intx_update, namespace_t, nvmeq_arm,
    nvmeq_complete, nvmeq_disarm, nvmeq_poll, nvmeq_ready, nvmeq_t, outcome_t, run_one, sq_fetch, sq_tail,
)
from ocssd_daemon.native.nvmeq_life cimport (
    cq_create, cq_delete, queues_forget, shadows_start, sq_create, sq_delete,
)
from ocssd_daemon.native.reactor cimport (
    reactor_add, reactor_drain, reactor_remove, reactor_watch,
)
from ocssd_daemon.native.sys cimport eventfd_signal

BAD_DOORBELL, QUEUE_LOST, NOTICE = REPORT_BAD_DOORBELL, REPORT_QUEUE_LOST, REPORT_NOTICE
SQE_BYTES, CQE_BYTES = sizeof(sqe_t), sizeof(cqe_t)


class MemoryFault(Exception):
    """A guest address that is not there, or may not be used that way."""


cdef extern from "sys/epoll.h" nogil:
    uint32_t EPOLLIN


# --- the table of I/O commands -------------------------------------------------------------------------------------

cdef op_t OPS[256]

cdef enum:
    ABORT_REQUESTED = 0x007
    ABORTED_SQ_DELETION = 0x008
    WRITE_FAULT = 0x280
    FORMAT_BYTES = 64 << 20     # of a disk, and
    FORMAT_CHUNKS = 4096        # of flash, that a format discards before it lets the loop go on


cdef void row(int opcode, uint8_t kinds, uint8_t data, step_t check, step_t run) noexcept:
    OPS[opcode].kinds = kinds
    OPS[opcode].data = data
    OPS[opcode].check = check
    OPS[opcode].run = run


cdef void install_operations() noexcept:
    row(IO_FLUSH, ON_ALL, DATA_NONE, NULL, run_flush)
    row(IO_WRITE, ON_ALL, DATA_FROM_HOST, check_write, run_write)
    row(IO_READ, ON_ALL, DATA_TO_HOST, check_data_blocks, run_read)
    row(IO_COMPARE, ON_ALL, DATA_FROM_HOST, check_data_blocks, run_compare)
    row(IO_WRITE_ZEROES, ON_ALL, DATA_NONE, check_zeroes, run_blocks)
    row(IO_DSM, ON_ALL, DATA_FROM_HOST, check_dsm, run_dsm)
    row(IO_VERIFY, ON_ALL, DATA_NONE, check_blocks, run_blocks)
    row(IO_VECTOR_RESET, ON_RAW, DATA_TO_HOST, check_vector_reset, raw_reset)
    row(IO_VECTOR_WRITE, ON_RAW, DATA_FROM_HOST, check_vector_write, run_write)
    row(IO_VECTOR_READ, ON_RAW, DATA_TO_HOST, check_vector_data, run_read)
    row(IO_VECTOR_COPY, ON_20, DATA_NONE, check_vector_copy, raw_copy)


install_operations()


cdef outcome_t execute(nvmeq_t *q, const sqe_t *s) noexcept nogil:
    """One I/O command from its entry to its outcome."""
    cdef io_t io
    cdef outcome_t o
    cdef const op_t *op = &OPS[s.opcode]
    io.q, io.s, io.n, io.first = q, s, 0, 0
    io.data_bytes = io.oob_bytes = io.oob_address = io.result = io.due_ns = 0
    io.vector = io.parked = False
    io.last = True
    if op.run == NULL:
        o.status = NVME_INVALID_OPCODE
    elif s.opcode == IO_FLUSH and s.nsid == <uint32_t>BROADCAST:
        o.status = flush_all(&io)
    else:
        o.status = find_namespace(q, s, &io.ns)
        if o.status == NVME_OK:
            o.status = execute_row(&io, op) if op.kinds >> io.ns.kind & 1 else NVME_INVALID_OPCODE
            q.turn_bytes -= <int64_t>io.data_bytes
    o.parked = io.parked
    o.result = io.result
    o.due_ns = io.due_ns
    return o


def status_field(int status):
    """The 15-bit status field as the queues build it."""
    return nvme_status_field(status)


# --- guest memory --------------------------------------------------------------------------------------------------

cdef class GuestMemory:
    """The guest's memory as far as it was mapped. Changes are made with the reactor's lock held."""

    def __cinit__(self, Reactor reactor):
        memset(&self.g, 0, sizeof(self.g))
        self.reactor = reactor

    def __dealloc__(self):
        gmem_clear(&self.g)

    def map(self, uint64_t address, uint64_t size_bytes, int fd, uint64_t offset_bytes, bint writable):
        """Map [address, address + size); None, or the sentence that says why not. The fd stays the caller's."""
        cdef const char *refusal
        with self.reactor.paused():
            refusal = gmem_add(&self.g, address, size_bytes, 0, offset_bytes, fd, writable)
        return None if refusal == NULL else refusal.decode()

    def overlaps(self, uint64_t address, uint64_t size_bytes):
        cdef uint32_t i
        for i in range(self.g.count):
            if (address - self.g.regions[i].gpa < self.g.regions[i].size_bytes
                    or self.g.regions[i].gpa - address < size_bytes):
                return True
        return False

    def unmap(self, uint64_t address, uint64_t size_bytes):
        """Unmap the regions that lie in the range; False unless they fill it, without cutting one."""
        cdef uint64_t at = address, left = size_bytes
        cdef list found = []
        for start, size in self.regions():
            if start == at and size <= left:
                found.append((start, size))
                at += size
                left -= size
        if left or not found:
            return False
        with self.reactor.paused():
            for start, size in found:
                gmem_remove(&self.g, start, size, 0)
        return True

    def clear(self):
        with self.reactor.paused():
            gmem_clear(&self.g)

    def regions(self):
        return [(self.g.regions[i].gpa, self.g.regions[i].size_bytes) for i in range(self.g.count)]

    @property
    def poisoned(self):
        """True once a file was truncated under us."""
        return bool(gmem_poisoned(&self.g))

    def load(self, uint64_t address, uint64_t count_bytes):
        data = bytearray(count_bytes)
        cdef unsigned char[::1] view = data
        if count_bytes and guest_copy_in(&self.g, address, &view[0], count_bytes) != NVME_OK:
            raise MemoryFault(f"{count_bytes} bytes at {address:#x}")
        return bytes(data)

    def store(self, uint64_t address, const unsigned char[::1] data):
        if data.shape[0] and guest_copy_out(&self.g, address, &data[0], data.shape[0]) != NVME_OK:
            raise MemoryFault(f"{data.shape[0]} bytes at {address:#x}")

    async def read(self, address, count_bytes):
        return self.load(address, count_bytes)

    async def write(self, address, data):
        self.store(address, data)


# --- queues --------------------------------------------------------------------------------------------------------

@cython.no_gc_clear         # __dealloc__ needs the reactor, also at the end of a cycle
cdef class NvmeQueues:
    """Implements ``nvme.ports.Queues``. *doorbells* is writable shared memory for ``queue_pairs + 1`` pairs of doorbells.

    Acquires an eventfd and a place in the reactor; ``close`` gives both back and must be called.
    """

    def __cinit__(self, Reactor reactor, GuestMemory memory, doorbells, uint32_t queue_pairs, *, uint32_t stride=0,
                  bint mapped_doorbells=False, uint64_t max_transfer_bytes=0, uint32_t wear_threshold=0,
                  uint64_t token=0):
        cdef uint32_t i
        cdef unsigned char[::1] page = doorbells
        if queue_pairs + 1 > QUEUES_MAX or page.shape[0] < (queue_pairs + 1) * 2 * (4 << stride):
            raise ValueError(f"queue_pairs = {queue_pairs}: at most {QUEUES_MAX - 1}, and the doorbells must fit")
        self.q = <nvmeq_t *>calloc(1, sizeof(nvmeq_t))
        if self.q == NULL:
            raise MemoryError("NVMe queues")
        self.reactor, self.memory, self.doorbells, self.kept, self.raw = reactor, memory, page, [], {}
        self.q.kick_fd = NO_FD
        self.q.block = <char *>malloc(COMPARE_BYTES)
        if self.q.block == NULL:
            raise MemoryError("NVMe queues")
        self.q.reactor = &reactor.r
        self.q.memory = &memory.g
        self.q.doorbells = <uint32_t *>&page[0]
        self.q.stride_shift = stride
        self.q.queue_count = queue_pairs + 1
        self.q.mapped_doorbells = mapped_doorbells
        self.q.page_bytes = 4096
        self.q.max_transfer_bytes = max_transfer_bytes
        self.q.wear_threshold = wear_threshold
        self.q.intx_fd = NO_FD
        self.q.execute = execute
        for i in range(QUEUES_MAX):
            self.q.vector_fd[i] = NO_FD
        self._join(token)

    cdef _join(self, uint64_t token):
        cdef int failed
        self.q.source.poll = nvmeq_poll
        self.q.source.arm = nvmeq_arm
        self.q.source.disarm = nvmeq_disarm
        self.q.source.ready = nvmeq_ready
        self.q.source.complete = nvmeq_complete
        self.q.source.token = token
        self.q.source.memory_polled = 1
        self.q.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.q.jobs.owner = self.q
        self.q.jobs.source.poll = jobs_poll
        self.q.jobs.source.arm = jobs_arm
        self.q.jobs.source.disarm = jobs_disarm
        self.q.jobs.source.ready = jobs_ready
        self.q.jobs.source.complete = jobs_complete
        self.q.jobs.source.token = token
        with self.reactor.paused():
            failed = reactor_watch(&self.reactor.r, &self.q.source, self.q.kick_fd, EPOLLIN)
            if not failed:
                reactor_add(&self.reactor.r, &self.q.jobs.source)
                reactor_add(&self.reactor.r, &self.q.source)
        if failed:
            os.close(self.q.kick_fd)
            self.q.kick_fd = NO_FD
            raise OSError(failed, os.strerror(failed))

    def close(self):
        if self.q.kick_fd == NO_FD:
            return
        with self.reactor.paused():
            jobs_forget(self.q)
            queues_forget(self.q)
            reactor_remove(&self.reactor.r, &self.q.source)
            reactor_remove(&self.reactor.r, &self.q.jobs.source)
        os.close(self.q.kick_fd)
        self.q.kick_fd = NO_FD
        self.q.doorbells = NULL
        self.doorbells = None           # so that the caller can unmap the page

    def __dealloc__(self):
        if self.q == NULL:
            return
        if self.reactor is not None and self.q.source.attached:
            self.close()                # a session that failed while it was made
        free(self.q.block)
        free(self.q.oob)
        free(self.q.pieces.iov)
        free(self.q)

    # -- namespaces

    def add_block(self, uint32_t nsid, Disk disk, uint64_t base_lbas=0, uint64_t size_lbas=0):
        """A part of *disk*, in its blocks; without a size all of it."""
        cdef namespace_t *ns = &self.q.ns[nsid]
        cdef uint64_t most = disk.d.size_bytes // disk.d.block_bytes
        if base_lbas > most or size_lbas > most - base_lbas:
            raise ValueError(f"blocks {base_lbas} + {size_lbas}: the disk has {most}")
        self.kept.append(disk)
        with self.reactor.paused():
            ns.size_lbas = size_lbas or most - base_lbas
            ns.disk_base_bytes = base_lbas * disk.d.block_bytes
            ns.lba_shift = disk.block_bytes.bit_length() - 1
            ns.read_only = disk.d.read_only
            ns.disk = &disk.d
            ns.kind = KIND_BLOCK

    def add_raw(self, namespace, foreign):
        """A ``nvme.namespaces.RawNamespace``; *foreign* is a uint8 array, one per PU of the device, shared by reference."""
        cdef Media media = namespace.media
        cdef namespace_t *ns = &self.q.ns[<uint32_t>namespace.nsid]
        cdef flash_ns_t *flash = &ns.flash
        cdef unsigned char[::1] owners = foreign
        if media.m.data == NULL:
            raise ValueError("a raw namespace needs flash that keeps its data")
        with self.reactor.paused():
            for i, field in enumerate(namespace.fields):
                flash.fields[i].offset, flash.fields[i].length, flash.fields[i].count = (
                    field.offset, field.length, field.count)
            flash.media = &media.m
            flash.kind = namespace.kind
            flash.fill = 0xff if namespace.dlfeat & 7 == 2 else 0
            flash.chunk_base = namespace.chunk_base
            flash.foreign = &owners[0]
            self.kept += [media, foreign]
            ns.size_lbas = namespace.size_lbas
            ns.lba_shift = namespace.lba_bytes.bit_length() - 1
            ns.read_only = namespace.read_only
            ns.kind = namespace.kind
        self.raw[namespace.nsid] = namespace

    # -- queues (ports.Queues)

    def create_cq(self, shape, uint32_t vector, bint interrupts):
        cdef uint32_t qid = shape.qid
        with self.reactor.paused():
            return bool(cq_create(self.q, qid, shape.address, shape.entries, vector, interrupts))

    def create_sq(self, shape, uint32_t cqid):
        cdef uint32_t qid = shape.qid
        with self.reactor.paused():
            return bool(sq_create(self.q, qid, shape.address, shape.entries, cqid))

    def delete_sq(self, uint32_t qid):
        """Commands in progress complete first; those that go on in pieces are aborted."""
        with self.reactor.paused():
            jobs_end(self.q, qid, -1, ABORTED_SQ_DELETION)
            reactor_drain(&self.reactor.r, &self.q.source)
            sq_delete(self.q, qid)

    def delete_cq(self, uint32_t qid):
        with self.reactor.paused():
            cq_delete(self.q, qid)

    def abort(self, uint32_t sqid, int cid):
        """Commands run as soon as they are fetched: only one that goes on in pieces can still be aborted."""
        with self.reactor.paused():
            return bool(jobs_end(self.q, sqid, cid, ABORT_REQUESTED))

    def reset(self):
        with self.reactor.paused():
            jobs_forget(self.q)
            reactor_drain(&self.reactor.r, &self.q.source)
            queues_forget(self.q)
            memset(self.q.doorbells, 0, self.doorbells.shape[0])

    def flush(self):
        cdef uint32_t i
        with self.reactor.paused():
            for i in range(1, NAMESPACES_MAX + 1):
                if self.q.ns[i].kind == KIND_BLOCK:
                    disk_flush(self.q.ns[i].disk)

    def set_shadow_doorbells(self, uint64_t shadow, uint64_t event_index):
        """False when the pages are not writable guest memory, or the queues are not run by the reactor."""
        with self.reactor.paused():
            if (self.q.by_message or gmem_at_write(self.q.memory, shadow, self.q.page_bytes) == NULL
                    or gmem_at_write(self.q.memory, event_index, self.q.page_bytes) == NULL):
                return False
            self.q.shadow, self.q.event_index = shadow, event_index
            shadows_start(self.q)
            return True

    def set_coalescing(self, uint32_t threshold, uint64_t time_ns):
        with self.reactor.paused():
            self.q.coalesce_threshold, self.q.coalesce_ns = threshold, time_ns

    def set_vector_coalescing(self, uint32_t vector, bint disabled):
        with self.reactor.paused():
            self.q.vector_immediate[vector] = disabled

    def set_dulbe(self, uint32_t nsid, bint enabled):
        with self.reactor.paused():
            self.q.ns[nsid].flash.dulbe = enabled
            self.q.ns[nsid].disk_dulbe = enabled

    def set_media_feedback(self, uint32_t nsid, uint8_t bits):
        with self.reactor.paused():
            self.q.ns[nsid].flash.feedback = bits

    def set_write_cache(self, bint enabled):
        with self.reactor.paused():
            self.q.write_through = not enabled

    def set_interrupt_mask(self, uint32_t mask):
        with self.reactor.paused():
            self.q.interrupt_mask = mask
            intx_update(self.q)

    def set_page_bytes(self, uint64_t page_bytes):
        with self.reactor.paused():
            self.q.page_bytes = page_bytes

    def format(self, uint32_t nsid):
        """Discard everything, piece by piece, so that the loop goes on meanwhile. Returns a status.

        Of flash that is every chunk which holds something; one whose reset fails goes offline, as always. Chunks of
        somebody else's, and ones marked bad, stay as they are.
        """
        cdef namespace_t *ns = &self.q.ns[nsid]
        cdef uint64_t at = 0, size_bytes = ns.size_lbas << ns.lba_shift
        cdef uint64_t n, first, count
        cdef int failed = 0
        if ns.kind == KIND_BLOCK:
            while at < size_bytes and not failed:
                n = min(size_bytes - at, <uint64_t>FORMAT_BYTES)
                with self.reactor.paused():
                    failed = disk_discard(ns.disk, ns.disk_base_bytes + at, n)
                at += n
            return WRITE_FAULT if failed else NVME_OK
        first, count = ns.flash.chunk_base, self.raw[nsid].chunk_count
        while at < count:
            n = min(count - at, <uint64_t>FORMAT_CHUNKS)
            with self.reactor.paused():
                self._format_chunks(&ns.flash, <uint32_t>(first + at), <uint32_t>n)
            at += n
        return NVME_OK

    cdef _format_chunks(self, flash_ns_t *flash, uint32_t first, uint32_t count):
        cdef uint32_t i
        cdef const chunk_t *c
        media_begin(flash.media)
        for i in range(first, first + count):
            c = &flash.media.chunks[i]
            if c.state == CHUNK_OFFLINE or c.state == CHUNK_FREE or is_foreign(flash, i) or marked_bad(flash, i):
                continue
            if c.state == CHUNK_OPEN:
                chunk_close_early(flash.media, i)       # a format may do what a reset without early_reset may not
            media_reset(flash.media, i)

    def mark_blocks(self, namespace, indices, state):
        """Set the bad-block mark of chunks (indices within the namespace)."""
        cdef flash_ns_t *flash = &self.q.ns[<uint32_t>namespace.nsid].flash
        cdef uint32_t at, mark = state
        with self.reactor.paused():
            for index in indices:
                at = flash.chunk_base + <uint32_t>index
                flash.media.chunks[at].flags = <uint8_t>((flash.media.chunks[at].flags & 0x0f) | mark << MARK_SHIFT)

    # -- doorbells and interrupts

    def ring(self, uint32_t offset_bytes, uint32_t value):
        """A trapped write into the doorbell area. Returns the queue identifier, or -1 when there is no such doorbell."""
        cdef int slot = doorbell_slot(self.q, offset_bytes)
        if slot < 0:
            return -1
        doorbell_take(self.q, slot, value)
        if slot >= 2 and not self.q.by_message:
            eventfd_signal(self.q.kick_fd)
        return slot >> 1

    def take_bad_doorbell(self):
        """The report of an invalid doorbell value has been seen; the next one may come."""
        self.q.bad_doorbell = False

    def publish_registers(self, const unsigned char[::1] image):
        """What reads of BAR0 give from now on where the reactor answers them; 64 bytes."""
        if image.shape[0] != REGISTERS_BYTES:
            raise ValueError(f"{image.shape[0]} bytes of registers, not {REGISTERS_BYTES}")
        with self.reactor.paused():
            memcpy(self.q.registers, &image[0], REGISTERS_BYTES)

    def set_msix(self, bint enabled):
        with self.reactor.paused():
            self.q.msix = enabled

    def set_vector(self, uint32_t vector, int fd):
        """Signal *fd* (the caller's, -1 for none) for the vector."""
        with self.reactor.paused():
            self.q.vector_fd[vector] = fd

    def set_intx(self, int fd):
        with self.reactor.paused():
            self.q.intx_fd = fd
            self.q.intx_masked = False
            intx_update(self.q)

    def unmask_intx(self):
        with self.reactor.paused():
            self.q.intx_masked = False
            intx_update(self.q)

    def mask_intx(self):
        with self.reactor.paused():
            self.q.intx_masked = True

    # -- the admin pair

    def admin_place(self):
        """``(address, 64)`` of the next admin entry, or None when there is none or its completion has no room."""
        return self.next_place(0)

    def next_place(self, uint32_t qid):
        with self.reactor.paused():
            if not self.q.sq[qid].active or self.q.sq[qid].head == sq_tail(self.q, qid):
                return None
            if cq_room(self.q, self.q.sq[qid].cqid) == 0:
                return None
            return self.q.sq[qid].address + self.q.sq[qid].head * sizeof(sqe_t), sizeof(sqe_t)

    def admin_fetch(self):
        """The next admin entry, 64 bytes; raises MemoryFault when the queue's memory is gone."""
        cdef sqe_t s
        cdef bint fetched
        with self.reactor.paused():
            fetched = sq_fetch(self.q, 0, &s)
        if not fetched:
            raise MemoryFault("admin submission queue")
        return (<const char *>&s)[:sizeof(sqe_t)]

    def admin_complete(self, uint32_t cid, int status, uint64_t result=0):
        """Post to the admin completion queue; ``(address, 16)`` of the entry. ``signal(0)`` raises the interrupt."""
        cdef bint posted
        with self.reactor.paused():
            if not self.q.cq[0].active:
                return None
            place = self.q.cq[0].address + self.q.cq[0].tail * sizeof(cqe_t)
            posted = cq_post(self.q, 0, 0, cid, status, result)
        return (place, sizeof(cqe_t)) if posted else None

    def signal(self, uint32_t cqid):
        with self.reactor.paused():
            cq_signal(self.q, cqid)

    # -- queues that trio runs, because guest memory is reached by messages only

    @property
    def by_message(self):
        return bool(self.q.by_message)

    @by_message.setter
    def by_message(self, bint value):
        with self.reactor.paused():
            self.q.by_message = value

    def waiting_queues(self):
        """I/O queues with entries to fetch."""
        return [i for i in range(1, self.q.queue_count) if self.q.sq[i].active and self.next_place(i) is not None]

    def cq_places(self, uint32_t sqid):
        """``(cqid, addresses of the next two completions)`` for a submission queue; a fused pair makes two."""
        cqid = self.q.sq[sqid].cqid
        cq = &self.q.cq[cqid]
        if not self.q.sq[sqid].active or not cq.active:
            return cqid, []
        return cqid, [cq.address + (cq.tail + i) % cq.entries * sizeof(cqe_t) for i in range(2)]

    def run_next(self, uint32_t qid):
        """Run the entry at the head of a queue; completions are posted, not signalled. Returns commands served.

        None are when the queue went, or was made anew, since its entry was looked at.
        """
        with self.reactor.paused():
            if not self.q.sq[qid].active or self.q.sq[qid].head == sq_tail(self.q, qid):
                return 0
            return run_one(self.q, qid, sq_tail(self.q, qid))

    # -- logs and numbers

    def counters(self):
        c = &self.q.counters
        return {"requests": c.requests, "errors": c.errors, "bytes_read": c.bytes_read, "bytes_written": c.bytes_written,
                "reads": c.reads, "writes": c.writes, "media_errors": c.media_errors, "doorbells": c.doorbells,
                "interrupts": c.interrupts}

    def error_entries(self):
        """Newest first."""
        cdef uint64_t count = self.q.error_count, i
        found = []
        for i in range(min(count, <uint64_t>ERRORS_MAX)):
            e = &self.q.errors[(count - 1 - i) % ERRORS_MAX]
            found.append({"count": e.count, "sqid": e.sqid, "cid": e.cid, "status": e.status, "nsid": e.nsid, "lba": e.lba})
        return found

    def notifications(self):
        """Oldest first, at most 64."""
        cdef uint64_t count = self.q.notice_count, i, first = count - min(count, <uint64_t>NOTICES_MAX)
        found = []
        for i in range(first, count):
            n = &self.q.notices[i % NOTICES_MAX]
            found.append({"nc": n.nc, "lba": n.lba, "nsid": n.nsid, "state": n.state, "mask": n.mask, "nlb": n.nlb})
        return found

    @property
    def io_opcodes(self):
        """The I/O opcodes that are implemented."""
        return frozenset(i for i in range(256) if OPS[i].run != NULL)


# --- the wire's structs as dicts, for the tests that hold them against the definitions in Python --------------------------

cdef union wire_t:
    sqe_t sqe
    cqe_t cqe
    sgl_t sgl
    dsm_range_t dsm_range
    chunk_descriptor_t chunk_descriptor

WIRE_BYTES = {"sqe": sizeof(sqe_t), "cqe": sizeof(cqe_t), "sgl": sizeof(sgl_t), "dsm_range": sizeof(dsm_range_t),
              "chunk_descriptor": sizeof(chunk_descriptor_t)}


def wire_parse(str name, const unsigned char[::1] raw):
    """The fields of the C struct *name* that lies in *raw*."""
    cdef wire_t w
    if raw.shape[0] != WIRE_BYTES[name]:
        raise ValueError(f"{raw.shape[0]} bytes: a {name} has {WIRE_BYTES[name]}")
    memcpy(&w, &raw[0], raw.shape[0])
    if name == "sqe":
        return w.sqe
    if name == "cqe":
        return w.cqe
    if name == "sgl":
        return w.sgl
    if name == "dsm_range":
        return w.dsm_range
    return w.chunk_descriptor


def wire_build(str name, f):
    """The bytes of the C struct *name* with these fields; what has no name is zero."""
    cdef wire_t w
    memset(&w, 0, sizeof(w))
    if name == "sqe":
        w.sqe = f
    elif name == "cqe":
        w.cqe = f
    elif name == "sgl":
        w.sgl.address, w.sgl.length, w.sgl.identifier = f["address"], f["length"], f["identifier"]
    elif name == "dsm_range":
        w.dsm_range = f
    else:
        w.chunk_descriptor.state, w.chunk_descriptor.type = f["state"], f["type"]
        w.chunk_descriptor.wear_index, w.chunk_descriptor.slba = f["wear_index"], f["slba"]
        w.chunk_descriptor.cnlb, w.chunk_descriptor.wp = f["cnlb"], f["wp"]
    return (<const char *>&w)[:WIRE_BYTES[name]]
