"""Owns how the queue pairs of a controller begin and end: creation, deletion, the start of shadow doorbells, reset.

NVM Express Base 1.3, 5.3 to 5.6 (queue management), 5.7 and annex B.5 (doorbell buffers), 7.3 (resets). What runs in between is in
``nvmeq.pxd``. Everything here runs with the reactor's lock held.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from ocssd_daemon.native.gmem cimport gmem_at, gmem_at_write
from ocssd_daemon.native.nvme_wire cimport cqe_t, sqe_t
from ocssd_daemon.native.nvmeq cimport ask_for_event, cq_t, doorbell_at, intx_update, nvmeq_t, shadow_at, sq_t
from ocssd_daemon.native.sys cimport load_acquire_u32, store_release_u32


# --- shadow doorbells ---------------------------------------------------------------------------------------------

cdef inline void shadow_start(nvmeq_t *self, uint32_t qid, uint32_t which, uint32_t index) noexcept nogil:
    """Make the shadow say what the register says, and ask for the next change.

    Linux keeps the pages over a controller reset; stale values in them would be taken for new commands.
    """
    cdef uint32_t *shadow
    if qid == 0 or self.shadow == 0:
        return
    shadow = shadow_at(self, self.shadow, qid, which)
    if shadow != NULL:
        store_release_u32(shadow, index)
    ask_for_event(self, qid, which, index)


cdef inline void shadows_start(nvmeq_t *self) noexcept nogil:
    cdef uint32_t qid
    for qid in range(1, self.queue_count):
        if self.sq[qid].active:
            shadow_start(self, qid, 0, load_acquire_u32(doorbell_at(self, qid, 0)))
        if self.cq[qid].active:
            shadow_start(self, qid, 1, load_acquire_u32(doorbell_at(self, qid, 1)))


# --- life of queues -----------------------------------------------------------------------------------------------

cdef inline bint cq_create(nvmeq_t *self, uint32_t qid, uint64_t address, uint32_t entries, uint32_t vector,
                           bint interrupts) noexcept nogil:
    """False unless the whole queue is in writable guest memory."""
    cdef cq_t *cq = &self.cq[qid]
    cdef uint32_t last = (entries - 1) * sizeof(cqe_t)
    if gmem_at_write(self.memory, address, 1) == NULL or gmem_at_write(self.memory, address + last, sizeof(cqe_t)) == NULL:
        return False
    memset(cq, 0, sizeof(cq_t))
    cq.active = True
    cq.address = address
    cq.entries = entries
    cq.phase = 1
    cq.vector = vector
    cq.interrupts = interrupts
    store_release_u32(doorbell_at(self, qid, 1), 0)
    shadow_start(self, qid, 1, 0)
    return True


cdef inline bint sq_create(nvmeq_t *self, uint32_t qid, uint64_t address, uint32_t entries, uint32_t cqid) noexcept nogil:
    cdef sq_t *sq = &self.sq[qid]
    cdef uint32_t last = (entries - 1) * sizeof(sqe_t)
    if gmem_at(self.memory, address, 1) == NULL or gmem_at(self.memory, address + last, sizeof(sqe_t)) == NULL:
        return False
    memset(sq, 0, sizeof(sq_t))
    sq.active = True
    sq.address = address
    sq.entries = entries
    sq.cqid = cqid
    store_release_u32(doorbell_at(self, qid, 0), 0)
    shadow_start(self, qid, 0, 0)
    self.io_queues += qid != 0
    return True


cdef inline void sq_delete(nvmeq_t *self, uint32_t qid) noexcept nogil:
    """Deferred completions of the queue must have been drained before."""
    self.io_queues -= self.sq[qid].active and qid != 0
    memset(&self.sq[qid], 0, sizeof(sq_t))


cdef inline void cq_delete(nvmeq_t *self, uint32_t qid) noexcept nogil:
    memset(&self.cq[qid], 0, sizeof(cq_t))
    intx_update(self)


cdef inline void queues_forget(nvmeq_t *self) noexcept nogil:
    """Controller reset: no queue, no shadow doorbells, default coalescing."""
    memset(self.sq, 0, sizeof(self.sq))
    memset(self.cq, 0, sizeof(self.cq))
    memset(self.vector_immediate, 0, sizeof(self.vector_immediate))
    self.io_queues = 0
    self.shadow = self.event_index = 0
    self.coalesce_ns = 0
    self.coalesce_threshold = 0
    self.interrupt_mask = 0
