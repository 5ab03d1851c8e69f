"""Owns the walk over a data pointer: PRP or SGL in, host pointers out, every entry copied once and checked.

NVM Express Base 1.3, 4.3 (PRP) and 4.4 (SGL). The transfer length bounds the walk of PRPs, so lists that loop end; SGLs may
have empty descriptors and are bounded by their number. A piece must
lie in mapped guest memory that may be used in that direction. Results are status values. Bytes throughout.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

from ocssd_daemon.native.gmem cimport GMEM_NONE, gmem_iov, gmem_t
from ocssd_daemon.native.nvme_wire cimport (
    NVME_DATA_SGL_LENGTH, NVME_DATA_TRANSFER, NVME_INTERNAL, NVME_INVALID_FIELD, NVME_OK, NVME_PRP_OFFSET,
    NVME_SGL_SEGMENT, NVME_SGL_TYPE, sgl_t, sqe_t,
)
from ocssd_daemon.native.sys cimport iovec

cdef enum:
    SGL_DATA_BLOCK = 0
    SGL_BIT_BUCKET = 1
    SGL_SEGMENT = 2
    SGL_LAST_SEGMENT = 3
    SGL_SEGMENTS_MAX = 256      # segments of one command, and
    SGL_DESCRIPTORS_MAX = 4096  # descriptors in them; the same in nvme/pointers.py
    PIECES_PER_RANGE = 8        # regions that one contiguous guest range may run over
    LIST_CHUNK = 64             # list entries that are copied at a time


ctypedef struct pieces_t:       # host memory, in the order of the transfer
    iovec *iov
    uint32_t count
    uint32_t capacity
    gmem_t *memory
    bint to_guest               # we write into the guest


cdef inline int pieces_add(pieces_t *p, uint64_t address, uint64_t length) noexcept nogil:
    """Append a guest range; joined with the piece before it when the two adjoin on our side too."""
    cdef iovec *grown
    cdef iovec *last
    cdef int n
    if p.count + PIECES_PER_RANGE > p.capacity:
        grown = <iovec *>realloc(p.iov, (2 * p.capacity + 64) * sizeof(iovec))
        if grown == NULL:
            return NVME_INTERNAL
        p.iov = grown
        p.capacity = 2 * p.capacity + 64
    n = gmem_iov(p.memory, address, length, p.to_guest, p.iov + p.count, PIECES_PER_RANGE)
    if n == GMEM_NONE:
        return NVME_DATA_TRANSFER
    if n == 1 and p.count:
        last = &p.iov[p.count - 1]
        if <char *>last.iov_base + last.iov_len == <char *>p.iov[p.count].iov_base:
            last.iov_len += p.iov[p.count].iov_len
            return NVME_OK
    p.count += n
    return NVME_OK


cdef inline int guest_copy_in(gmem_t *memory, uint64_t address, void *target, uint64_t length) noexcept nogil:
    """Copy guest bytes out of the guest, once."""
    cdef iovec iov[PIECES_PER_RANGE]
    cdef char *at = <char *>target
    cdef int i, n = gmem_iov(memory, address, length, False, iov, PIECES_PER_RANGE)
    if n == GMEM_NONE:
        return NVME_DATA_TRANSFER
    for i in range(n):
        memcpy(at, iov[i].iov_base, iov[i].iov_len)
        at += iov[i].iov_len
    return NVME_OK


cdef inline int guest_copy_out(gmem_t *memory, uint64_t address, const void *source, uint64_t length) noexcept nogil:
    cdef iovec iov[PIECES_PER_RANGE]
    cdef const char *at = <const char *>source
    cdef int i, n = gmem_iov(memory, address, length, True, iov, PIECES_PER_RANGE)
    if n == GMEM_NONE:
        return NVME_DATA_TRANSFER
    for i in range(n):
        memcpy(iov[i].iov_base, at, iov[i].iov_len)
        at += iov[i].iov_len
    return NVME_OK


# --- PRP ----------------------------------------------------------------------------------------------------------

cdef inline int prp_list(pieces_t *p, uint64_t list, uint64_t left, uint64_t page) noexcept nogil:
    """The pages after the first. The last entry of a list page points to the next one when more pages follow."""
    cdef uint64_t entries[LIST_CHUNK]
    cdef uint64_t pages, room
    cdef uint32_t n, i
    cdef int status
    if list & 7:
        return NVME_PRP_OFFSET
    while left:
        pages = (left + page - 1) // page
        room = (page - (list & (page - 1))) >> 3
        if room == 1 and pages > 1:         # only the link is left in this list page
            status = guest_copy_in(p.memory, list, entries, 8)
            if status != NVME_OK or entries[0] & (page - 1):
                return status if status != NVME_OK else NVME_PRP_OFFSET
            list = entries[0]
            continue
        n = <uint32_t>min(min(pages, room if pages <= room else room - 1), <uint64_t>LIST_CHUNK)
        status = guest_copy_in(p.memory, list, entries, n * 8)
        if status != NVME_OK:
            return status
        list += n * 8
        for i in range(n):
            if entries[i] & (page - 1):
                return NVME_PRP_OFFSET
            status = pieces_add(p, entries[i], min(left, page))
            if status != NVME_OK:
                return status
            left -= min(left, page)
    return NVME_OK


cdef inline int prp_walk(pieces_t *p, uint64_t prp1, uint64_t prp2, uint64_t length, uint64_t page) noexcept nogil:
    cdef uint64_t first = min(length, page - (prp1 & (page - 1)))
    cdef int status
    if prp1 & 3:
        return NVME_PRP_OFFSET
    status = pieces_add(p, prp1, first)
    length -= first
    if status != NVME_OK or length == 0:
        return status
    if length > page:
        return prp_list(p, prp2, length, page)
    if prp2 & (page - 1):
        return NVME_PRP_OFFSET
    return pieces_add(p, prp2, length)


# --- SGL ----------------------------------------------------------------------------------------------------------

ctypedef struct sgl_walk_t:
    uint64_t left               # bytes of the transfer still without a place
    uint64_t segment            # of descriptors that comes next, 0: none
    uint32_t segment_bytes
    uint32_t descriptors        # in all segments so far
    bint last                   # that segment must not link on


cdef inline int sgl_take(pieces_t *p, sgl_walk_t *w, const sgl_t *d, bint ends_segment) noexcept nogil:
    """One descriptor: a data block, or the link at the end of a segment."""
    cdef uint32_t kind = d.identifier >> 4
    cdef uint64_t take
    if d.identifier & 0xf or kind > SGL_LAST_SEGMENT or kind == SGL_BIT_BUCKET:
        return NVME_SGL_TYPE
    if kind == SGL_DATA_BLOCK:
        take = min(w.left, <uint64_t>d.length)
        w.left -= take
        return pieces_add(p, d.address, take) if take else NVME_OK
    if not ends_segment or w.last or d.length == 0 or d.length & 15:
        return NVME_SGL_SEGMENT
    w.descriptors += d.length >> 4
    if w.descriptors > SGL_DESCRIPTORS_MAX:
        return NVME_SGL_SEGMENT
    w.segment = d.address
    w.segment_bytes = d.length
    w.last = kind == SGL_LAST_SEGMENT
    return NVME_OK


cdef inline int sgl_segment(pieces_t *p, sgl_walk_t *w) noexcept nogil:
    """All descriptors of the segment that *w* names."""
    cdef sgl_t d
    cdef uint64_t at = w.segment
    cdef uint32_t bytes = w.segment_bytes
    cdef int status = NVME_OK
    w.segment = 0
    while bytes and status == NVME_OK and (w.left or bytes == 16):
        status = guest_copy_in(p.memory, at, &d, 16)
        if status == NVME_OK:
            status = sgl_take(p, w, &d, bytes == 16)
        at += 16
        bytes -= 16
    return status


cdef inline int sgl_walk(pieces_t *p, const sqe_t *s, uint64_t length) noexcept nogil:
    cdef sgl_walk_t w
    cdef sgl_t first
    cdef int status, segments = 0
    memcpy(&first, &s.prp1, 16)
    w.left = length
    w.segment = 0
    w.descriptors = 0
    w.last = False
    status = sgl_take(p, &w, &first, True)
    while status == NVME_OK and w.segment and w.left:
        segments += 1
        if segments > SGL_SEGMENTS_MAX:
            return NVME_SGL_SEGMENT
        status = sgl_segment(p, &w)
    return NVME_DATA_SGL_LENGTH if status == NVME_OK and w.left else status


cdef inline int dptr_walk(pieces_t *p, const sqe_t *s, uint64_t length, uint64_t page) noexcept nogil:
    """Where *length* bytes of the command's data lie; *p* is emptied first."""
    cdef uint8_t psdt = s.flags >> 6
    p.count = 0
    if length == 0:
        return NVME_OK
    if psdt == 0:
        return prp_walk(p, s.prp1, s.prp2, length, page)
    return NVME_INVALID_FIELD if psdt == 3 else sgl_walk(p, s, length)
