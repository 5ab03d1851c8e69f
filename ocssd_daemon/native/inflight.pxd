"""Owns the in-flight record (VHOST_USER_SET_INFLIGHT_FD): what lets a successor finish our requests, each exactly once.

Layouts and the order of the steps: vhost-user specification, "Inflight I/O tracking". At run time the shared region
is only written, never read: decisions are made on our own copies. It is read once, by the successor, which trusts
nothing in it: a record that does not hold together is started afresh. A ring that stopped cleanly has nothing in
flight and marks its record fresh (version 0), because its next start may be another driver's.

Split header: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16; entries of 16 bytes by head.
Packed header: features u64, version u16, desc_num u16, then one word (free_head, old_free_head), then one word
(used_idx, old_used_idx, used_wrap u8, old_used_wrap u8, pad u16), pad; entries of 32 bytes at 32. The two words are
stored at once, so that a kill never leaves half of one.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.chain cimport copy_once
from ocssd_daemon.native.sys cimport store_release_u16, store_release_u32, store_release_u64
from ocssd_daemon.native.vring cimport inflight_t, packed_desc_t, vring_used_t

cdef extern from *:
    """
    static inline uint8_t ocssd_load_u8(const void *p) { return __atomic_load_n((const uint8_t *)p, __ATOMIC_ACQUIRE); }
    static inline void ocssd_store_u8(void *p, uint8_t v) { __atomic_store_n((uint8_t *)p, v, __ATOMIC_RELEASE); }
    """
    uint8_t load_u8 "ocssd_load_u8" (const void *p) noexcept nogil
    void store_u8 "ocssd_store_u8" (void *p, uint8_t v) noexcept nogil


cdef enum:
    INFLIGHT_VERSION = 1
    INFLIGHT_ALIGN = 64         # a queue's region is padded to this
    INFLIGHT_END = 0xffff       # end of the free list

    AT_VERSION = 8
    AT_DESC_NUM = 10
    AT_LAST_BATCH = 12          # split
    AT_USED_IDX = 14
    AT_FREE_WORD = 12           # packed
    AT_USED_WORD = 16

    SPLIT_HEADER = 16
    SPLIT_ENTRY = 16
    SPLIT_NEXT = 6
    PACKED_HEADER = 32
    PACKED_ENTRY = 32
    PACKED_NEXT = 2
    PACKED_LAST = 4
    PACKED_NUM = 6
    PACKED_DESC = 16
    ENTRY_COUNTER = 8


# The descriptor inside a packed entry is ordered otherwise than in the ring.
ctypedef struct packed_shadow_t:
    uint16_t id
    uint16_t flags
    uint32_t length_bytes
    uint64_t gpa


cdef inline uint64_t inflight_queue_bytes(uint32_t queue_size, bint packed) noexcept nogil:
    cdef uint64_t used = PACKED_HEADER + PACKED_ENTRY * <uint64_t>queue_size if packed \
        else SPLIT_HEADER + SPLIT_ENTRY * <uint64_t>queue_size
    return (used + INFLIGHT_ALIGN - 1) & ~<uint64_t>(INFLIGHT_ALIGN - 1)


cdef inline char *split_entry(inflight_t *self, uint32_t head) noexcept nogil:
    return self.region + SPLIT_HEADER + SPLIT_ENTRY * head


cdef inline char *packed_entry(inflight_t *self, uint32_t entry) noexcept nogil:
    return self.region + PACKED_HEADER + PACKED_ENTRY * entry


# ---- recording, split ------------------------------------------------------------------------------------------------

cdef inline void inflight_split_taken(inflight_t *self, uint16_t head) noexcept nogil:
    cdef char *entry
    if self.region == NULL:
        return
    entry = split_entry(self, head)
    store_release_u64(entry + ENTRY_COUNTER, self.counter)
    self.counter += 1
    store_u8(entry, 1)


cdef inline void inflight_split_linked(inflight_t *self, const vring_used_t *batch, uint32_t count) noexcept nogil:
    """Before the used index moves: chain the batch, so that a successor can find what it completed."""
    cdef uint32_t i
    if self.region == NULL:
        return
    for i in range(count):
        store_release_u16(split_entry(self, batch[i].id) + SPLIT_NEXT, self.last_batch)
        self.last_batch = batch[i].id
    store_release_u16(self.region + AT_LAST_BATCH, self.last_batch)


cdef inline void inflight_split_cleared(inflight_t *self, const vring_used_t *batch, uint32_t count,
                                        uint16_t used_idx) noexcept nogil:
    """After the used index moved: the batch is no longer in flight."""
    cdef uint32_t i
    if self.region == NULL:
        return
    for i in range(count):
        store_u8(split_entry(self, batch[i].id), 0)
    store_release_u16(self.region + AT_USED_IDX, used_idx)


# ---- recording, packed -----------------------------------------------------------------------------------------------

cdef inline void inflight_store_heads(inflight_t *self, uint16_t free_head, uint16_t old_free_head) noexcept nogil:
    store_release_u32(self.region + AT_FREE_WORD, free_head | <uint32_t>old_free_head << 16)


cdef inline void inflight_store_used(inflight_t *self, uint16_t used, uint8_t wrap, uint16_t old_used,
                                     uint8_t old_wrap) noexcept nogil:
    store_release_u64(self.region + AT_USED_WORD,
                      used | <uint64_t>old_used << 16 | <uint64_t>wrap << 32 | <uint64_t>old_wrap << 40)


cdef inline void inflight_packed_shadow(inflight_t *self, const packed_desc_t *desc, uint32_t position) noexcept nogil:
    """Copy the chain's *position*-th descriptor (from 1) into the next free entry; nothing is committed yet."""
    cdef packed_shadow_t *shadow
    if self.region == NULL:
        return
    if position == 1:
        self.tail = self.free_head
    elif self.tail != INFLIGHT_END:
        self.tail = self.next[self.tail]
    if self.tail == INFLIGHT_END:           # the driver offers more than the ring holds: the caller refuses it
        return
    shadow = <packed_shadow_t *>(packed_entry(self, self.tail) + PACKED_DESC)
    shadow.id = desc.id
    shadow.flags = desc.flags
    shadow.length_bytes = desc.length_bytes
    shadow.gpa = desc.gpa


cdef inline void inflight_packed_taken(inflight_t *self, uint16_t id, uint16_t slots) noexcept nogil:
    """Commit the shadowed chain: moving the old free head past it is the step that counts."""
    cdef uint16_t head = self.free_head
    cdef char *entry
    if self.region == NULL:
        return
    entry = packed_entry(self, head)
    store_release_u16(entry + PACKED_NUM, slots)
    store_release_u16(entry + PACKED_LAST, self.tail)
    store_release_u64(entry + ENTRY_COUNTER, self.counter)
    self.counter += 1
    store_u8(entry, 1)
    self.last[head] = self.tail
    self.entry_of_id[id] = head
    self.free_head = self.next[self.tail]
    inflight_store_heads(self, self.free_head, self.free_head)


cdef inline void inflight_packed_linked(inflight_t *self, const vring_used_t *batch, uint32_t count, uint16_t old_used,
                                        uint8_t old_wrap, uint16_t used, uint8_t wrap) noexcept nogil:
    """Before the ring's first descriptor is written: free the batch's entries, keeping the old state beside the new."""
    cdef uint16_t old_free_head = self.free_head
    cdef uint16_t head
    cdef uint32_t i
    if self.region == NULL:
        return
    for i in range(count):
        head = self.entry_of_id[batch[i].id]
        self.next[self.last[head]] = self.free_head
        store_release_u16(packed_entry(self, self.last[head]) + PACKED_NEXT, self.free_head)
        self.free_head = head
    inflight_store_heads(self, self.free_head, old_free_head)
    inflight_store_used(self, used, wrap, old_used, old_wrap)


cdef inline void inflight_packed_cleared(inflight_t *self, const vring_used_t *batch, uint32_t count, uint16_t used,
                                         uint8_t wrap) noexcept nogil:
    """After the ring shows the batch: the new state is the only one."""
    cdef uint32_t i
    if self.region == NULL:
        return
    for i in range(count):
        store_u8(packed_entry(self, self.entry_of_id[batch[i].id]), 0)
    inflight_store_heads(self, self.free_head, self.free_head)
    inflight_store_used(self, used, wrap, used, wrap)


cdef inline void inflight_read_shadow(inflight_t *self, uint16_t entry, packed_desc_t *desc) noexcept nogil:
    cdef packed_shadow_t shadow
    copy_once(&shadow, packed_entry(self, entry) + PACKED_DESC, sizeof(shadow))
    desc.gpa = shadow.gpa
    desc.length_bytes = shadow.length_bytes
    desc.id = shadow.id
    desc.flags = shadow.flags
