"""Owns the dirty log of a live migration (VHOST_USER_SET_LOG_BASE): one bit per 4 KiB guest page that we wrote.

Bits are set with an atomic OR, because the front end clears them while we run, and always *after* the write they stand
for: set before, the page could be copied in its old state and forgotten. A page beyond the log is dropped. Addresses
are guest-physical, sizes in bytes.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ocssd_daemon.native.foreign cimport foreign_map, foreign_t, foreign_unmap
from ocssd_daemon.native.sys cimport iovec

cdef extern from *:
    """
    static inline void ocssd_atomic_or_u8(void *p, uint8_t bits) {
        __atomic_fetch_or((uint8_t *)p, bits, __ATOMIC_SEQ_CST);
    }
    """
    void atomic_or_u8 "ocssd_atomic_or_u8" (void *p, uint8_t bits) noexcept nogil


cdef enum:
    DIRTYLOG_PAGE_SHIFT = 12


ctypedef struct dirtylog_t:
    foreign_t map
    bint active                 # VHOST_F_LOG_ALL is acknowledged


cdef inline void dirtylog_mark(dirtylog_t *self, uint64_t gpa, uint64_t length_bytes) noexcept nogil:
    cdef uint64_t page = gpa >> DIRTYLOG_PAGE_SHIFT
    cdef uint64_t last = (gpa + length_bytes - 1) >> DIRTYLOG_PAGE_SHIFT
    if length_bytes == 0 or gpa + length_bytes - 1 < gpa:
        return
    while page <= last and page >> 3 < self.map.size_bytes:
        atomic_or_u8(self.map.at + (page >> 3), <uint8_t>(1 << (page & 7)))
        page += 1


cdef inline void dirtylog_mark_iov(dirtylog_t *self, const uint64_t *gpa, const iovec *iov,
                                   uint32_t count) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        dirtylog_mark(self, gpa[i], iov[i].iov_len)


cdef inline const char *dirtylog_attach(dirtylog_t *self, int fd, uint64_t size_bytes, uint64_t offset_bytes,
                                        uint32_t *poisoned) noexcept nogil:
    """Replace the log by the peer's file; NULL, or why not (then the old one stays)."""
    cdef foreign_t map
    cdef const char *refusal = foreign_map(&map, fd, size_bytes, offset_bytes, True, poisoned)
    if refusal == NULL:
        foreign_unmap(&self.map)
        self.map = map
    return refusal


cdef inline void dirtylog_detach(dirtylog_t *self) noexcept nogil:
    foreign_unmap(&self.map)
    self.active = False
