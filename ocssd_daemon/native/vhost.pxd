"""Owns the running device: a reactor source that serves the virtqueues of one virtio-blk device.

The source polls its live rings in turn, publishes completions as it goes, and wakes the driver. What sets rings up and
takes them down is ``vhost_setup``; here is only what runs while they do. Everything happens under the reactor's lock.

A completion that the flash latency model delays is parked and comes back through ``complete``; its data has moved
already, so nothing but the used element is left to do.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.chain cimport FAULT_MEMORY_LOST, FAULT_NONE
from ocssd_daemon.native.dirtylog cimport dirtylog_t
from ocssd_daemon.native.disk cimport disk_answer_first, disk_pay
from ocssd_daemon.native.foreign cimport foreign_t
from ocssd_daemon.native.gmem cimport gmem_poisoned, gmem_t
from ocssd_daemon.native.lookahead cimport look_ahead, lookahead_t
from ocssd_daemon.native.reactor cimport reactor_defer, reactor_report, reactor_t, source_t
from ocssd_daemon.native.vblk cimport (
    VBLK_MORE, VBLK_S_IOERR, VBLK_TURN_BYTES, vblk_answer, vblk_check, vblk_request_t, vblk_step, vblk_t,
)
from ocssd_daemon.native.virtqueue cimport (
    virtqueue_arm, virtqueue_complete, virtqueue_disarm, virtqueue_next, virtqueue_notify, virtqueue_park,
    virtqueue_publish,
)
from ocssd_daemon.native.vring cimport signal_peer, vring_t


cdef enum:
    SHOW_EARLY_BYTES = 64 << 10     # half a turn that moves this much lasts longer than waking the driver


ctypedef struct vhost_addr_t:   # SET_VRING_ADDR: user or guest-physical addresses, ``log`` guest-physical
    uint32_t flags
    uint64_t desc
    uint64_t used
    uint64_t avail
    uint64_t log

ctypedef struct vhost_queue_t:
    vring_t ring
    bint unfinished             # `request` has been begun and needs further steps
    int last_turn               # requests served in the last turn that had any
    uint32_t parked             # completions that wait for their deadline
    uint16_t index
    uint8_t fault               # FAULT_*: the driver broke the ring; it rests until it is addressed again
    bint live                   # in the device's list of rings to poll
    # What the front end said; it takes effect when the ring starts.
    uint32_t num
    uint32_t base
    vhost_addr_t addr
    bint addressed
    bint kicked
    bint enabled
    bint started
    int kick_fd                 # -1: none, or the driver sends no notifications
    int err_fd
    vblk_request_t request
    lookahead_t ahead

ctypedef struct vhost_t:
    source_t source             # first: the reactor knows only this part
    reactor_t *reactor
    gmem_t memory
    dirtylog_t log
    vblk_t blk
    vhost_queue_t *queues
    vhost_queue_t **live
    uint32_t queue_count
    uint32_t live_count
    uint32_t turn               # which live ring goes first
    int share                   # requests that one ring may have served before the next has its turn
    bint lists_stale            # a ring broke during the poll
    bint features_set
    bint enable_needed          # VHOST_USER_F_PROTOCOL_FEATURES: rings wait for SET_VRING_ENABLE
    bint gpa_addresses
    foreign_t inflight_map
    uint32_t inflight_queues
    uint32_t inflight_queue_size


cdef inline void vhost_break(vhost_t *self, vhost_queue_t *queue, int fault) noexcept nogil:
    """The driver broke the rules: this ring stops, the others go on, trio and the front end hear of it."""
    queue.fault = <uint8_t>fault
    queue.unfinished = False
    self.lists_stale = True
    signal_peer(queue.err_fd, True)
    reactor_report(self.reactor, &self.source, queue.index << 8 | fault)


cdef inline void vhost_relist(vhost_t *self) noexcept nogil:
    """Collect the rings to poll."""
    cdef uint32_t i
    cdef vhost_queue_t *queue
    self.live_count = 0
    for i in range(self.queue_count):
        queue = &self.queues[i]
        queue.live = queue.started and queue.ring.used != NULL and not queue.fault \
            and (queue.enabled or not self.enable_needed)
        if queue.live:
            self.live[self.live_count] = queue
            self.live_count += 1
    self.turn = 0
    # Fewer would mean a signal for every few requests, more a turn of over a millisecond.
    self.share = 64 if self.live_count <= 1 else 16 if self.live_count <= 64 else 4
    self.lists_stale = False


cdef inline void vhost_finish(vhost_t *self, vhost_queue_t *queue, int status) noexcept nogil:
    """Answer the request, and give its chain back now or at its deadline."""
    cdef vblk_request_t *request = &queue.request
    cdef uint32_t written_bytes
    if gmem_poisoned(&self.memory):         # its data came from pages that were not there
        status = VBLK_S_IOERR
    written_bytes = vblk_answer(&self.blk, request, status)
    queue.unfinished = False
    if request.done_at_ns == 0:
        virtqueue_complete(&queue.ring, request.chain.id, request.chain.ring_slots, written_bytes)
        return
    virtqueue_park(&queue.ring, request.chain.id)
    queue.parked += 1
    reactor_defer(self.reactor, &self.source, request.done_at_ns, queue.index,
                  request.chain.id | <uint64_t>request.chain.ring_slots << 16 | <uint64_t>written_bytes << 32)


cdef inline void vhost_show(vhost_queue_t *queue) noexcept nogil:
    virtqueue_publish(&queue.ring)
    virtqueue_notify(&queue.ring)


cdef inline void vhost_complete(source_t *source, uint64_t index, uint64_t element) noexcept nogil:
    cdef vhost_t *self = <vhost_t *>source
    cdef vhost_queue_t *queue = &self.queues[index]
    queue.parked -= 1
    if queue.ring.used == NULL:             # a broken ring whose memory went away
        return
    virtqueue_complete(&queue.ring, <uint16_t>element, <uint16_t>(element >> 16), <uint32_t>(element >> 32))
    vhost_show(queue)


cdef inline bint vhost_execute(vhost_t *self, vhost_queue_t *queue, int status) noexcept nogil:
    """Run one piece of the queue's request; true when the request is answered."""
    if status == VBLK_MORE:
        status = vblk_step(&self.blk, &queue.request)
    if status != VBLK_MORE:
        vhost_finish(self, queue, status)
        return True
    if not queue.unfinished:
        queue.unfinished = True
        virtqueue_park(&queue.ring, queue.request.chain.id)
    return False


cdef inline int vhost_serve(vhost_t *self, vhost_queue_t *queue, int budget) noexcept nogil:
    """Serve up to *budget* requests of one ring; how many were answered."""
    cdef vring_t *ring = &queue.ring
    cdef int done = 0
    cdef int taken = 1
    cdef int status
    cdef int half = queue.last_turn >> 1
    cdef long long early_bytes = self.blk.turn_bytes - SHOW_EARLY_BYTES
    while done < budget and self.blk.turn_bytes > 0:
        status = VBLK_MORE
        if not queue.unfinished:
            taken = virtqueue_next(ring, &queue.request.chain)
            if taken <= 0:
                break
            look_ahead(&queue.ahead, ring, self.blk.disk)
            status = vblk_check(&self.blk, &queue.request)
        if not vhost_execute(self, queue, status):
            continue
        done += 1
        # Half way, so that a driver that sleeps wakes up while we do the rest. Not more often: it would only go back
        # to sleep, and each of its sleeps costs us the system call and the wake-up.
        if done == half and self.blk.turn_bytes <= early_bytes:
            vhost_show(queue)
    vhost_show(queue)
    if done:
        queue.last_turn = done
    if taken < 0:
        vhost_break(self, queue, -taken)
    return done


cdef inline void vhost_lose_memory(vhost_t *self) noexcept nogil:
    """A file behind a mapping was truncated: what the rings say now means nothing."""
    cdef uint32_t i
    for i in range(self.live_count):
        vhost_break(self, self.live[i], FAULT_MEMORY_LOST)


cdef inline int vhost_poll(source_t *source, int budget) noexcept nogil:
    cdef vhost_t *self = <vhost_t *>source
    cdef uint32_t position, _i
    cdef int done = 0
    source.more = 0
    if self.live_count == 0:
        return 0
    self.blk.turn_bytes = VBLK_TURN_BYTES
    disk_answer_first(self.blk.disk)
    position = self.turn
    self.turn = position + 1 if position + 1 < self.live_count else 0
    for _i in range(self.live_count):
        done += vhost_serve(self, self.live[position], budget if budget < self.share else self.share)
        position = position + 1 if position + 1 < self.live_count else 0
    disk_pay(self.blk.disk)
    if gmem_poisoned(&self.memory):
        vhost_lose_memory(self)
    if self.lists_stale:
        vhost_relist(self)
    return done


cdef inline int vhost_arm(source_t *source) noexcept nogil:
    """Before the loop sleeps: ask each driver to kick. A ring without a kick fd can only be polled."""
    cdef vhost_t *self = <vhost_t *>source
    cdef vhost_queue_t *queue
    cdef uint32_t i
    cdef int work = 0
    for i in range(self.live_count):
        queue = self.live[i]
        if virtqueue_arm(&queue.ring) or queue.unfinished or queue.kick_fd < 0:
            work = 1
    return work


cdef inline void vhost_disarm(source_t *source) noexcept nogil:
    cdef vhost_t *self = <vhost_t *>source
    cdef uint32_t i
    for i in range(self.live_count):
        virtqueue_disarm(&self.live[i].ring)


cdef inline void vhost_ready(source_t *source, int fd, uint32_t events) noexcept nogil:
    """A kick. The watch is edge-triggered, so there is nothing to drain, and the rings are polled anyway."""
    pass
