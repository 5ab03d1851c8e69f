"""Owns the queue pairs of one controller as a source of the reactor: fetch, execute, complete, interrupt.

NVM Express Base 1.3, 4.1 (queues), 7.6 (shadow doorbells, in 5.7 and annex B.5), 7.5 (interrupts). Queue memory is looked
up for every entry, so memory that the guest takes away stops a queue instead of the process. Each entry is copied once.

Doorbells live in one shared page: the guest may have it mapped, or trapped register writes are put into it. With shadow
doorbells (DBBUF) the guest writes memory instead, and EventIdx asks for a trapped write only while the loop sleeps.

Queue 0 is the admin pair: its completions and interrupts are handled here, its commands elsewhere (nvme/admin_queue.py).
Everything here runs under the reactor's lock. How queues begin and end is nvmeq_life.pxd's, what a command does is
nvme_exec.pxd's and nvme_flash.pxd's.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.disk cimport disk_prefetch_data, disk_prefetch_map, disk_t
from ocssd_daemon.native.gmem cimport gmem_at, gmem_at_write, gmem_t
from ocssd_daemon.native.nvme_dptr cimport guest_copy_in, pieces_t
from ocssd_daemon.native.nvme_flash cimport flash_ns_t
from ocssd_daemon.native.nvme_job cimport jobs_t
from ocssd_daemon.native.nvme_wire cimport (
    IO_COMPARE, IO_READ, IO_WRITE, NVME_FAILED_FUSED, NVME_INVALID_FIELD, NVME_MISSING_FUSED, NVME_OK,
    cqe_t, nvme_status_field, sqe_nlb, sqe_slba, sqe_t,
)
from ocssd_daemon.native.reactor cimport reactor_defer, reactor_report, reactor_t, source_t
from ocssd_daemon.native.sys cimport (
    eventfd_drain, eventfd_signal, full_fence, load_acquire_u32, now_ns, store_release_u16, store_release_u32,
)

cdef enum:
    QUEUES_MAX = 2048           # queue identifiers, the admin queue included
    NAMESPACES_MAX = 256
    ERRORS_MAX = 64             # entries of the error log
    NOTICES_MAX = 64            # entries of the chunk notification log
    NO_FD = -1
    DOORBELLS_AT = 0x1000       # in BAR0
    REGISTERS_BYTES = 0x40      # of BAR0 that are not zero
    FUSE_NONE = 0
    FUSE_FIRST = 1
    FUSE_SECOND = 2
    QUEUE_TURN = 32             # commands that one queue may run before the next one has its turn
    MAP_AHEAD = 4               # commands
    DATA_AHEAD = 2
    TURN_BYTES = 4 << 20        # moved per poll; the command that exceeds it is the last of the turn

cdef enum:                      # codes of reactor reports
    REPORT_BAD_DOORBELL = 1
    REPORT_QUEUE_LOST = 2       # queue memory is not mapped any more
    REPORT_NOTICE = 3           # the chunk notification log has grown


ctypedef struct sq_t:
    bint active
    uint64_t address
    uint32_t entries
    uint32_t head
    uint32_t cqid

ctypedef struct cq_t:
    bint active
    uint64_t address
    uint32_t entries
    uint32_t head               # as the host last told us
    uint32_t tail
    uint16_t phase
    uint32_t promised           # slots kept for commands whose completion is deferred
    bint interrupts
    uint32_t vector
    uint32_t unsignalled        # completions since the last interrupt
    bint timer                  # the coalescing time is running

ctypedef struct namespace_t:
    uint8_t kind                # KIND_*
    uint64_t size_lbas
    uint32_t lba_shift
    bint read_only
    disk_t *disk                # KIND_BLOCK
    uint64_t disk_base_bytes    # where the namespace begins on it
    bint disk_dulbe
    flash_ns_t flash            # the raw kinds

ctypedef struct error_t:
    uint64_t count
    uint16_t sqid
    uint16_t cid
    int status
    uint32_t nsid
    uint64_t lba

ctypedef struct notice_t:
    uint64_t nc
    uint64_t lba
    uint32_t nsid
    uint16_t state
    uint8_t mask
    uint16_t nlb

ctypedef struct nvme_counters_t:
    uint64_t requests
    uint64_t errors
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t reads
    uint64_t writes
    uint64_t media_errors
    uint64_t doorbells
    uint64_t interrupts

ctypedef struct outcome_t:      # how a command ended
    bint parked                 # it has not: it goes on in pieces (nvme_long.pxd), which complete it
    int status
    uint64_t result             # DW0 and DW1
    uint64_t due_ns             # 0: now

ctypedef struct nvmeq_t:
    source_t source             # first: the reactor hands this back
    reactor_t *reactor
    gmem_t *memory
    uint32_t *doorbells         # shared page; SQ tail of queue i at 2i, CQ head at 2i + 1, times the stride
    uint32_t stride_shift       # in doorbells
    uint32_t queue_count        # identifiers 0 … queue_count - 1
    int kick_fd                 # eventfd: trio has taken a trapped doorbell write
    uint8_t registers[REGISTERS_BYTES]      # what a read of BAR0 gives; trio keeps it up to date
    bint bad_doorbell           # reported, and not yet seen by trio
    bint mapped_doorbells       # the guest writes the page unseen: no sleeping while it has queues
    bint by_message             # guest memory is a copy that trio keeps: it runs the queues (see _nvme.pyx)
    uint64_t shadow             # guest address of the shadow doorbells, 0: none
    uint64_t event_index
    uint64_t page_bytes
    uint64_t max_transfer_bytes     # 0: no limit
    bint write_through          # the volatile write cache is off: every write is FUA
    uint32_t turn               # queue that comes first in the next poll
    uint32_t io_queues          # active I/O submission queues
    int64_t turn_bytes          # what this poll may still move
    sq_t sq[QUEUES_MAX]
    cq_t cq[QUEUES_MAX]
    namespace_t ns[NAMESPACES_MAX + 1]      # by NSID; entry 0 is never used
    # interrupts
    int vector_fd[QUEUES_MAX]
    uint8_t vector_immediate[QUEUES_MAX]    # coalescing is disabled for the vector
    bint msix
    int intx_fd
    bint intx_masked            # signalled and not yet unmasked by the host's VMM
    uint32_t interrupt_mask     # INTMS
    uint32_t coalesce_threshold     # 0's based
    uint64_t coalesce_ns
    # scratch memory of the command in progress
    pieces_t pieces
    char *oob
    uint64_t oob_capacity
    char *block                 # COMPARE reads the disk into it
    # logs and counters
    error_t errors[ERRORS_MAX]
    uint64_t error_count
    notice_t notices[NOTICES_MAX]
    uint64_t notice_count
    uint32_t wear_threshold
    nvme_counters_t counters
    outcome_t (*execute)(nvmeq_t *self, const sqe_t *s) noexcept nogil
    uint32_t running            # submission queue of the command in progress
    jobs_t jobs                 # commands that go on in pieces


# --- doorbells ----------------------------------------------------------------------------------------------------

cdef inline uint32_t *doorbell_at(nvmeq_t *self, uint32_t qid, uint32_t which) noexcept nogil:
    return self.doorbells + ((2 * qid + which) << self.stride_shift)


cdef inline uint32_t *shadow_at(nvmeq_t *self, uint64_t base, uint32_t qid, uint32_t which) noexcept nogil:
    """Place of a shadow doorbell or event index in guest memory, or NULL."""
    return <uint32_t *>gmem_at_write(self.memory, base + ((2 * qid + which) << (2 + self.stride_shift)), 4)


cdef inline uint32_t doorbell_read(nvmeq_t *self, uint32_t qid, uint32_t which, uint32_t before) noexcept nogil:
    """The newest value that the host has given; *before* when it cannot be read now."""
    cdef uint32_t *shadow
    if qid == 0 or self.shadow == 0:
        return load_acquire_u32(doorbell_at(self, qid, which))
    shadow = shadow_at(self, self.shadow, qid, which)
    return load_acquire_u32(shadow) if shadow != NULL else before


cdef inline int doorbell_slot(const nvmeq_t *self, uint64_t offset) noexcept nogil:
    """Which doorbell lies *offset* bytes behind DOORBELLS_AT: 2 × queue, + 1 for its CQ; -1 unless that queue exists."""
    cdef uint64_t slot = offset >> (2 + self.stride_shift), qid = slot >> 1
    if offset & ((4u << self.stride_shift) - 1) or qid >= self.queue_count:
        return -1
    return <int>slot if (self.cq[qid].active if slot & 1 else self.sq[qid].active) else -1


cdef inline void doorbell_take(nvmeq_t *self, int slot, uint32_t value) noexcept nogil:
    """A trapped write of a doorbell. Its value is looked at when the queue is run."""
    self.counters.doorbells += 1
    store_release_u32(doorbell_at(self, slot >> 1, slot & 1), value)


cdef inline void reject_doorbell(nvmeq_t *self, uint32_t qid, uint32_t which, uint32_t good) noexcept nogil:
    """An index that is not in the queue: go on with the last good one. Spec: 5.2, error event.

    A storm of them is one report: the host has to read the log before there is another event.
    """
    if self.shadow == 0 or qid == 0:
        store_release_u32(doorbell_at(self, qid, which), good)
    elif shadow_at(self, self.shadow, qid, which) != NULL:
        store_release_u32(shadow_at(self, self.shadow, qid, which), good)
    if not self.bad_doorbell:
        self.bad_doorbell = True
        reactor_report(self.reactor, &self.source, REPORT_BAD_DOORBELL)


cdef inline uint32_t sq_tail(nvmeq_t *self, uint32_t qid) noexcept nogil:
    cdef uint32_t tail = doorbell_read(self, qid, 0, self.sq[qid].head)
    if tail >= self.sq[qid].entries:
        reject_doorbell(self, qid, 0, self.sq[qid].head)
        return self.sq[qid].head
    return tail


cdef inline void cq_take_head(nvmeq_t *self, uint32_t qid) noexcept nogil:
    """The host may only move its head over entries that were posted."""
    cdef cq_t *cq = &self.cq[qid]
    cdef uint32_t head = doorbell_read(self, qid, 1, cq.head)
    cdef uint32_t posted = (cq.tail + cq.entries - cq.head) % cq.entries
    if head == cq.head:
        return
    if head >= cq.entries or (head + cq.entries - cq.head) % cq.entries > posted:
        reject_doorbell(self, qid, 1, cq.head)
    else:
        cq.head = head


cdef inline uint32_t cq_room(nvmeq_t *self, uint32_t qid) noexcept nogil:
    """Completions that can still be promised; one slot always stays empty."""
    cdef cq_t *cq = &self.cq[qid]
    cq_take_head(self, qid)
    return (cq.head + cq.entries - cq.tail - 1) % cq.entries - cq.promised


# --- interrupts ---------------------------------------------------------------------------------------------------

cdef inline bint intx_pending(nvmeq_t *self) noexcept nogil:
    cdef uint32_t i
    for i in range(self.queue_count):
        if self.cq[i].active and self.cq[i].interrupts and self.cq[i].head != self.cq[i].tail:
            if not self.interrupt_mask >> min(self.cq[i].vector, <uint32_t>31) & 1:
                return True
    return False


cdef inline void intx_update(nvmeq_t *self) noexcept nogil:
    """Level-triggered: raised while a completion waits, and again after each unmask."""
    cdef uint32_t i
    if self.msix or self.intx_fd == NO_FD or self.intx_masked:
        return
    for i in range(self.queue_count):
        if self.cq[i].active:
            cq_take_head(self, i)
    if intx_pending(self):
        self.intx_masked = True
        self.counters.interrupts += 1
        if eventfd_signal(self.intx_fd):
            self.intx_fd = NO_FD


cdef inline void interrupt(nvmeq_t *self, cq_t *cq) noexcept nogil:
    cq.unsignalled = 0
    if not cq.interrupts:
        return
    if not self.msix:
        intx_update(self)
    elif self.vector_fd[cq.vector] != NO_FD:
        self.counters.interrupts += 1
        if eventfd_signal(self.vector_fd[cq.vector]):
            self.vector_fd[cq.vector] = NO_FD


cdef inline void cq_signal(nvmeq_t *self, uint32_t qid) noexcept nogil:
    """Interrupt for what was posted, now or when enough has come together. Spec: 7.5.1.1, coalescing (I/O only)."""
    cdef cq_t *cq = &self.cq[qid]
    if cq.unsignalled == 0:
        return
    if (qid == 0 or self.coalesce_ns == 0 or self.coalesce_threshold == 0 or self.vector_immediate[cq.vector]
            or cq.unsignalled > self.coalesce_threshold):
        interrupt(self, cq)
    elif not cq.timer:
        cq.timer = True
        reactor_defer(self.reactor, &self.source, now_ns() + self.coalesce_ns, TIMER_MARK, qid)


cdef enum:
    TIMER_MARK = 0xffff         # first word of a deferred coalescing timer; no completion has this SQ id


# --- completion ---------------------------------------------------------------------------------------------------

cdef inline bint cq_post(nvmeq_t *self, uint32_t cqid, uint32_t sqid, uint32_t cid, int status, uint64_t result) noexcept nogil:
    """Put one entry at the tail; the phase tag goes in last. False when the queue's memory is gone."""
    cdef cq_t *cq = &self.cq[cqid]
    cdef cqe_t *e = <cqe_t *>gmem_at_write(self.memory, cq.address + cq.tail * sizeof(cqe_t), sizeof(cqe_t))
    if e == NULL:
        reactor_report(self.reactor, &self.source, REPORT_QUEUE_LOST)
        return False
    e.dw0 = <uint32_t>result
    e.dw1 = <uint32_t>(result >> 32)
    e.sqhd = <uint16_t>self.sq[sqid].head
    e.sqid = <uint16_t>sqid
    e.cid = <uint16_t>cid
    store_release_u16(&e.status_phase, <uint16_t>(nvme_status_field(status) << 1 | cq.phase))
    cq.tail += 1
    if cq.tail == cq.entries:
        cq.tail = 0
        cq.phase ^= 1
    cq.unsignalled += 1
    return True


cdef inline void log_error(nvmeq_t *self, uint32_t sqid, const sqe_t *s, int status) noexcept nogil:
    """Spec: 5.14.1.1, error information; newest entry last in the ring."""
    cdef error_t *e = &self.errors[self.error_count % ERRORS_MAX]
    self.error_count += 1
    self.counters.errors += 1
    self.counters.media_errors += (status >> 8) == 2
    e.count = self.error_count
    e.sqid = <uint16_t>sqid
    e.cid = s.cid
    e.status = status
    e.nsid = s.nsid
    e.lba = sqe_slba(s)


cdef inline void finish(nvmeq_t *self, uint32_t sqid, const sqe_t *s, const outcome_t *o) noexcept nogil:
    """Complete now, or when the flash would have been done."""
    cdef uint32_t cqid = self.sq[sqid].cqid
    if o.parked:
        return
    if o.status != NVME_OK:
        log_error(self, sqid, s, o.status)
    if o.due_ns == 0 or self.by_message:
        cq_post(self, cqid, sqid, s.cid, o.status, o.result)
        return
    self.cq[cqid].promised += 1
    reactor_defer(self.reactor, &self.source, o.due_ns,
                  sqid | <uint64_t>s.cid << 16 | <uint64_t>o.status << 32, o.result)


cdef inline void nvmeq_complete(source_t *source, uint64_t a, uint64_t b) noexcept nogil:
    """A deferred completion, or the end of a coalescing time."""
    cdef nvmeq_t *self = <nvmeq_t *>source
    cdef uint32_t sqid = a & 0xffff, cqid
    if sqid == TIMER_MARK:
        self.cq[b].timer = False
        if self.cq[b].active and self.cq[b].unsignalled:
            interrupt(self, &self.cq[b])
        return
    cqid = self.sq[sqid].cqid
    if not self.sq[sqid].active or not self.cq[cqid].active:
        return
    self.cq[cqid].promised -= 1
    if cq_post(self, cqid, sqid, <uint32_t>(a >> 16) & 0xffff, <int>(a >> 32), b):
        cq_signal(self, cqid)


# --- submission ---------------------------------------------------------------------------------------------------

cdef inline bint sq_fetch(nvmeq_t *self, uint32_t qid, sqe_t *s) noexcept nogil:
    """Copy the entry at the head and move on. False when the queue's memory is gone."""
    cdef sq_t *sq = &self.sq[qid]
    if guest_copy_in(self.memory, sq.address + sq.head * sizeof(sqe_t), s, sizeof(sqe_t)) != NVME_OK:
        reactor_report(self.reactor, &self.source, REPORT_QUEUE_LOST)
        return False
    sq.head += 1
    if sq.head == sq.entries:
        sq.head = 0
    return True


cdef inline outcome_t outcome_of(int status) noexcept nogil:
    cdef outcome_t o
    o.parked = False
    o.status = status
    o.result = 0
    o.due_ns = 0
    return o


cdef inline bint fused_pair(const sqe_t *first, const sqe_t *second) noexcept nogil:
    """Compare, then Write, of the same blocks. Spec: 6.2, fused operation."""
    return (first.opcode == IO_COMPARE and second.opcode == IO_WRITE and first.nsid == second.nsid
            and sqe_slba(first) == sqe_slba(second) and sqe_nlb(first) == sqe_nlb(second))


cdef inline int run_fused(nvmeq_t *self, uint32_t qid, const sqe_t *first, uint32_t tail) noexcept nogil:
    """The first command of a pair is fetched; take the second and run both, or neither. Returns commands served."""
    cdef sqe_t second
    cdef outcome_t compared, written
    cdef uint32_t head = self.sq[qid].head
    if head == tail or cq_room(self, self.sq[qid].cqid) < 2 or not sq_fetch(self, qid, &second):
        compared = outcome_of(NVME_MISSING_FUSED)
        finish(self, qid, first, &compared)
        return 1
    if (second.flags & 3) != FUSE_SECOND:
        self.sq[qid].head = head
        compared = outcome_of(NVME_MISSING_FUSED)
        finish(self, qid, first, &compared)
        return 1
    compared = outcome_of(NVME_INVALID_FIELD)
    if fused_pair(first, &second):
        compared = self.execute(self, first)
    written = self.execute(self, &second) if compared.status == NVME_OK else outcome_of(NVME_FAILED_FUSED)
    finish(self, qid, first, &compared)
    finish(self, qid, &second, &written)
    return 2


cdef inline int run_one(nvmeq_t *self, uint32_t qid, uint32_t tail) noexcept nogil:
    """Serve the entry at the head of *qid*. Returns commands served, 0 when the queue cannot go on."""
    cdef sqe_t s
    cdef outcome_t o
    cdef uint32_t fuse
    if not sq_fetch(self, qid, &s):
        return 0
    self.counters.requests += 1
    self.running = qid
    fuse = s.flags & 3
    if fuse == FUSE_FIRST:
        return run_fused(self, qid, &s, tail)
    o = self.execute(self, &s) if fuse == FUSE_NONE else outcome_of(
        NVME_MISSING_FUSED if fuse == FUSE_SECOND else NVME_INVALID_FIELD)
    finish(self, qid, &s, &o)
    return 1


cdef inline const disk_t *look_at(nvmeq_t *self, const sq_t *sq, uint32_t ahead, uint8_t *opcode, uint64_t *offset) noexcept nogil:
    """The disk, and the place on it, that the entry *ahead* of the head is about; NULL when it is about none."""
    cdef uint32_t index = (sq.head + ahead) % sq.entries, nsid
    cdef const sqe_t *s = <const sqe_t *>gmem_at(self.memory, sq.address + index * sizeof(sqe_t), sizeof(sqe_t))
    if s == NULL:
        return NULL
    nsid = load_acquire_u32(&s.nsid)        # once: it is the guest's memory
    opcode[0] = s.opcode
    if nsid > NAMESPACES_MAX or self.ns[nsid].disk == NULL:
        return NULL
    offset[0] = self.ns[nsid].disk_base_bytes + (sqe_slba(s) << self.ns[nsid].lba_shift)
    return self.ns[nsid].disk


cdef inline void look_ahead(nvmeq_t *self, const sq_t *sq, uint32_t waiting) noexcept nogil:
    """Bring into the cache what later commands will need: their map entries first, nearer to their turn the data.

    Only hints: an entry is looked at without being taken, and whatever it says, a wrong line is warmed at worst.
    """
    cdef const disk_t *disk
    cdef uint8_t opcode = 0
    cdef uint64_t offset = 0
    if waiting > MAP_AHEAD:
        disk = look_at(self, sq, MAP_AHEAD, &opcode, &offset)
        if disk != NULL and (opcode == IO_READ or opcode == IO_WRITE):
            disk_prefetch_map(disk, offset)
    if waiting > DATA_AHEAD:
        disk = look_at(self, sq, DATA_AHEAD, &opcode, &offset)
        if disk != NULL and opcode == IO_READ:
            disk_prefetch_data(disk, offset)


cdef inline int run_queue(nvmeq_t *self, uint32_t qid, int budget) noexcept nogil:
    """Up to *budget* commands of one queue, then its interrupt.

    One for all of them: half way through, as the virtqueues do it, would wake the host twice, because nothing tells us
    that it is awake already (measured: twice the wake-ups, and a fifth more CPU time for each command).
    """
    cdef sq_t *sq = &self.sq[qid]
    cdef uint32_t tail = sq_tail(self, qid)
    cdef int done = 0, served
    if sq.head == tail:
        return 0
    while sq.head != tail and done < budget and self.turn_bytes > 0 and cq_room(self, sq.cqid) > 0:
        look_ahead(self, sq, (tail + sq.entries - sq.head) % sq.entries)
        served = run_one(self, qid, tail)
        if served == 0:
            break
        done += served
    if done:
        cq_signal(self, sq.cqid)
    return done


# --- the source ---------------------------------------------------------------------------------------------------

cdef inline int nvmeq_poll(source_t *source, int budget) noexcept nogil:
    cdef nvmeq_t *self = <nvmeq_t *>source
    cdef int done = 0, n
    cdef uint32_t _, qid
    source.more = 0
    if self.io_queues == 0 or self.by_message:
        return 0
    qid = self.turn
    self.turn_bytes = TURN_BYTES
    for _ in range(self.queue_count):
        qid += 1
        if qid >= self.queue_count:
            qid = 1
        if self.sq[qid].active and done < budget:
            n = run_queue(self, qid, min(budget - done, <int>QUEUE_TURN))
            done += n
            if n:
                self.turn = qid
    if done >= budget or self.turn_bytes <= 0:
        source.more = 1
    return done


cdef inline bint queue_waits(nvmeq_t *self, uint32_t qid) noexcept nogil:
    return self.sq[qid].head != sq_tail(self, qid) and cq_room(self, self.sq[qid].cqid) > 0


cdef inline void ask_for_event(nvmeq_t *self, uint32_t qid, uint32_t which, uint32_t index) noexcept nogil:
    cdef uint32_t *place = shadow_at(self, self.event_index, qid, which)
    if place != NULL:
        store_release_u32(place, index)


cdef inline void ask_for_events(nvmeq_t *self, uint32_t qid) noexcept nogil:
    """Ask for a doorbell write at the next command, and if the CQ is full, at the next entry that is taken from it.

    Any other move of a CQ head changes nothing for us, and to trap it would double the guest's exits.
    """
    cdef uint32_t cqid = self.sq[qid].cqid
    ask_for_event(self, qid, 0, self.sq[qid].head)
    if cq_room(self, cqid) == 0:
        ask_for_event(self, cqid, 1, self.cq[cqid].head)


cdef inline int nvmeq_arm(source_t *source) noexcept nogil:
    """Before sleeping: the host must ring for the next command, and for a completion queue that is full."""
    cdef nvmeq_t *self = <nvmeq_t *>source
    cdef uint32_t qid
    if self.io_queues == 0 or self.by_message:
        return 0
    if self.mapped_doorbells and self.shadow == 0:
        return 1
    if self.shadow:
        for qid in range(1, self.queue_count):
            if self.sq[qid].active:
                ask_for_events(self, qid)
        full_fence()
    for qid in range(1, self.queue_count):
        if self.sq[qid].active and queue_waits(self, qid):
            return 1
    return 0


cdef inline void nvmeq_disarm(source_t *source) noexcept nogil:
    pass


cdef inline void nvmeq_ready(source_t *source, int fd, uint32_t events) noexcept nogil:
    eventfd_drain(fd)
    source.more = 1
