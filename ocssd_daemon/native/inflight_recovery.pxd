"""Owns the start of an in-flight record: read what a predecessor left, or begin afresh.

The rules are the vhost-user specification's "When reconnecting". What is read here was written by a daemon that may
have been killed at any instruction, or by a peer that lies: every index is checked, every walk is bounded, and a
record that does not hold together counts as fresh. Runs once per ring start; cold.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, qsort
from libc.string cimport memset

from ocssd_daemon.native.inflight cimport (
    AT_DESC_NUM, AT_FREE_WORD, AT_LAST_BATCH, AT_USED_IDX, AT_USED_WORD, AT_VERSION, ENTRY_COUNTER, INFLIGHT_END,
    INFLIGHT_VERSION, PACKED_LAST, PACKED_NEXT, PACKED_NUM, SPLIT_NEXT, inflight_queue_bytes, inflight_store_heads,
    inflight_store_used, load_u8, packed_entry, split_entry, store_u8,
)
from ocssd_daemon.native.sys cimport (
    load_acquire_u16, load_acquire_u32, load_acquire_u64, release_fence, store_release_u16,
)
from ocssd_daemon.native.vring cimport DESC_BYTES, inflight_t, vring_t
from ocssd_daemon.native.vring_packed cimport (
    DESC_F_AVAIL, DESC_F_USED, PACKED_FLAGS, packed_advance, packed_avail_flags,
)


cdef enum:
    ENTRY_UNKNOWN = 0
    ENTRY_FREE = 1
    ENTRY_HELD = 2


ctypedef struct unfinished_t:
    uint64_t counter
    uint16_t entry


cdef inline int unfinished_order(const void *a, const void *b) noexcept nogil:
    cdef const unfinished_t *x = <const unfinished_t *>a
    cdef const unfinished_t *y = <const unfinished_t *>b
    if x.counter != y.counter:
        return -1 if x.counter < y.counter else 1
    return <int>x.entry - <int>y.entry


cdef inline void inflight_stop(inflight_t *self, bint drained) noexcept nogil:
    """Forget the record; a ring that left nothing in flight also marks it fresh."""
    if self.region != NULL and drained:
        store_release_u16(self.region + AT_VERSION, 0)
    free(self.resubmit)
    free(self.next)
    free(self.last)
    free(self.entry_of_id)
    memset(self, 0, sizeof(inflight_t))


cdef inline bint inflight_reserve(inflight_t *self, uint32_t num) noexcept nogil:
    self.resubmit = <uint16_t *>calloc(num, sizeof(uint16_t))
    self.next = <uint16_t *>calloc(num, sizeof(uint16_t))
    self.last = <uint16_t *>calloc(num, sizeof(uint16_t))
    self.entry_of_id = <uint16_t *>calloc(num, sizeof(uint16_t))
    return self.resubmit != NULL and self.next != NULL and self.last != NULL and self.entry_of_id != NULL


cdef inline bint inflight_is_fresh(vring_t *ring) noexcept nogil:
    return load_acquire_u16(ring.inflight.region + AT_VERSION) != INFLIGHT_VERSION \
        or load_acquire_u16(ring.inflight.region + AT_DESC_NUM) != ring.num


cdef inline void inflight_queue(inflight_t *self, unfinished_t *found, uint32_t count) noexcept nogil:
    """Put what was found in flight into the order in which it was taken."""
    cdef uint32_t i
    qsort(found, count, sizeof(unfinished_t), &unfinished_order)
    for i in range(count):
        self.resubmit[i] = found[i].entry
    self.resubmit_count = count
    self.resubmit_done = 0
    self.counter = found[count - 1].counter + 1 if count else 0


cdef inline void inflight_mark_begun(vring_t *ring) noexcept nogil:
    """The header is complete: from here on a successor takes the record seriously."""
    store_release_u16(ring.inflight.region + AT_DESC_NUM, <uint16_t>ring.num)
    store_release_u16(ring.inflight.region + AT_VERSION, INFLIGHT_VERSION)


cdef inline void inflight_wipe(vring_t *ring) noexcept nogil:
    store_release_u16(ring.inflight.region + AT_VERSION, 0)
    memset(ring.inflight.region + AT_VERSION, 0, inflight_queue_bytes(ring.num, ring.packed) - AT_VERSION)
    release_fence()


# ---- split -----------------------------------------------------------------------------------------------------------

cdef inline bint split_commit_last_batch(vring_t *ring) noexcept nogil:
    """What the used ring shows is done, whatever the entries say; false when the record makes no sense."""
    cdef inflight_t *self = &ring.inflight
    cdef uint16_t behind = <uint16_t>(ring.next_used - load_acquire_u16(self.region + AT_USED_IDX))
    cdef uint16_t head = load_acquire_u16(self.region + AT_LAST_BATCH)
    cdef uint32_t _i
    self.last_batch = head if head < ring.num else 0
    if behind > ring.num:
        return False
    for _i in range(behind):
        if head >= ring.num:
            return False
        store_u8(split_entry(self, head), 0)
        head = load_acquire_u16(split_entry(self, head) + SPLIT_NEXT)
    store_release_u16(self.region + AT_USED_IDX, ring.next_used)
    return True


cdef inline void split_find_unfinished(vring_t *ring, unfinished_t *found) noexcept nogil:
    cdef inflight_t *self = &ring.inflight
    cdef uint32_t count = 0
    cdef uint32_t head
    for head in range(ring.num):
        if load_u8(split_entry(self, head)):
            found[count].entry = <uint16_t>head
            found[count].counter = load_acquire_u64(split_entry(self, head) + ENTRY_COUNTER)
            count += 1
    inflight_queue(self, found, count)


cdef inline void inflight_start_split(vring_t *ring, unfinished_t *found) noexcept nogil:
    if inflight_is_fresh(ring) or not split_commit_last_batch(ring):
        inflight_wipe(ring)
        ring.inflight.last_batch = 0
        store_release_u16(ring.inflight.region + AT_USED_IDX, ring.next_used)
        inflight_mark_begun(ring)
        return
    split_find_unfinished(ring, found)
    # Whatever the front end says: what was taken is what was finished and what is unfinished.
    ring.next_avail = <uint16_t>(ring.next_used + ring.inflight.resubmit_count)


# ---- packed ----------------------------------------------------------------------------------------------------------

cdef inline void packed_start_afresh(vring_t *ring) noexcept nogil:
    cdef inflight_t *self = &ring.inflight
    cdef uint32_t i
    inflight_wipe(ring)
    for i in range(ring.num):
        self.next[i] = <uint16_t>(i + 1) if i + 1 < ring.num else INFLIGHT_END
        store_release_u16(packed_entry(self, i) + PACKED_NEXT, self.next[i])
    self.free_head = 0
    inflight_store_heads(self, 0, 0)
    inflight_store_used(self, ring.next_used, ring.used_wrap, ring.next_used, ring.used_wrap)
    inflight_mark_begun(ring)


cdef inline bint packed_settle_last_batch(vring_t *ring) noexcept nogil:
    """Commit the last batch if the ring shows it, roll it back if not; false when the record makes no sense."""
    cdef inflight_t *self = &ring.inflight
    cdef uint32_t heads = load_acquire_u32(self.region + AT_FREE_WORD)
    cdef uint64_t used = load_acquire_u64(self.region + AT_USED_WORD)
    cdef uint16_t new_used = <uint16_t>used
    cdef uint16_t old_used = <uint16_t>(used >> 16)
    cdef uint8_t new_wrap = <uint8_t>(used >> 32) & 1
    cdef uint8_t old_wrap = <uint8_t>(used >> 40) & 1
    cdef bint published = False
    cdef uint16_t flags
    if new_used >= ring.num or old_used >= ring.num:
        return False
    if new_used != old_used or new_wrap != old_wrap:
        flags = load_acquire_u16(ring.desc + old_used * DESC_BYTES + PACKED_FLAGS) & (DESC_F_AVAIL | DESC_F_USED)
        published = flags != packed_avail_flags(old_wrap)
    self.free_head = <uint16_t>heads if published else <uint16_t>(heads >> 16)
    ring.next_used = new_used if published else old_used
    ring.used_wrap = new_wrap if published else old_wrap
    return True


cdef inline void packed_clear_free(vring_t *ring, uint8_t *kind) noexcept nogil:
    """Walk the free list; whatever is in it is not in flight, even if its mark was not cleared in time."""
    cdef inflight_t *self = &ring.inflight
    cdef uint16_t entry = self.free_head
    while entry < ring.num and kind[entry] == ENTRY_UNKNOWN:
        kind[entry] = ENTRY_FREE
        store_u8(packed_entry(self, entry), 0)
        entry = load_acquire_u16(packed_entry(self, entry) + PACKED_NEXT)


cdef inline uint32_t packed_hold(vring_t *ring, uint16_t head, uint8_t *kind) noexcept nogil:
    """Adopt the chain of entries at *head*; how many slots it has, or 0 when it is not sound."""
    cdef inflight_t *self = &ring.inflight
    cdef uint16_t slots = load_acquire_u16(packed_entry(self, head) + PACKED_NUM)
    cdef uint16_t entry = head
    cdef uint32_t _i
    for _i in range(slots):
        if entry >= ring.num or kind[entry] != ENTRY_UNKNOWN:
            return 0
        kind[entry] = ENTRY_HELD
        self.last[head] = entry
        self.next[entry] = load_acquire_u16(packed_entry(self, entry) + PACKED_NEXT)
        entry = self.next[entry]
    return slots


cdef inline bint packed_find_unfinished(vring_t *ring, unfinished_t *found, uint8_t *kind) noexcept nogil:
    cdef inflight_t *self = &ring.inflight
    cdef uint32_t count = 0, slots = 0, held, entry
    for entry in range(ring.num):
        if kind[entry] == ENTRY_FREE or not load_u8(packed_entry(self, entry)):
            continue
        held = packed_hold(ring, <uint16_t>entry, kind)
        if held == 0:
            return False
        found[count].entry = <uint16_t>entry
        found[count].counter = load_acquire_u64(packed_entry(self, entry) + ENTRY_COUNTER)
        count += 1
        slots += held
    inflight_queue(self, found, count)
    ring.next_avail = ring.next_used
    ring.avail_wrap = ring.used_wrap
    packed_advance(ring, &ring.next_avail, &ring.avail_wrap, slots)
    return True


cdef inline void packed_rebuild_free(vring_t *ring, const uint8_t *kind) noexcept nogil:
    """All that nobody holds is free; written anew, so that nothing of a damaged list stays."""
    cdef inflight_t *self = &ring.inflight
    cdef uint32_t i = ring.num
    self.free_head = INFLIGHT_END
    while i:
        i -= 1
        if kind[i] != ENTRY_HELD:
            self.next[i] = self.free_head
            store_u8(packed_entry(self, i), 0)
            store_release_u16(packed_entry(self, i) + PACKED_NEXT, self.free_head)
            self.free_head = <uint16_t>i
    inflight_store_heads(self, self.free_head, self.free_head)
    inflight_store_used(self, ring.next_used, ring.used_wrap, ring.next_used, ring.used_wrap)


cdef inline void inflight_start_packed(vring_t *ring, unfinished_t *found, uint8_t *kind) noexcept nogil:
    if inflight_is_fresh(ring):
        packed_start_afresh(ring)
        return
    if packed_settle_last_batch(ring):
        packed_clear_free(ring, kind)
        if packed_find_unfinished(ring, found, kind):
            packed_rebuild_free(ring, kind)
            return
    # The record is damaged; where the ring stands is then the front end's word.
    packed_start_afresh(ring)


cdef inline bint inflight_start(vring_t *ring, char *region) noexcept nogil:
    """Begin to record in *region* and take over what it holds; positions may move. False when out of memory."""
    cdef unfinished_t *found = <unfinished_t *>calloc(ring.num, sizeof(unfinished_t))
    cdef uint8_t *kind = <uint8_t *>calloc(ring.num, 1)
    cdef bint ready = inflight_reserve(&ring.inflight, ring.num) and found != NULL and kind != NULL
    if ready:
        ring.inflight.region = region
        if ring.packed:
            inflight_start_packed(ring, found, kind)
        else:
            inflight_start_split(ring, found)
    free(found)
    free(kind)
    return ready
