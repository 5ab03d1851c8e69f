"""Owns what the NBD metadata contexts say about a piece of the disk.

``base:allocation``: bit 0 hole, bit 1 reads as zeroes. Spec: "The ``base:`` namespace".

``x-ocssd:chunk-state``: the state of the flash chunk that holds the data, with the values of the chunk information
log (OCSSD 2.0, 2.3.2.1): 1 free, 2 closed, 4 open, 8 offline; 0 when nothing is mapped there. Data of which the write
buffer has the only copy counts for the chunk that it is going to.
"""

from libc.stdint cimport uint32_t, uint64_t

from ocssd_daemon.native.disk cimport EXTENT_SECTORS, disk_extent, disk_t
from ocssd_daemon.native.media cimport ppa_chunk
from ocssd_daemon.native.nbdwire cimport NBD_STATE_HOLE, NBD_STATE_ZERO

cdef enum:
    EXTENT_TURN_BYTES = 1 << 30     # disk looked at per turn: 256 Ki map entries of 4 KiB, about 0.2 ms
    EXTENT_LOOK_BYTES = 1 << 18     # what one look costs besides, in the same currency

# Flags of the extent at *offset_bytes*; *length_bytes* = how far they hold, at most to *end_bytes*.
ctypedef uint64_t (*extents_t)(disk_t *disk, uint64_t offset_bytes, uint64_t end_bytes,
                               uint64_t *length_bytes) noexcept nogil


cdef inline uint64_t extent_allocation(disk_t *disk, uint64_t offset_bytes, uint64_t end_bytes,
                                       uint64_t *length_bytes) noexcept nogil:
    if disk_extent(disk, offset_bytes, end_bytes, length_bytes):
        return 0
    return NBD_STATE_HOLE | NBD_STATE_ZERO


cdef inline uint64_t chunk_state(const disk_t *disk, uint64_t lba) noexcept nogil:
    cdef uint32_t entry = disk.ftl.l2p[lba]     # ppa + 1; 0: unmapped
    return disk.ftl.media.chunks[ppa_chunk(disk.ftl.media, entry - 1)].state if entry else 0


cdef inline uint64_t extent_chunk_state(disk_t *disk, uint64_t offset_bytes, uint64_t end_bytes,
                                        uint64_t *length_bytes) noexcept nogil:
    cdef uint64_t lba = offset_bytes >> disk.sector_shift
    cdef uint64_t stop = min((end_bytes + disk.sector_bytes - 1) >> disk.sector_shift, lba + EXTENT_SECTORS)
    cdef uint64_t state = chunk_state(disk, lba)
    lba += 1
    while lba < stop and chunk_state(disk, lba) == state:
        lba += 1
    length_bytes[0] = min(lba << disk.sector_shift, end_bytes) - offset_bytes
    return state
