"""Owns the split virtqueue's layout: available ring, descriptor table and used ring (virtio 1.3, 2.7).

Available ring: flags u16, idx u16, ring[num] u16, used_event u16. Used ring: flags u16, idx u16, ring[num] of (id u32,
len u32), avail_event u16. Everything the driver owns is read once and checked before it is used.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ocssd_daemon.native.chain cimport (
    CHAIN_SEGMENTS, FAULT_AVAIL_JUMP, FAULT_CHAIN_LOOP, FAULT_DUPLICATE, FAULT_HEAD_RANGE, FAULT_INDIRECT,
    FAULT_NEXT_RANGE, FAULT_NONE, chain_add, chain_begin, chain_close, chain_t, copy_once,
)
from ocssd_daemon.native.gmem cimport gmem_at
from ocssd_daemon.native.inflight cimport inflight_split_cleared, inflight_split_linked, inflight_split_taken
from ocssd_daemon.native.sys cimport full_fence, load_acquire_u16, store_release_u16
from ocssd_daemon.native.vring cimport (
    DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, vring_desc_t, vring_event_passed, vring_log_used, vring_t,
    vring_take,
)


cdef enum:
    SPLIT_RING = 4              # offset of ring[] in both rings
    SPLIT_IDX = 2
    SPLIT_USED_BYTES = 8
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1


cdef inline uint16_t split_waiting(vring_t *self) noexcept nogil:
    self.seen_avail = load_acquire_u16(self.avail + SPLIT_IDX)
    return <uint16_t>(self.seen_avail - self.next_avail)


cdef inline int split_enter(vring_t *self, vring_desc_t *desc, char **table, uint32_t *entries) noexcept nogil:
    """Go on in the indirect table that *desc* names; FAULT_NONE, and *desc* is its first entry, or FAULT_INDIRECT."""
    # Linux fills a table up to seg_max even when the queue is shorter, so the queue size alone is no bound.
    cdef uint32_t limit = self.num if self.num > CHAIN_SEGMENTS else CHAIN_SEGMENTS
    entries[0] = desc.length_bytes >> 4
    if not self.indirect or desc.flags & DESC_F_NEXT or desc.length_bytes & (DESC_BYTES - 1):
        return FAULT_INDIRECT
    if entries[0] == 0 or entries[0] > limit:
        return FAULT_INDIRECT
    table[0] = gmem_at(self.memory, desc.gpa, desc.length_bytes)
    if table[0] == NULL:
        return FAULT_INDIRECT
    copy_once(desc, table[0], DESC_BYTES)
    return FAULT_INDIRECT if desc.flags & DESC_F_INDIRECT else FAULT_NONE


cdef inline int split_walk(vring_t *self, chain_t *chain, uint16_t head) noexcept nogil:
    """Gather the chain that starts at *head*; each descriptor is copied once, and no walk is longer than its table."""
    cdef vring_desc_t desc
    cdef char *table = self.desc
    cdef uint32_t entries = self.num
    cdef uint32_t visited = 0
    cdef bint nested = False
    cdef int fault
    copy_once(&desc, table + head * DESC_BYTES, DESC_BYTES)
    while True:
        if desc.flags & DESC_F_INDIRECT:
            fault = FAULT_INDIRECT if nested else split_enter(self, &desc, &table, &entries)
            if fault:
                return fault
            nested = True
            visited = 0
        visited += 1
        if visited > entries:
            return FAULT_CHAIN_LOOP
        fault = chain_add(chain, self.memory, desc.gpa, desc.length_bytes, (desc.flags & DESC_F_WRITE) != 0)
        if fault:
            return fault
        if not desc.flags & DESC_F_NEXT:
            return chain_close(chain, self.memory)
        if desc.next >= entries:
            return FAULT_NEXT_RANGE
        copy_once(&desc, table + desc.next * DESC_BYTES, DESC_BYTES)


cdef inline uint16_t split_head(vring_t *self, uint16_t position) noexcept nogil:
    return load_acquire_u16(self.avail + SPLIT_RING + 2 * (position & (self.num - 1)))


cdef inline int split_next(vring_t *self, chain_t *chain) noexcept nogil:
    """Take the next available chain: 1 taken, 0 none there, else minus the fault."""
    cdef uint16_t head
    cdef int fault
    if self.next_avail == self.seen_avail:
        if split_waiting(self) == 0:
            return 0
        if <uint16_t>(self.seen_avail - self.next_avail) > self.num:
            return -FAULT_AVAIL_JUMP
    head = split_head(self, self.next_avail)
    if head >= self.num:
        return -FAULT_HEAD_RANGE
    if not vring_take(self, head):
        return -FAULT_DUPLICATE
    chain_begin(chain, head)
    fault = split_walk(self, chain, head)
    if fault:
        return -fault
    self.next_avail += 1
    inflight_split_taken(&self.inflight, head)
    return 1


cdef inline int split_resubmit(vring_t *self, chain_t *chain, uint16_t head) noexcept nogil:
    """Take again a chain that a predecessor left in flight: its descriptors still belong to the device."""
    cdef int fault
    if head >= self.num or not vring_take(self, head):
        return -FAULT_DUPLICATE
    chain_begin(chain, head)
    fault = split_walk(self, chain, head)
    return -fault if fault else 1


cdef inline void split_publish(vring_t *self) noexcept nogil:
    """Make the batch visible to the driver, with the in-flight record in the order that a successor relies on."""
    cdef uint32_t i
    cdef uint32_t[2] element
    cdef uint64_t offset_bytes
    for i in range(self.batch_count):
        offset_bytes = SPLIT_RING + SPLIT_USED_BYTES * <uint64_t>((self.next_used + i) & (self.num - 1))
        element[0] = self.batch[i].id
        element[1] = self.batch[i].written_bytes
        memcpy(self.used + offset_bytes, element, SPLIT_USED_BYTES)
        vring_log_used(self, offset_bytes, SPLIT_USED_BYTES)
    inflight_split_linked(&self.inflight, self.batch, self.batch_count)
    self.next_used += <uint16_t>self.batch_count
    self.unannounced += self.batch_count
    store_release_u16(self.used + SPLIT_IDX, self.next_used)
    inflight_split_cleared(&self.inflight, self.batch, self.batch_count, self.next_used)
    vring_log_used(self, 0, SPLIT_RING)


cdef inline bint split_wants_signal(vring_t *self) noexcept nogil:
    if self.event_idx:
        return vring_event_passed(load_acquire_u16(self.avail + SPLIT_RING + 2 * self.num), self.next_used,
                                  self.unannounced)
    return not load_acquire_u16(self.avail) & AVAIL_F_NO_INTERRUPT


cdef inline bint split_arm(vring_t *self) noexcept nogil:
    """Ask the driver to notify; true when it has made something available meanwhile."""
    cdef uint64_t event_offset_bytes = SPLIT_RING + SPLIT_USED_BYTES * <uint64_t>self.num
    if self.event_idx:
        store_release_u16(self.used + event_offset_bytes, self.next_avail)
        vring_log_used(self, event_offset_bytes, 2)
    else:
        store_release_u16(self.used, 0)
        vring_log_used(self, 0, 2)
    full_fence()
    return load_acquire_u16(self.avail + SPLIT_IDX) != self.next_avail


cdef inline void split_disarm(vring_t *self) noexcept nogil:
    """We poll: no notifications. With EVENT_IDX the old avail_event, once passed, is enough."""
    if not self.event_idx:
        store_release_u16(self.used, USED_F_NO_NOTIFY)
        vring_log_used(self, 0, 2)


cdef inline uint64_t split_avail_bytes(uint32_t num, bint event_idx) noexcept nogil:
    return SPLIT_RING + 2 * <uint64_t>num + (2 if event_idx else 0)


cdef inline uint64_t split_used_bytes(uint32_t num, bint event_idx) noexcept nogil:
    return SPLIT_RING + SPLIT_USED_BYTES * <uint64_t>num + (2 if event_idx else 0)
