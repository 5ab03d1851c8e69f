"""Owns the choice between the split and the packed layout: the one interface that a device uses.

``virtqueue_next`` hands out chains (those that a predecessor left in flight first), ``virtqueue_complete`` takes them
back, ``virtqueue_publish`` makes the completions visible and ``virtqueue_notify`` wakes the driver if it asked for it.
"""

from libc.stdint cimport uint16_t, uint32_t

from ocssd_daemon.native.chain cimport chain_t
from ocssd_daemon.native.sys cimport full_fence
from ocssd_daemon.native.vring cimport TAKEN_PARKED, VRING_BATCH, signal_peer, vring_t
from ocssd_daemon.native.vring_packed cimport (
    packed_arm, packed_disarm, packed_next, packed_publish, packed_resubmit, packed_wants_signal,
)
from ocssd_daemon.native.vring_split cimport (
    split_arm, split_disarm, split_next, split_publish, split_resubmit, split_wants_signal,
)


cdef inline bint virtqueue_resubmits(vring_t *ring) noexcept nogil:
    return ring.inflight.resubmit_done < ring.inflight.resubmit_count


cdef inline int virtqueue_resubmit(vring_t *ring, chain_t *chain) noexcept nogil:
    cdef uint16_t entry = ring.inflight.resubmit[ring.inflight.resubmit_done]
    ring.inflight.resubmit_done += 1
    return packed_resubmit(ring, chain, entry) if ring.packed else split_resubmit(ring, chain, entry)


cdef inline int virtqueue_next(vring_t *ring, chain_t *chain) noexcept nogil:
    """Take a chain: 1 taken, 0 none available, else minus the fault that broke the ring."""
    if virtqueue_resubmits(ring):
        return virtqueue_resubmit(ring, chain)
    return packed_next(ring, chain) if ring.packed else split_next(ring, chain)


cdef inline void virtqueue_publish(vring_t *ring) noexcept nogil:
    """Show the gathered completions to the driver."""
    if ring.batch_count == 0:
        return
    if ring.packed:
        packed_publish(ring)
    else:
        split_publish(ring)
    ring.batch_count = 0
    ring.batch_number += 1


cdef inline void virtqueue_complete(vring_t *ring, uint16_t id, uint16_t ring_slots,
                                    uint32_t written_bytes) noexcept nogil:
    """Give a chain back; it becomes visible with the next publication, at the latest when the batch is full."""
    ring.taken[id] = ring.batch_number
    ring.batch[ring.batch_count].id = id
    ring.batch[ring.batch_count].ring_slots = ring_slots
    ring.batch[ring.batch_count].written_bytes = written_bytes
    ring.batch_count += 1
    if ring.batch_count == VRING_BATCH:
        virtqueue_publish(ring)


cdef inline void virtqueue_park(vring_t *ring, uint16_t id) noexcept nogil:
    """The chain stays in flight beyond this batch."""
    ring.taken[id] = TAKEN_PARKED


cdef inline void virtqueue_notify(vring_t *ring) noexcept nogil:
    """Signal the driver if it wants to hear of what was published. The fence orders our index before its wish."""
    cdef bint wanted
    if ring.unannounced == 0:
        return
    full_fence()
    wanted = packed_wants_signal(ring) if ring.packed else split_wants_signal(ring)
    ring.unannounced = 0
    if wanted:
        ring.signals += 1
        if signal_peer(ring.call_fd, ring.call_may_block):
            ring.call_may_block = 1


cdef inline bint virtqueue_arm(vring_t *ring) noexcept nogil:
    """Ask for notifications; true when there is work already."""
    cdef bint work = packed_arm(ring) if ring.packed else split_arm(ring)
    return work or virtqueue_resubmits(ring)


cdef inline void virtqueue_disarm(vring_t *ring) noexcept nogil:
    if ring.packed:
        packed_disarm(ring)
    else:
        split_disarm(ring)
