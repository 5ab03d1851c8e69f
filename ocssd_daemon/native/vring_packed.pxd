"""Owns the packed virtqueue's layout: one ring of descriptors and two event suppression structures (virtio 1.3, 2.8).

Descriptor: addr u64, len u32, id u16, flags u16. A slot is available when its AVAIL bit equals the reader's wrap bit
and its USED bit does not. Event suppression: off_wrap u16 (offset in bits 0-14, wrap in bit 15), flags u16.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.chain cimport (
    CHAIN_SEGMENTS, FAULT_AVAIL_JUMP, FAULT_CHAIN_LOOP, FAULT_DUPLICATE, FAULT_HEAD_RANGE, FAULT_INDIRECT,
    FAULT_NONE, FAULT_PACKED_FLAGS, chain_add, chain_begin, chain_close, chain_t, copy_once,
)
from ocssd_daemon.native.dirtylog cimport dirtylog_mark
from ocssd_daemon.native.gmem cimport gmem_at
from ocssd_daemon.native.inflight cimport (
    inflight_packed_cleared, inflight_packed_linked, inflight_packed_shadow, inflight_packed_taken,
    inflight_read_shadow,
)
from ocssd_daemon.native.sys cimport full_fence, load_acquire_u16, prefetch, store_release_u16
from ocssd_daemon.native.vring cimport (
    DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, packed_desc_t, vring_event_passed, vring_log_used,
    vring_t, vring_take, vring_used_t,
)


cdef enum:
    PACKED_FLAGS = 14           # offset in a descriptor
    PACKED_LENGTH = 8
    PACKED_ID = 12
    DESC_F_AVAIL = 1 << 7
    DESC_F_USED = 1 << 15
    EVENT_BYTES = 4
    EVENT_FLAGS = 2
    EVENT_ENABLE = 0
    EVENT_DISABLE = 1
    EVENT_DESC = 2


cdef inline uint16_t packed_used_flags(bint wrap) noexcept nogil:
    return DESC_F_AVAIL | DESC_F_USED if wrap else 0


cdef inline uint16_t packed_avail_flags(bint wrap) noexcept nogil:
    return DESC_F_AVAIL if wrap else DESC_F_USED


cdef inline void packed_advance(vring_t *self, uint16_t *position, uint8_t *wrap, uint32_t slots) noexcept nogil:
    cdef uint32_t moved = position[0] + slots
    if moved >= self.num:
        moved -= self.num
        wrap[0] ^= 1
    position[0] = <uint16_t>moved


cdef inline int packed_at_hand(vring_t *self) noexcept nogil:
    """1: the slot at our position is available; 0: it is not; else minus the fault."""
    cdef uint16_t flags = load_acquire_u16(self.desc + self.next_avail * DESC_BYTES + PACKED_FLAGS)
    flags &= DESC_F_AVAIL | DESC_F_USED
    if flags == packed_avail_flags(self.avail_wrap):
        return 1
    # "Used in this lap" at a slot that we have not reached yet is nothing a driver ever writes.
    return -FAULT_PACKED_FLAGS if flags == packed_used_flags(self.avail_wrap) else 0


cdef inline int packed_table(vring_t *self, chain_t *chain, const packed_desc_t *at) noexcept nogil:
    """Gather the entries of an indirect table: they are in order and carry no NEXT flag (2.8.8)."""
    cdef packed_desc_t desc
    cdef uint32_t entries = at.length_bytes >> 4
    cdef uint32_t i
    cdef char *table
    cdef int fault
    if not self.indirect or at.flags & DESC_F_NEXT or at.length_bytes & (DESC_BYTES - 1) or entries == 0:
        return FAULT_INDIRECT
    if entries > CHAIN_SEGMENTS:
        return FAULT_INDIRECT
    table = gmem_at(self.memory, at.gpa, at.length_bytes)
    if table == NULL:
        return FAULT_INDIRECT
    for i in range(entries):
        copy_once(&desc, table + i * DESC_BYTES, DESC_BYTES)
        if desc.flags & DESC_F_INDIRECT:
            return FAULT_INDIRECT
        fault = chain_add(chain, self.memory, desc.gpa, desc.length_bytes, (desc.flags & DESC_F_WRITE) != 0)
        if fault:
            return fault
    return FAULT_NONE


cdef inline int packed_add(vring_t *self, chain_t *chain, const packed_desc_t *desc) noexcept nogil:
    if not desc.flags & DESC_F_INDIRECT:
        return chain_add(chain, self.memory, desc.gpa, desc.length_bytes, (desc.flags & DESC_F_WRITE) != 0)
    if chain.ring_slots != 1:               # an indirect descriptor stands alone (2.8.8)
        return FAULT_INDIRECT
    return packed_table(self, chain, desc)


cdef inline int packed_gather(vring_t *self, chain_t *chain) noexcept nogil:
    """Walk the slots of one chain from our position; FAULT_NONE or the fault. The id is in its last descriptor."""
    cdef packed_desc_t desc
    cdef uint32_t slot = self.next_avail
    cdef int fault
    chain_begin(chain, 0)
    while True:
        copy_once(&desc, self.desc + slot * DESC_BYTES, DESC_BYTES)
        fault = packed_add(self, chain, &desc)
        if fault:
            return fault
        inflight_packed_shadow(&self.inflight, &desc, chain.ring_slots)
        if not desc.flags & DESC_F_NEXT:
            chain.id = desc.id
            return chain_close(chain, self.memory)
        if chain.ring_slots == self.num:
            return FAULT_CHAIN_LOOP
        chain.ring_slots += 1
        slot = 0 if slot + 1 == self.num else slot + 1


cdef inline int packed_own(vring_t *self, chain_t *chain) noexcept nogil:
    if chain.id >= self.num:
        return FAULT_HEAD_RANGE
    if self.in_flight_slots + chain.ring_slots > self.num:
        return FAULT_AVAIL_JUMP
    if not vring_take(self, chain.id):
        return FAULT_DUPLICATE
    self.in_flight_slots += chain.ring_slots
    return FAULT_NONE


cdef inline int packed_next(vring_t *self, chain_t *chain) noexcept nogil:
    """Take the next available chain: 1 taken, 0 none there, else minus the fault."""
    cdef int fault = packed_at_hand(self)
    if fault <= 0:
        return fault
    fault = packed_gather(self, chain)
    if fault:
        return -fault
    fault = packed_own(self, chain)
    if fault:
        return -fault
    packed_advance(self, &self.next_avail, &self.avail_wrap, chain.ring_slots)
    prefetch(self.desc + self.next_avail * DESC_BYTES)
    inflight_packed_taken(&self.inflight, chain.id, chain.ring_slots)
    return 1


cdef inline int packed_resubmit(vring_t *self, chain_t *chain, uint16_t entry) noexcept nogil:
    """Take again a chain that a predecessor left in flight, from its shadow: the ring may be overwritten already."""
    cdef packed_desc_t desc
    cdef uint16_t last = self.inflight.last[entry]
    cdef uint16_t at = entry
    cdef int fault
    chain_begin(chain, 0)
    while True:
        inflight_read_shadow(&self.inflight, at, &desc)
        fault = packed_add(self, chain, &desc)
        if fault:
            return -fault
        if at == last:
            break
        chain.ring_slots += 1
        at = self.inflight.next[at]
    chain.id = desc.id
    fault = chain_close(chain, self.memory)
    if not fault:
        fault = packed_own(self, chain)
    if fault:
        return -fault
    self.inflight.entry_of_id[chain.id] = entry
    return 1


cdef inline void packed_put(vring_t *self, uint16_t slot, const vring_used_t *used, bint wrap) noexcept nogil:
    """Write one used descriptor; its flags come last, with release order: they are what publishes it."""
    cdef char *at = self.desc + slot * DESC_BYTES
    cdef uint16_t flags = packed_used_flags(wrap) | (DESC_F_WRITE if used.written_bytes else 0)
    (<uint32_t *>(at + PACKED_LENGTH))[0] = used.written_bytes
    (<uint16_t *>(at + PACKED_ID))[0] = used.id
    store_release_u16(at + PACKED_FLAGS, flags)
    if self.log_used and self.log.active:
        dirtylog_mark(self.log, self.desc_gpa + slot * <uint64_t>DESC_BYTES, DESC_BYTES)


cdef inline void packed_publish(vring_t *self) noexcept nogil:
    """Make the batch visible: the first descriptor is written last, so the driver sees all of it or nothing."""
    cdef uint16_t slot = self.next_used
    cdef uint8_t wrap = self.used_wrap
    cdef uint32_t slots = 0
    cdef uint32_t i
    for i in range(self.batch_count):
        if i:
            packed_put(self, self.next_used, &self.batch[i], self.used_wrap)
        packed_advance(self, &self.next_used, &self.used_wrap, self.batch[i].ring_slots)
        slots += self.batch[i].ring_slots
    inflight_packed_linked(&self.inflight, self.batch, self.batch_count, slot, wrap, self.next_used, self.used_wrap)
    packed_put(self, slot, &self.batch[0], wrap)
    inflight_packed_cleared(&self.inflight, self.batch, self.batch_count, self.next_used, self.used_wrap)
    self.in_flight_slots -= slots
    self.unannounced += slots


cdef inline bint packed_wants_signal(vring_t *self) noexcept nogil:
    """Read the driver's event suppression (2.8.10); an offset outside the ring counts as "always"."""
    cdef uint16_t mode = load_acquire_u16(self.avail + EVENT_FLAGS)
    cdef uint16_t off_wrap = load_acquire_u16(self.avail)
    cdef uint16_t event = off_wrap & 0x7fff
    if mode == EVENT_DISABLE:
        return False
    if mode != EVENT_DESC or not self.event_idx or event >= self.num or self.unannounced >= self.num:
        return True
    if off_wrap >> 15 != self.used_wrap:
        event -= <uint16_t>self.num
    return vring_event_passed(event, self.next_used, self.unannounced)


cdef inline bint packed_arm(vring_t *self) noexcept nogil:
    """Ask the driver to notify; true when it has made something available meanwhile."""
    if self.event_idx:
        store_release_u16(self.used, <uint16_t>(self.next_avail | self.avail_wrap << 15))
        store_release_u16(self.used + EVENT_FLAGS, EVENT_DESC)
    else:
        store_release_u16(self.used + EVENT_FLAGS, EVENT_ENABLE)
    vring_log_used(self, 0, EVENT_BYTES)
    full_fence()
    return packed_at_hand(self) != 0


cdef inline void packed_disarm(vring_t *self) noexcept nogil:
    store_release_u16(self.used + EVENT_FLAGS, EVENT_DISABLE)
    vring_log_used(self, 0, EVENT_BYTES)
