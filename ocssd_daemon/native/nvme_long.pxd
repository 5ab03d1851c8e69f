# cython: cdivision=True
"""Owns the commands whose length the data buffer does not bound: Write Zeroes, Dataset Management, Verify.

What fits into one piece is done at once. The rest becomes a job: checked as a whole, then done piece by piece between
other commands, and completed at its end. Jobs take turns, so a short one does not wait for a long one. Commands of one
queue have no order among each other (NVM Express Base 1.3, 4.1), so nothing waits for a job but its own completion.

A queue that is deleted or reset ends its jobs (``jobs_end``, ``jobs_forget``); what they did stays done.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ocssd_daemon.native.disk cimport cursor_t, gather
from ocssd_daemon.native.media cimport media_begin, media_done_ns
from ocssd_daemon.native.nvme_exec cimport (
    block_discard, block_verify, block_zeroes, flash_request, io_t, note_resets, raw_verify, raw_zeroes,
)
from ocssd_daemon.native.nvme_flash cimport (
    KIND_BLOCK, check_writes, flash_req_t, flash_reset_range, mark_failed,
)
from ocssd_daemon.native.nvme_job cimport JOBS_MAX, job_t, jobs_t
from ocssd_daemon.native.nvme_wire cimport (
    IO_DSM, IO_VERIFY, IO_WRITE_ZEROES, NVME_LBA_RANGE, NVME_NOT_READY, NVME_OK, dsm_range_t, sqe_t,
)
from ocssd_daemon.native.nvmeq cimport TURN_BYTES, log_error, nvmeq_complete, nvmeq_t
from ocssd_daemon.native.reactor cimport reactor_defer, source_t
from ocssd_daemon.native.sys cimport now_ns

cdef enum:
    PIECE_DISCARD = 16 << 20        # bytes of a piece that only changes the map
    PIECE_WRITE = 1 << 20           # bytes of one that writes
    DISCARD_SHIFT = 4               # changing the map costs a sixteenth of moving the same bytes
    RANGES_MAX = 256


# --- pieces -------------------------------------------------------------------------------------------------------

cdef inline bint moves_bytes(const io_t *io) noexcept nogil:
    """Does it cost as much as its bytes? Zeroes that are as durable as data are written."""
    return io.s.opcode == IO_WRITE_ZEROES and (io.ns.kind != KIND_BLOCK or io.ns.disk.ftl.host_durable)


cdef inline uint64_t piece_lbas(const io_t *io) noexcept nogil:
    """LBAs of one piece: whole sectors of a disk, whole write units of flash."""
    cdef uint64_t n = <uint64_t>(PIECE_WRITE if moves_bytes(io) else PIECE_DISCARD) >> io.ns.lba_shift
    cdef uint32_t unit
    if io.ns.kind != KIND_BLOCK and io.s.opcode == IO_WRITE_ZEROES:
        unit = io.ns.flash.media.geometry.ws_min
        return max(<uint64_t>1, n // unit) * unit
    return max(n, <uint64_t>1)


cdef inline uint64_t piece_end(const io_t *io, uint64_t at, uint64_t end) noexcept nogil:
    """Where the piece that begins at LBA *at* ends; on a disk at a multiple of its length, so that no sector is cut."""
    cdef uint64_t n = piece_lbas(io)
    if io.ns.kind == KIND_BLOCK:
        return min(end, (at // n + 1) * n)
    return at + min(n, end - at)


cdef inline int run_piece(io_t *io) noexcept nogil:
    """``io.first`` and ``io.n`` say which blocks."""
    io.q.turn_bytes -= <int64_t>((<uint64_t>io.n << io.ns.lba_shift) >> (0 if moves_bytes(io) else DISCARD_SHIFT))
    if io.s.opcode == IO_DSM:
        return block_discard(io)
    if io.s.opcode == IO_VERIFY:
        return block_verify(io) if io.ns.kind == KIND_BLOCK else raw_verify(io)
    return block_zeroes(io) if io.ns.kind == KIND_BLOCK else raw_zeroes(io)


# --- jobs ---------------------------------------------------------------------------------------------------------

cdef inline int next_range(job_t *j, uint64_t size_lbas) noexcept nogil:
    """Take up the next range of a deallocation. Ranges that sum up to more than the namespace overlap: such a one is
    not gone over again, as deallocation is a wish.
    """
    cdef const dsm_range_t *r = &j.ranges[j.next_range]
    j.next_range += 1
    if r.nlb > size_lbas or r.slba > size_lbas - r.nlb:
        return NVME_LBA_RANGE
    j.at = j.end = r.slba
    if r.nlb <= j.left:
        j.left -= r.nlb
        j.end = r.slba + r.nlb
    return NVME_OK


cdef inline void piece_io(nvmeq_t *q, const job_t *j, io_t *io) noexcept nogil:
    memset(io, 0, sizeof(io_t))
    io.q = q
    io.s = &j.s
    io.ns = &q.ns[j.s.nsid]


cdef inline bint job_step(nvmeq_t *q, job_t *j, int *status) noexcept nogil:
    """One piece. True when the command is done, with *status*."""
    cdef io_t io
    piece_io(q, j, &io)
    status[0] = NVME_OK
    while j.at == j.end:
        if j.next_range == j.range_count:
            return True
        status[0] = next_range(j, io.ns.size_lbas)
        if status[0] != NVME_OK:
            return True
    io.first = j.at
    io.n = <uint32_t>(piece_end(&io, j.at, j.end) - j.at)
    io.last = j.at + io.n == j.end
    status[0] = run_piece(&io)
    j.at += io.n
    j.due_ns = max(j.due_ns, io.due_ns)
    return status[0] != NVME_OK or (j.at == j.end and j.next_range == j.range_count)


cdef inline void job_unlink(jobs_t *jobs, job_t *before, job_t *j) noexcept nogil:
    if before == NULL:
        jobs.first = j.next
    else:
        before.next = j.next
    if jobs.last == j:
        jobs.last = before
    jobs.count -= 1


cdef inline void job_append(jobs_t *jobs, job_t *j) noexcept nogil:
    j.next = NULL
    if jobs.last == NULL:
        jobs.first = j
    else:
        jobs.last.next = j
    jobs.last = j
    jobs.count += 1


cdef inline void job_complete(nvmeq_t *q, job_t *j, int status) noexcept nogil:
    """Post its completion, now or when the flash is done, and forget it. It must be unlinked."""
    cdef uint64_t what = j.sqid | <uint64_t>j.s.cid << 16 | <uint64_t>status << 32
    if status != NVME_OK:
        log_error(q, j.sqid, &j.s, status)
    if status == NVME_OK and j.due_ns > now_ns():
        reactor_defer(q.reactor, &q.source, j.due_ns, what, 0)
    else:
        nvmeq_complete(&q.source, what, 0)
    free(j)


cdef inline int jobs_poll(source_t *source, int budget) noexcept nogil:
    """Pieces of waiting jobs in turn, up to what one turn may move."""
    cdef jobs_t *jobs = <jobs_t *>source
    cdef nvmeq_t *q = <nvmeq_t *>jobs.owner
    cdef job_t *j
    cdef int status = NVME_OK, done = 0
    q.turn_bytes = TURN_BYTES
    while jobs.first != NULL and q.turn_bytes > 0 and done < budget:
        j = jobs.first
        job_unlink(jobs, NULL, j)
        done += 1
        if job_step(q, j, &status):
            job_complete(q, j, status)
        else:
            job_append(jobs, j)
    source.more = jobs.first != NULL
    return done


cdef inline int jobs_arm(source_t *source) noexcept nogil:
    return (<jobs_t *>source).first != NULL


cdef inline void jobs_ready(source_t *source, int fd, uint32_t events) noexcept nogil:
    pass


cdef inline void jobs_disarm(source_t *source) noexcept nogil:
    pass


cdef inline void jobs_complete(source_t *source, uint64_t a, uint64_t b) noexcept nogil:
    pass


cdef inline bint jobs_end(nvmeq_t *q, uint32_t sqid, int cid, int status) noexcept nogil:
    """End jobs of a queue with *status*: the one of command *cid*, or all (-1). Was there any?"""
    cdef job_t *before = NULL
    cdef job_t *j = q.jobs.first
    cdef job_t *following
    cdef bint found = False
    while j != NULL:
        following = j.next
        if j.sqid == sqid and (cid < 0 or j.s.cid == cid):
            job_unlink(&q.jobs, before, j)
            job_complete(q, j, status)
            found = True
        else:
            before = j
        j = following
    return found


cdef inline void jobs_forget(nvmeq_t *q) noexcept nogil:
    """All jobs of a controller that is reset, without a completion."""
    cdef job_t *j
    while q.jobs.first != NULL:
        j = q.jobs.first
        job_unlink(&q.jobs, NULL, j)
        free(j)


cdef inline int park(io_t *io, job_t *j) noexcept nogil:
    """Go on later: the completion queue keeps a place for it."""
    cdef nvmeq_t *q = io.q
    j.sqid = q.running
    q.cq[q.sq[j.sqid].cqid].promised += 1
    job_append(&q.jobs, j)
    q.jobs.source.more = 1
    io.parked = True
    return NVME_OK


cdef inline int start(io_t *io, job_t *whole) noexcept nogil:
    """Do the first piece; what is left is parked. Where trio runs the queues there is no loop to go on in."""
    cdef job_t *j
    cdef int status = NVME_OK
    cdef uint64_t ranges_bytes = whole.range_count * sizeof(dsm_range_t)
    memcpy(&whole.s, io.s, sizeof(sqe_t))
    while not job_step(io.q, whole, &status):
        if io.q.by_message or io.q.turn_bytes > 0 and whole.next_range < whole.range_count and whole.at == whole.end:
            continue
        if io.q.jobs.count >= JOBS_MAX:
            return NVME_NOT_READY
        j = <job_t *>malloc(sizeof(job_t) + ranges_bytes)
        if j == NULL:
            return NVME_NOT_READY
        memcpy(j, whole, sizeof(job_t))
        j.ranges = <dsm_range_t *>(j + 1)
        memcpy(j.ranges, whole.ranges, ranges_bytes)
        return park(io, j)
    io.due_ns = whole.due_ns
    return status


# --- the commands -------------------------------------------------------------------------------------------------

cdef inline int run_blocks(io_t *io) noexcept nogil:
    """Write Zeroes and Verify: one range. Flash checks all of a write before any of it is done."""
    cdef job_t whole
    cdef flash_req_t r
    memset(&whole, 0, sizeof(whole))
    if io.s.opcode == IO_WRITE_ZEROES and io.ns.kind != KIND_BLOCK:
        flash_request(io, &r, False)
        if not check_writes(&r):
            return r.status
    whole.at = io.first
    whole.end = io.first + io.n
    return start(io, &whole)


cdef inline int reset_ranges(io_t *io, const dsm_range_t *ranges) noexcept nogil:
    """Dataset Management on flash: each range is a chunk to reset, in order until one fails. Spec: OCSSD 2.0, 3."""
    cdef flash_req_t r
    cdef uint64_t one[1]
    cdef uint32_t i
    media_begin(io.ns.flash.media)
    for i in range(io.n):
        memset(&r, 0, sizeof(r))
        one[0] = ranges[i].slba
        r.ns = &io.ns.flash
        r.list = one
        r.n = 1
        r.status = flash_reset_range(&io.ns.flash, ranges[i].slba, ranges[i].nlb)
        if r.status != NVME_OK:
            mark_failed(&r, 0, 1, r.status)
        note_resets(io, &r)
        if r.status != NVME_OK:
            return r.status
    io.due_ns = media_done_ns(io.ns.flash.media)
    return NVME_OK


cdef inline int run_dsm(io_t *io) noexcept nogil:
    """Ranges in order until one fails; what was done before stays done."""
    cdef dsm_range_t ranges[RANGES_MAX]
    cdef job_t whole
    cdef cursor_t c
    c.iov = io.q.pieces.iov
    c.used = 0
    gather(&c, <char *>ranges, io.data_bytes)
    if io.ns.kind != KIND_BLOCK:
        return reset_ranges(io, ranges)
    memset(&whole, 0, sizeof(whole))
    whole.left = io.ns.size_lbas
    whole.ranges = ranges
    whole.range_count = io.n
    return start(io, &whole)
