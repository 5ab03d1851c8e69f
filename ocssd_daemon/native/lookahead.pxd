"""Owns the look-ahead: brings into the cache what the requests behind the present one will need.

A random read misses the cache six times in a row (descriptor, table, header, map entry, page walk, data), each miss
waiting for the one before. Copying 4 KiB gives time enough to have them for later requests meanwhile, so each is
taken a few requests before its use: descriptor and table TABLE_AHEAD, header and map entry MAP_AHEAD, data DATA_AHEAD.

All of it is a hint. What is read here is read again, once, and checked when the request is taken; a lie of the guest
warms the wrong line. Split rings only: the packed ring's next head is known only when the chain before is gathered.
"""

from libc.stdint cimport uint16_t, uint64_t

from ocssd_daemon.native.chain cimport copy_once
from ocssd_daemon.native.disk cimport disk_prefetch_data, disk_prefetch_map, disk_t
from ocssd_daemon.native.gmem cimport gmem_at
from ocssd_daemon.native.sys cimport load_acquire_u16, prefetch
from ocssd_daemon.native.vblk cimport VBLK_HEADER_BYTES, VBLK_T_IN, vblk_header_t, vblk_offset
from ocssd_daemon.native.vring cimport DESC_BYTES, DESC_F_INDIRECT, vring_desc_t, vring_t
from ocssd_daemon.native.vring_split cimport SPLIT_IDX, split_head

cdef enum:                      # in requests
    TABLE_AHEAD = 6
    MAP_AHEAD = 4
    DATA_AHEAD = 2
    LOOK_SLOTS = 8              # power of two > MAP_AHEAD

ctypedef struct lookahead_t:    # positions are the ring's, modulo 2^16
    uint16_t mapped             # before this one, map entries were asked for
    uint16_t fetched            # before this one, data was
    uint64_t read_offset_bytes[LOOK_SLOTS]      # by position; -1: not a read


cdef inline uint16_t look_waiting(vring_t *ring) noexcept nogil:
    """How many requests can be looked at. Near the end of what was seen, see whether the driver has added some."""
    cdef uint16_t waiting = <uint16_t>(ring.seen_avail - ring.next_avail)
    if waiting <= TABLE_AHEAD:
        waiting = <uint16_t>(load_acquire_u16(ring.avail + SPLIT_IDX) - ring.next_avail)
    return min(waiting, <uint16_t>ring.num)


cdef inline bint look_desc(vring_t *ring, uint16_t position, vring_desc_t *desc) noexcept nogil:
    """The first descriptor of the request at *position*, which the driver has made available."""
    cdef uint16_t head = split_head(ring, position)
    if head >= ring.num:
        return False
    copy_once(desc, ring.desc + head * DESC_BYTES, DESC_BYTES)
    return True


cdef inline void look_for_table(vring_t *ring, uint16_t position) noexcept nogil:
    cdef vring_desc_t desc
    cdef char *at
    if look_desc(ring, position, &desc):
        at = gmem_at(ring.memory, desc.gpa, DESC_BYTES)
        if at != NULL:
            prefetch(at)


cdef inline bint look_header(vring_t *ring, uint16_t position, vblk_header_t *header) noexcept nogil:
    cdef vring_desc_t desc
    cdef char *at
    if not look_desc(ring, position, &desc):
        return False
    if desc.flags & DESC_F_INDIRECT:
        at = gmem_at(ring.memory, desc.gpa, DESC_BYTES)
        if at == NULL:
            return False
        copy_once(&desc, at, DESC_BYTES)
    at = gmem_at(ring.memory, desc.gpa, VBLK_HEADER_BYTES)
    if at == NULL:
        return False
    copy_once(header, at, VBLK_HEADER_BYTES)
    return True


cdef inline uint64_t look_for_map(vring_t *ring, uint16_t position, const disk_t *disk) noexcept nogil:
    """The offset that the request at *position* reads, or -1."""
    cdef vblk_header_t header
    if not look_header(ring, position, &header):
        return <uint64_t>-1
    disk_prefetch_map(disk, vblk_offset(header.sector))
    return vblk_offset(header.sector) if header.type == VBLK_T_IN else <uint64_t>-1


cdef inline void look_ahead(lookahead_t *self, vring_t *ring, const disk_t *disk) noexcept nogil:
    """Call after a request was taken: ``next_avail`` is the one behind it."""
    cdef uint16_t first = ring.next_avail
    cdef uint16_t waiting
    if ring.packed:
        return
    waiting = look_waiting(ring)
    if waiting > TABLE_AHEAD:
        look_for_table(ring, <uint16_t>(first + TABLE_AHEAD))
    if <uint16_t>(self.mapped - first) > MAP_AHEAD:
        self.mapped = first
    while <uint16_t>(self.mapped - first) < min(waiting, MAP_AHEAD):
        self.read_offset_bytes[self.mapped & (LOOK_SLOTS - 1)] = look_for_map(ring, self.mapped, disk)
        self.mapped += 1
    if <uint16_t>(self.fetched - first) > DATA_AHEAD:
        self.fetched = first
    while <uint16_t>(self.fetched - first) < min(waiting, DATA_AHEAD):
        disk_prefetch_data(disk, self.read_offset_bytes[self.fetched & (LOOK_SLOTS - 1)])
        self.fetched += 1
