"""Owns one buffer chain as the device sees it: the segments of a request, gathered and checked, of either ring format.

A chain is a readable part followed by a writable part; the last writable byte is the status (virtio 1.3, 5.2.6).
Message framing is free (2.7.4.1), so nothing here expects a header or a status in a descriptor of its own. A segment
that does not translate makes the chain *unusable*, which the guest learns from the status byte; a chain that breaks
the rules of the ring, or has no status byte, breaks the queue. Sizes in bytes. Knows no ring layout and no command.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.gmem cimport gmem_at, gmem_at_write, gmem_iov, gmem_t
from ocssd_daemon.native.sys cimport iovec

cdef extern from *:
    """
    #include <string.h>
    /* The guest may change the source at any time: after the barrier the compiler must use the copy. */
    static inline void ocssd_copy_once(void *to, const void *from, size_t bytes) {
        memcpy(to, from, bytes);
        __asm__ __volatile__("" ::: "memory");
    }
    """
    void copy_once "ocssd_copy_once" (void *to, const void *source, size_t bytes) noexcept nogil


cdef enum:
    CHAIN_SEGMENTS = 128        # descriptors of one request: seg_max data segments, header and status
    CHAIN_IOVECS = 256          # some more, for buffers that span adjoining regions
    CHAIN_BYTES_MAX = 1 << 30   # more in one request is answered with an I/O error

# Why a ring broke; the low byte of a report, and the index of the sentence in _vhost.pyx.
cdef enum:
    FAULT_NONE = 0
    FAULT_AVAIL_JUMP
    FAULT_HEAD_RANGE
    FAULT_NEXT_RANGE
    FAULT_CHAIN_LOOP
    FAULT_CHAIN_LONG
    FAULT_DUPLICATE
    FAULT_ORDER
    FAULT_NO_STATUS
    FAULT_INDIRECT
    FAULT_PACKED_FLAGS
    FAULT_UNMAPPED
    FAULT_INFLIGHT
    FAULT_BASE
    FAULT_MEMORY
    FAULT_MEMORY_LOST
    FAULT_COUNT


ctypedef struct chain_t:
    uint16_t id                 # head index (split) or buffer id (packed)
    uint16_t ring_slots         # descriptors it occupies in the ring itself
    bint unusable               # a segment is empty, unmapped or too large: answer with an error status
    uint32_t segments
    uint32_t writable_segments
    uint32_t first              # first iovec not yet consumed
    uint32_t readable           # iovecs before this are readable, from here on writable
    uint32_t count
    uint64_t readable_bytes
    uint64_t writable_bytes     # without the status byte, once closed
    uint64_t last_gpa           # the last writable segment: it ends with the status byte
    uint32_t last_bytes
    uint8_t *status
    uint64_t status_gpa
    iovec iov[CHAIN_IOVECS]
    uint64_t gpa[CHAIN_IOVECS]  # where each iovec is in guest memory, for the dirty log


cdef inline void chain_begin(chain_t *self, uint16_t id) noexcept nogil:
    self.id = id
    self.ring_slots = 1
    self.unusable = False
    self.segments = 0
    self.writable_segments = 0
    self.first = 0
    self.readable = 0
    self.count = 0
    self.readable_bytes = 0
    self.writable_bytes = 0


cdef inline void chain_span(chain_t *self, gmem_t *memory, uint64_t gpa, uint32_t length_bytes,
                            bint write) noexcept nogil:
    """Append a segment that does not lie in one region: it may lie in several, or nowhere."""
    cdef int pieces = gmem_iov(memory, gpa, length_bytes, write, &self.iov[self.count], CHAIN_IOVECS - <int>self.count)
    cdef int _i
    if pieces <= 0:
        self.unusable = True
        return
    for _i in range(pieces):
        self.gpa[self.count] = gpa
        gpa += self.iov[self.count].iov_len
        self.count += 1


cdef inline void chain_append(chain_t *self, gmem_t *memory, uint64_t gpa, uint32_t length_bytes,
                              bint write) noexcept nogil:
    cdef char *at = gmem_at_write(memory, gpa, length_bytes) if write else gmem_at(memory, gpa, length_bytes)
    if at == NULL or length_bytes == 0 or self.count == CHAIN_IOVECS:
        chain_span(self, memory, gpa, length_bytes, write)
        return
    self.iov[self.count].iov_base = at
    self.iov[self.count].iov_len = length_bytes
    self.gpa[self.count] = gpa
    self.count += 1


cdef inline int chain_add(chain_t *self, gmem_t *memory, uint64_t gpa, uint32_t length_bytes,
                          bint write) noexcept nogil:
    """One descriptor, in ring order; FAULT_NONE or why the ring is broken."""
    if self.segments == CHAIN_SEGMENTS:
        return FAULT_CHAIN_LONG
    self.segments += 1
    if write:
        self.writable_segments += 1
        self.writable_bytes += length_bytes
        self.last_gpa = gpa
        self.last_bytes = length_bytes
        chain_append(self, memory, gpa, length_bytes, True)
        return FAULT_NONE
    if self.writable_segments:
        return FAULT_ORDER
    self.readable_bytes += length_bytes
    chain_append(self, memory, gpa, length_bytes, False)
    self.readable = self.count
    return FAULT_NONE


cdef inline int chain_close(chain_t *self, gmem_t *memory) noexcept nogil:
    """All descriptors are in: take the status byte off the end; FAULT_NONE or FAULT_NO_STATUS."""
    if self.writable_segments == 0 or self.last_bytes == 0:
        return FAULT_NO_STATUS
    self.status_gpa = self.last_gpa + self.last_bytes - 1
    self.status = <uint8_t *>gmem_at_write(memory, self.status_gpa, 1)
    if self.status == NULL or self.status_gpa < self.last_gpa:
        return FAULT_NO_STATUS
    self.writable_bytes -= 1
    if self.readable_bytes + self.writable_bytes > CHAIN_BYTES_MAX:
        self.unusable = True
    if self.unusable:
        return FAULT_NONE
    self.iov[self.count - 1].iov_len -= 1
    if self.iov[self.count - 1].iov_len == 0:
        self.count -= 1
    return FAULT_NONE


cdef inline void chain_skip(chain_t *self, uint64_t length_bytes) noexcept nogil:
    """Drop *length_bytes* from the front; the caller knows that they are there."""
    cdef iovec *iov
    cdef uint64_t step
    while length_bytes != 0:
        iov = &self.iov[self.first]
        step = iov.iov_len if iov.iov_len < length_bytes else length_bytes
        iov.iov_base = <char *>iov.iov_base + step
        iov.iov_len -= step
        self.gpa[self.first] += step
        length_bytes -= step
        if iov.iov_len == 0:
            self.first += 1


cdef inline void chain_pull(chain_t *self, void *to, uint64_t length_bytes) noexcept nogil:
    """Copy *length_bytes* (which the readable part has) from the front, once, and drop them."""
    cdef char *out = <char *>to
    cdef iovec *iov
    cdef uint64_t step
    self.readable_bytes -= length_bytes
    while length_bytes != 0:
        iov = &self.iov[self.first]
        step = iov.iov_len if iov.iov_len < length_bytes else length_bytes
        copy_once(out, iov.iov_base, step)
        out += step
        length_bytes -= step
        chain_skip(self, step)


cdef inline uint32_t chain_window(chain_t *self, uint64_t length_bytes, uint64_t *cut_bytes) noexcept nogil:
    """How many iovecs from the front cover *length_bytes*; the last is shortened, *cut_bytes* restores it."""
    cdef uint32_t i = self.first
    while self.iov[i].iov_len < length_bytes:
        length_bytes -= self.iov[i].iov_len
        i += 1
    cut_bytes[0] = self.iov[i].iov_len - length_bytes
    self.iov[i].iov_len = length_bytes
    return i + 1 - self.first
