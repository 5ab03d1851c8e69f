"""Owns the life of a virtqueue: mapped, started from what the front end described, drained, stopped.

vhost-user specification, "Ring states": a ring with addresses starts when it gets a kick fd (or the word that there
is none) and is served while it is enabled. What is described takes effect at the start. A ring whose memory goes away
rests unmapped (``ring.used`` is NULL) with its positions kept. Everything runs under the reactor's lock.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from ocssd_daemon.native.chain cimport FAULT_BASE, FAULT_INFLIGHT, FAULT_MEMORY, FAULT_NONE, FAULT_UNMAPPED
from ocssd_daemon.native.gmem cimport gmem_at, gmem_at_write, gmem_user_to_gpa
from ocssd_daemon.native.inflight cimport inflight_queue_bytes
from ocssd_daemon.native.inflight_recovery cimport inflight_start, inflight_stop
from ocssd_daemon.native.reactor cimport reactor_drain, reactor_unwatch
from ocssd_daemon.native.sys cimport load_acquire_u16
from ocssd_daemon.native.vblk cimport VBLK_MORE, vblk_check
from ocssd_daemon.native.vhost cimport (
    vhost_addr_t, vhost_break, vhost_execute, vhost_queue_t, vhost_relist, vhost_t,
)
from ocssd_daemon.native.virtqueue cimport virtqueue_next, virtqueue_notify, virtqueue_publish, virtqueue_resubmits
from ocssd_daemon.native.vring cimport DESC_BYTES, vring_t
from ocssd_daemon.native.vring_packed cimport EVENT_BYTES
from ocssd_daemon.native.vring_split cimport SPLIT_IDX, split_avail_bytes, split_used_bytes

cdef extern from "unistd.h" nogil:
    int close(int)


cdef enum:
    VHOST_F_LOG_ALL = 26
    VIRTIO_F_INDIRECT_DESC = 28
    VIRTIO_F_EVENT_IDX = 29
    VHOST_USER_F_PROTOCOL_FEATURES = 30
    VIRTIO_F_VERSION_1 = 32
    VIRTIO_F_RING_PACKED = 34
    VIRTIO_F_RING_RESET = 40

    VRING_F_LOG = 1             # SET_VRING_ADDR: log writes to the used ring


cdef inline bint vhost_has(const vhost_t *self, int feature) noexcept nogil:
    return self.blk.features >> feature & 1


# ---- draining --------------------------------------------------------------------------------------------------------

cdef inline void vhost_finish_request(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    while queue.unfinished:
        vhost_execute(self, queue, VBLK_MORE)


cdef inline void vhost_finish_recovered(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    """What a predecessor took counts as taken by us: it is finished before the ring may stop."""
    cdef int taken
    while queue.live and virtqueue_resubmits(&queue.ring):
        taken = virtqueue_next(&queue.ring, &queue.request.chain)
        if taken < 0:
            vhost_break(self, queue, -taken)
            return
        vhost_execute(self, queue, vblk_check(&self.blk, &queue.request))
        vhost_finish_request(self, queue)


cdef inline void vhost_drain(vhost_t *self) noexcept nogil:
    """Complete all that is in flight, without waiting for deadlines.

    A ring that was disabled in the middle of a request too: its buffers may be unmapped next.
    """
    cdef uint32_t i
    cdef vhost_queue_t *queue
    for i in range(self.queue_count):
        queue = &self.queues[i]
        vhost_finish_request(self, queue)
        vhost_finish_recovered(self, queue)
        if queue.ring.used != NULL:
            virtqueue_publish(&queue.ring)
            virtqueue_notify(&queue.ring)
    reactor_drain(self.reactor, &self.source)
    if self.lists_stale:
        vhost_relist(self)


# ---- mapping ---------------------------------------------------------------------------------------------------------

cdef inline bint vhost_ring_gpa(vhost_t *self, uint64_t address, uint64_t length_bytes, uint64_t *gpa) noexcept nogil:
    if self.gpa_addresses:
        gpa[0] = address
        return True
    return gmem_user_to_gpa(&self.memory, address, length_bytes, gpa)


cdef inline char *vhost_ring_area(vhost_t *self, uint64_t address, uint64_t length_bytes, bint write,
                                  uint64_t *gpa) noexcept nogil:
    if not vhost_ring_gpa(self, address, length_bytes, gpa):
        return NULL
    if write:
        return gmem_at_write(&self.memory, gpa[0], length_bytes)
    return gmem_at(&self.memory, gpa[0], length_bytes)


cdef inline bint vhost_map_ring(vhost_t *self, uint32_t num, const vhost_addr_t *addr, vring_t *ring) noexcept nogil:
    """Translate the three areas into *ring*; false when one is not in a single region of the right kind."""
    cdef bint packed = vhost_has(self, VIRTIO_F_RING_PACKED)
    cdef bint event_idx = vhost_has(self, VIRTIO_F_EVENT_IDX)
    cdef uint64_t avail_bytes = EVENT_BYTES if packed else split_avail_bytes(num, event_idx)
    cdef uint64_t used_bytes = EVENT_BYTES if packed else split_used_bytes(num, event_idx)
    cdef uint64_t gpa = 0
    ring.desc = vhost_ring_area(self, addr.desc, num * <uint64_t>DESC_BYTES, packed, &ring.desc_gpa)
    ring.avail = vhost_ring_area(self, addr.avail, avail_bytes, False, &gpa)
    ring.used = vhost_ring_area(self, addr.used, used_bytes, True, &gpa)
    if ring.desc != NULL and ring.avail != NULL and ring.used != NULL:
        return True
    ring.used = NULL
    return False


cdef inline void vhost_remap(vhost_t *self) noexcept nogil:
    """The memory table changed: translate the started rings anew; those that cannot be rest unmapped."""
    cdef uint32_t i
    for i in range(self.queue_count):
        if self.queues[i].started:
            vhost_map_ring(self, self.queues[i].num, &self.queues[i].addr, &self.queues[i].ring)
    vhost_relist(self)


cdef inline void vhost_break_unmapped(vhost_t *self) noexcept nogil:
    cdef uint32_t i
    for i in range(self.queue_count):
        if self.queues[i].started and self.queues[i].ring.used == NULL and not self.queues[i].fault:
            vhost_break(self, &self.queues[i], FAULT_MEMORY)
    vhost_relist(self)


# ---- start and stop --------------------------------------------------------------------------------------------------

cdef inline bint vhost_set_positions(vhost_queue_t *queue) noexcept nogil:
    """Where the ring stands, from SET_VRING_BASE and, split, from the used ring itself."""
    cdef vring_t *ring = &queue.ring
    if not ring.packed:
        ring.next_avail = <uint16_t>queue.base
        ring.next_used = load_acquire_u16(ring.used + SPLIT_IDX)
        ring.seen_avail = ring.next_avail
        return queue.base <= 0xffff
    ring.next_avail = queue.base & 0x7fff
    ring.avail_wrap = queue.base >> 15 & 1
    ring.next_used = queue.base >> 16 & 0x7fff
    ring.used_wrap = queue.base >> 31
    return ring.next_avail < queue.num and ring.next_used < queue.num


cdef inline int vhost_record(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    """Attach the ring's in-flight region, if the front end gave one; FAULT_NONE or why not."""
    cdef uint64_t stride_bytes = inflight_queue_bytes(self.inflight_queue_size, queue.ring.packed)
    if self.inflight_map.at == NULL:
        return FAULT_NONE
    if queue.index >= self.inflight_queues or queue.num > self.inflight_queue_size:
        return FAULT_INFLIGHT
    if stride_bytes * self.inflight_queues > self.inflight_map.size_bytes:
        return FAULT_INFLIGHT
    if not inflight_start(&queue.ring, self.inflight_map.at + queue.index * stride_bytes):
        return FAULT_INFLIGHT
    queue.ring.seen_avail = queue.ring.next_avail
    return FAULT_NONE


cdef inline int vhost_prepare(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    """Fill the ring from what the front end said; FAULT_NONE or why it cannot run."""
    cdef vring_t *ring = &queue.ring
    ring.num = queue.num
    ring.packed = vhost_has(self, VIRTIO_F_RING_PACKED)
    ring.event_idx = vhost_has(self, VIRTIO_F_EVENT_IDX)
    ring.indirect = vhost_has(self, VIRTIO_F_INDIRECT_DESC)
    ring.log_used = queue.addr.flags & VRING_F_LOG
    ring.log_gpa = queue.addr.log
    ring.batch_count = 0
    ring.batch_number = 2                   # 0 and 1 (TAKEN_PARKED) are no batches
    ring.unannounced = 0
    ring.in_flight_slots = 0
    free(ring.taken)
    ring.taken = <uint64_t *>calloc(queue.num, sizeof(uint64_t))
    if ring.taken == NULL or not vhost_map_ring(self, queue.num, &queue.addr, ring):
        return FAULT_UNMAPPED
    if not ring.packed and queue.num & (queue.num - 1):
        return FAULT_UNMAPPED
    if not vhost_set_positions(queue):
        return FAULT_BASE
    return vhost_record(self, queue)


cdef inline void vhost_forget(vhost_queue_t *queue) noexcept nogil:
    """Drop what a running ring holds. A broken one leaves its in-flight record as it is: a restart recovers from it."""
    inflight_stop(&queue.ring.inflight, not queue.fault)
    free(queue.ring.taken)
    queue.ring.taken = NULL
    queue.ring.used = NULL
    queue.started = False


cdef inline void vhost_start_if_ready(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    cdef int fault
    if queue.started or queue.fault or not (queue.addressed and queue.kicked and queue.num):
        vhost_relist(self)
        return
    fault = vhost_prepare(self, queue)
    queue.started = not fault
    if fault:
        vhost_forget(queue)
        vhost_break(self, queue, fault)
    vhost_relist(self)


cdef inline uint32_t vhost_position(const vhost_queue_t *queue) noexcept nogil:
    """What SET_VRING_BASE must say to go on from here."""
    cdef const vring_t *ring = &queue.ring
    if not ring.packed:
        return ring.next_avail
    return (ring.next_avail | <uint32_t>ring.avail_wrap << 15
            | <uint32_t>ring.next_used << 16 | <uint32_t>ring.used_wrap << 31)


cdef inline void vhost_halt(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    if queue.started:
        vhost_drain(self)
        queue.base = vhost_position(queue)
        vhost_forget(queue)


cdef inline void vhost_set_fd(vhost_t *self, int *place, int fd) noexcept nogil:
    if place[0] >= 0:
        reactor_unwatch(self.reactor, place[0])
        close(place[0])
    place[0] = fd


cdef inline void vhost_stop(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    """Drain and stop; the positions stay in ``base``. Kick goes: the next start needs one of its own."""
    vhost_halt(self, queue)
    queue.kicked = False
    vhost_set_fd(self, &queue.kick_fd, -1)
    vhost_relist(self)
