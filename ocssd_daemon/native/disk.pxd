# cython: cdivision=True
"""Owns the block view: byte ranges in logical blocks, over an FTL that knows whole sectors only.

A block may be smaller than a sector: such a write copies the old sector into the new place and lays the new bytes over it
before the map changes, so it is atomic. All functions return 0 or a positive errno. Offsets and lengths are bytes.
After each call ``done_at_ns`` is 0, or the CLOCK_MONOTONIC deadline before which the completion must not be posted.

Knows no transport: callers hand in plain buffers that they have checked.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ocssd_daemon.native.ftl cimport (
    NO_PPA, ftl_lookup, ftl_program_buffers, ftl_sense, ftl_t, ftl_trim, may_be_lost,
)
from ocssd_daemon.native.gc cimport ftl_commit, ftl_pay, ftl_read_fails, ftl_slot, host_sync
from ocssd_daemon.native.media cimport media_begin, media_data, media_done_ns
from ocssd_daemon.native.sys cimport copies_end, copy_past_cache, iovec, prefetch
from ocssd_daemon.native.timing cimport timing_wait_for

cdef extern from "errno.h" nogil:
    int EINVAL
    int EIO
    int ENOSPC
    int EPERM

cdef enum:
    DISK_FUA = 1
    DISK_UNMAP = 2              # write_zeroes may deallocate
    DISK_PIECE_BYTES = 1 << 20      # discards and write_zeroes: longest piece that keeps one poll near 1 ms
    EXTENT_SECTORS = 65536      # sectors that one extent query looks at


ctypedef struct disk_t:
    ftl_t *ftl
    uint64_t size_bytes
    uint32_t block_bytes
    uint32_t sector_bytes
    uint32_t sector_shift
    bint read_only
    uint64_t done_at_ns
    uint64_t store_full_seen


ctypedef struct cursor_t:       # a place in an iovec array
    const iovec *iov
    size_t used


cdef inline void disk_begin(disk_t *d) noexcept nogil:
    d.done_at_ns = 0
    media_begin(d.ftl.media)


cdef inline int disk_end(disk_t *d, int failed) noexcept nogil:
    """Note when the request ends; failures end at once. Returns *failed*."""
    d.done_at_ns = 0 if failed else media_done_ns(d.ftl.media)
    return failed


cdef inline void disk_answer_first(disk_t *d) noexcept nogil:
    """From here to ``disk_pay`` writes leave GC's share for later: answers go out first. Not where time is simulated."""
    d.ftl.pays_later = d.ftl.media.timing == NULL


cdef inline void disk_pay(disk_t *d) noexcept nogil:
    """Nobody waits now: GC takes its share."""
    ftl_pay(d.ftl)
    d.ftl.pays_later = False


cdef inline int disk_check(const disk_t *d, uint64_t offset, uint64_t length) noexcept nogil:
    """Block-aligned and inside the disk, without overflow."""
    if (offset | length) & (d.block_bytes - 1):
        return EINVAL
    if length > d.size_bytes or offset > d.size_bytes - length:
        return EINVAL
    return 0


cdef inline void disk_prefetch_map(const disk_t *d, uint64_t offset) noexcept nogil:
    """A hint: *offset* will be read or written soon. Any value will do."""
    if offset < d.size_bytes:
        prefetch(&d.ftl.l2p[offset >> d.sector_shift])


cdef inline void disk_prefetch_data(const disk_t *d, uint64_t offset) noexcept nogil:
    """A hint: *offset*, whose map entry is at hand, will be read next."""
    cdef const char *sector
    if offset < d.size_bytes:
        sector = ftl_lookup(d.ftl, <uint32_t>(offset >> d.sector_shift))
        if sector != NULL:
            prefetch(sector)


cdef inline void cursor_skip(cursor_t *c) noexcept nogil:
    while c.used == c.iov.iov_len:
        c.iov += 1
        c.used = 0


cdef inline void gather(cursor_t *c, char *target, size_t n) noexcept nogil:
    """Copy the next *n* bytes of the iovec array to *target*."""
    cdef size_t piece
    while n:
        cursor_skip(c)
        piece = min(n, c.iov.iov_len - c.used)
        copy_past_cache(target, <const char *>c.iov.iov_base + c.used, piece)
        target += piece
        c.used += piece
        n -= piece


cdef inline void scatter(cursor_t *c, const char *source, size_t n) noexcept nogil:
    """Copy *n* bytes (zeros when *source* is NULL) to the next place of the iovec array."""
    cdef size_t piece
    while n:
        cursor_skip(c)
        piece = min(n, c.iov.iov_len - c.used)
        if source != NULL:
            memcpy(<char *>c.iov.iov_base + c.used, source, piece)
            source += piece
        else:
            memset(<char *>c.iov.iov_base + c.used, 0, piece)
        c.used += piece
        n -= piece


cdef inline int disk_read(disk_t *d, uint64_t offset, const iovec *iov, int iovcnt, uint64_t length) noexcept nogil:
    cdef cursor_t c
    cdef const char *sector
    cdef uint32_t within, n
    cdef int failed = disk_check(d, offset, length)
    disk_begin(d)
    if failed:
        return failed
    c.iov = iov
    c.used = 0
    while length:
        within = offset & (d.sector_bytes - 1)
        n = <uint32_t>min(<uint64_t>(d.sector_bytes - within), length)
        if may_be_lost(d.ftl) and ftl_read_fails(d.ftl, <uint32_t>(offset >> d.sector_shift)):
            return disk_end(d, EIO)
        sector = ftl_lookup(d.ftl, <uint32_t>(offset >> d.sector_shift))
        scatter(&c, sector + within if sector != NULL else NULL, n)
        if d.ftl.media.timing != NULL:
            ftl_sense(d.ftl, <uint32_t>(offset >> d.sector_shift))
        d.ftl.user_sectors_read += 1
        offset += n
        length -= n
    return disk_end(d, 0)


cdef inline int disk_no_space(disk_t *d) noexcept nogil:
    """Why a sector could not be placed: the host's disk is full, or the flash has no spare space left."""
    if d.ftl.media.store_full != d.store_full_seen:
        d.store_full_seen = d.ftl.media.store_full
        return ENOSPC
    return EIO


cdef inline int write_part(disk_t *d, uint64_t offset, cursor_t *c, uint32_t n) noexcept nogil:
    """Write *n* bytes that lie in one sector; a NULL cursor writes zeros. A part needs the rest to be readable."""
    cdef uint32_t lba = <uint32_t>(offset >> d.sector_shift)
    cdef uint32_t within = offset & (d.sector_bytes - 1)
    cdef uint32_t ppa
    cdef const char *old
    cdef char *sector
    if n < d.sector_bytes:
        if may_be_lost(d.ftl) and ftl_read_fails(d.ftl, lba):
            return EIO
        if d.ftl.media.timing != NULL:
            ftl_sense(d.ftl, lba)
    ppa = ftl_slot(d.ftl)
    if ppa == <uint32_t>NO_PPA:
        return disk_no_space(d)
    sector = media_data(d.ftl.media, ppa)
    if n < d.sector_bytes:
        # Looked up after ftl_slot: making room may have moved the old sector.
        old = ftl_lookup(d.ftl, lba)
        if old != NULL:
            memcpy(sector, old, d.sector_bytes)
        else:
            memset(sector, 0, d.sector_bytes)
    if c != NULL:
        gather(c, sector + within, n)
    else:
        memset(sector + within, 0, n)
    ftl_commit(d.ftl, lba)
    return 0


cdef inline int write_range(disk_t *d, uint64_t offset, cursor_t *c, uint64_t length) noexcept nogil:
    cdef uint32_t n
    cdef int failed = 0
    while length:
        n = <uint32_t>min(<uint64_t>(d.sector_bytes - (offset & (d.sector_bytes - 1))), length)
        failed = write_part(d, offset, c, n)
        if failed:
            break
        offset += n
        length -= n
    copies_end()
    return failed


cdef inline int disk_harden(disk_t *d) noexcept nogil:
    """Program the write buffers; with durability host, also bring the image to the host's disk."""
    ftl_program_buffers(d.ftl)
    if d.ftl.media.timing != NULL:
        timing_wait_for(d.ftl.media.timing, &d.ftl.media.timing.flushed)
    return host_sync(d.ftl) if d.ftl.host_durable else 0


cdef inline int disk_flush(disk_t *d) noexcept nogil:
    disk_begin(d)
    return disk_end(d, disk_harden(d))


cdef inline int disk_check_write(disk_t *d, uint64_t offset, uint64_t length) noexcept nogil:
    disk_begin(d)
    return EPERM if d.read_only else disk_check(d, offset, length)


cdef inline int disk_write(disk_t *d, uint64_t offset, const iovec *iov, int iovcnt, uint64_t length, int flags) noexcept nogil:
    cdef cursor_t c
    cdef int failed = disk_check_write(d, offset, length)
    c.iov = iov
    c.used = 0
    if not failed:
        failed = write_range(d, offset, &c, length)
    if not failed and flags & DISK_FUA:
        failed = disk_harden(d)
    return disk_end(d, failed)


cdef inline uint64_t whole_sectors(const disk_t *d, uint64_t offset, uint64_t length, uint64_t *first) noexcept nogil:
    """Sectors that lie entirely in the range; *first* gets the lba of the first."""
    cdef uint64_t last = (offset + length) >> d.sector_shift
    first[0] = (offset + d.sector_bytes - 1) >> d.sector_shift
    return last - first[0] if last > first[0] else 0


cdef inline int disk_discard(disk_t *d, uint64_t offset, uint64_t length) noexcept nogil:
    """Unmap the sectors that lie entirely in the range; parts of sectors at its edges keep their content."""
    cdef uint64_t first
    cdef uint64_t n
    cdef int failed = disk_check_write(d, offset, length)
    if failed:
        return failed
    n = whole_sectors(d, offset, length, &first)
    ftl_trim(d.ftl, <uint32_t>first, <uint32_t>n)
    return disk_end(d, 0)


cdef inline int disk_write_zeroes(disk_t *d, uint64_t offset, uint64_t length, int flags) noexcept nogil:
    """The range reads as zeros afterwards, and after a crash. Unmapped when that is allowed and as durable as data.

    With durability host an unmapped entry is less durable than data (no out-of-band entry remembers it), so zeros are
    written there.
    """
    cdef uint64_t first, head, n
    cdef int failed = disk_check_write(d, offset, length)
    if failed:
        return failed
    n = whole_sectors(d, offset, length, &first)
    if n == 0 or not flags & DISK_UNMAP or d.ftl.host_durable:
        failed = write_range(d, offset, NULL, length)
    else:
        head = (first << d.sector_shift) - offset
        failed = write_range(d, offset, NULL, head)
        if not failed:
            ftl_trim(d.ftl, <uint32_t>first, <uint32_t>n)
            failed = write_range(d, (first + n) << d.sector_shift, NULL, length - head - (n << d.sector_shift))
    if not failed and flags & DISK_FUA:
        failed = disk_harden(d)
    return disk_end(d, failed)


cdef inline int disk_extent(disk_t *d, uint64_t offset, uint64_t end, uint64_t *length) noexcept nogil:
    """1 when *offset* is mapped, 0 for a hole; *length* is how far that holds, looking at EXTENT_SECTORS at most."""
    cdef uint64_t lba = offset >> d.sector_shift
    cdef uint64_t stop = min((end + d.sector_bytes - 1) >> d.sector_shift, lba + EXTENT_SECTORS)
    cdef bint mapped = d.ftl.l2p[lba] != 0
    lba += 1
    while lba < stop and (d.ftl.l2p[lba] != 0) == mapped:
        lba += 1
    length[0] = min(lba << d.sector_shift, end) - offset
    return mapped
