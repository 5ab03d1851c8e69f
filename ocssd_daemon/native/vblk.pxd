"""Owns the virtio-blk requests (virtio 1.3, 5.2.6): decode the header, validate, execute on the disk, say the status.

Each type has two handlers: ``check`` validates and fills the request, ``step`` executes one piece of bounded length,
so that a request of any size leaves the loop after each piece. A zero-length read or write succeeds. Sectors are
always 512 bytes here, whatever the disk's block size is. Knows no ring layout and no message.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ocssd_daemon.native.chain cimport CHAIN_SEGMENTS, chain_pull, chain_skip, chain_t, chain_window
from ocssd_daemon.native.dirtylog cimport dirtylog_mark, dirtylog_mark_iov, dirtylog_t
from ocssd_daemon.native.disk cimport (
    DISK_FUA, DISK_PIECE_BYTES, DISK_UNMAP, disk_check, disk_discard, disk_flush, disk_read, disk_t, disk_write,
    disk_write_zeroes,
)
from ocssd_daemon.native.sys cimport iovec


cdef enum:
    VBLK_T_IN = 0
    VBLK_T_OUT = 1
    VBLK_T_FLUSH = 4
    VBLK_T_GET_ID = 8
    VBLK_T_DISCARD = 11
    VBLK_T_WRITE_ZEROES = 13
    VBLK_TYPES = 14

    VBLK_S_OK = 0
    VBLK_S_IOERR = 1
    VBLK_S_UNSUPP = 2
    VBLK_MORE = 0x100           # not a status: call step (again)

    VBLK_SECTOR_SHIFT = 9
    VBLK_HEADER_BYTES = 16
    VBLK_ID_BYTES = 20
    VBLK_RANGE_BYTES = 16
    VBLK_RANGES = 32            # max_discard_seg, max_write_zeroes_seg
    VBLK_RANGE_SECTORS = 1 << 22    # max_discard_sectors, max_write_zeroes_sectors: 2 GiB
    VBLK_RANGE_UNMAP = 1
    VBLK_SEG_MAX = CHAIN_SEGMENTS - 2

    VBLK_PIECE_BYTES = 1 << 20
    VBLK_TURN_BYTES = 4 << 20   # moved per poll, so that a turn stays below a millisecond
    VBLK_TRIM_COST_BYTES = 64 << 10     # what a piece of discard counts for in that budget

cdef enum:
    VIRTIO_BLK_F_SEG_MAX = 2
    VIRTIO_BLK_F_RO = 5
    VIRTIO_BLK_F_BLK_SIZE = 6
    VIRTIO_BLK_F_FLUSH = 9
    VIRTIO_BLK_F_TOPOLOGY = 10
    VIRTIO_BLK_F_CONFIG_WCE = 11
    VIRTIO_BLK_F_MQ = 12
    VIRTIO_BLK_F_DISCARD = 13
    VIRTIO_BLK_F_WRITE_ZEROES = 14


ctypedef struct vblk_header_t:
    uint32_t type
    uint32_t reserved
    uint64_t sector

ctypedef struct vblk_range_t:
    uint64_t sector
    uint32_t sectors
    uint32_t flags

ctypedef struct vblk_request_t:
    chain_t chain
    uint32_t type
    uint64_t offset_bytes       # next byte on the disk
    uint64_t left_bytes
    uint64_t done_at_ns         # when the slowest piece completes; 0: now
    uint32_t range
    uint32_t range_count
    vblk_range_t ranges[VBLK_RANGES]

ctypedef struct vblk_stats_t:
    uint64_t requests
    uint64_t errors
    uint64_t bytes_read
    uint64_t bytes_written
    uint64_t flushes
    uint64_t discards
    uint64_t write_zeroes

ctypedef struct vblk_t

ctypedef int (*vblk_handler_t)(vblk_t *self, vblk_request_t *request) noexcept nogil

ctypedef struct vblk_op_t:
    vblk_handler_t check        # a status, or VBLK_MORE when there is something to execute
    vblk_handler_t step         # a status, or VBLK_MORE when there is more of it

ctypedef struct vblk_t:
    disk_t *disk
    dirtylog_t *log
    uint64_t features
    bint read_only
    bint writeback              # config field wce
    char id[VBLK_ID_BYTES]
    long long turn_bytes        # what this poll may still move
    vblk_stats_t stats
    vblk_op_t ops[VBLK_TYPES]


cdef inline bint vblk_has(const vblk_t *self, int feature) noexcept nogil:
    return self.features >> feature & 1


cdef inline int vblk_status(int failed) noexcept nogil:
    """virtio-blk has one status for everything that went wrong."""
    return VBLK_S_IOERR if failed else VBLK_S_OK


cdef inline int vblk_durable(const vblk_t *self) noexcept nogil:
    """DISK_FUA when the driver must be able to rely on a completed write without a flush (5.2.6.2)."""
    if vblk_has(self, VIRTIO_BLK_F_CONFIG_WCE):
        return 0 if self.writeback else DISK_FUA
    return 0 if vblk_has(self, VIRTIO_BLK_F_FLUSH) else DISK_FUA


cdef inline void vblk_account(vblk_t *self, vblk_request_t *request, long long cost_bytes) noexcept nogil:
    self.turn_bytes -= cost_bytes
    if self.disk.done_at_ns > request.done_at_ns:
        request.done_at_ns = self.disk.done_at_ns


# ---- read and write --------------------------------------------------------------------------------------------------

cdef inline int vblk_check_transfer(vblk_t *self, vblk_request_t *request, uint64_t length_bytes) noexcept nogil:
    if disk_check(self.disk, request.offset_bytes, length_bytes):
        return VBLK_S_IOERR
    request.left_bytes = length_bytes
    return VBLK_MORE if length_bytes else VBLK_S_OK


cdef inline int vblk_check_in(vblk_t *self, vblk_request_t *request) noexcept nogil:
    if request.chain.readable_bytes:
        return VBLK_S_IOERR
    return vblk_check_transfer(self, request, request.chain.writable_bytes)


cdef inline int vblk_check_out(vblk_t *self, vblk_request_t *request) noexcept nogil:
    if request.chain.writable_bytes or self.read_only:
        return VBLK_S_IOERR
    return vblk_check_transfer(self, request, request.chain.readable_bytes)


cdef inline int vblk_advance(vblk_request_t *request, uint64_t length_bytes) noexcept nogil:
    request.left_bytes -= length_bytes
    if request.left_bytes == 0:
        return VBLK_S_OK
    request.offset_bytes += length_bytes
    chain_skip(&request.chain, length_bytes)
    return VBLK_MORE


cdef inline int vblk_step_in(vblk_t *self, vblk_request_t *request) noexcept nogil:
    cdef chain_t *chain = &request.chain
    cdef uint64_t piece_bytes = request.left_bytes if request.left_bytes < VBLK_PIECE_BYTES else VBLK_PIECE_BYTES
    cdef uint64_t cut_bytes = 0
    cdef uint32_t window = chain_window(chain, piece_bytes, &cut_bytes)
    cdef iovec *iov = &chain.iov[chain.first]
    cdef int failed = disk_read(self.disk, request.offset_bytes, iov, window, piece_bytes)
    if self.log.active:
        dirtylog_mark_iov(self.log, &chain.gpa[chain.first], iov, window)
    iov[window - 1].iov_len += cut_bytes
    vblk_account(self, request, piece_bytes)
    if failed:
        return vblk_status(failed)
    self.stats.bytes_read += piece_bytes
    return vblk_advance(request, piece_bytes)


cdef inline int vblk_step_out(vblk_t *self, vblk_request_t *request) noexcept nogil:
    cdef chain_t *chain = &request.chain
    cdef uint64_t piece_bytes = request.left_bytes if request.left_bytes < VBLK_PIECE_BYTES else VBLK_PIECE_BYTES
    cdef uint64_t cut_bytes = 0
    cdef uint32_t window = chain_window(chain, piece_bytes, &cut_bytes)
    cdef iovec *iov = &chain.iov[chain.first]
    cdef int failed = disk_write(self.disk, request.offset_bytes, iov, window, piece_bytes, vblk_durable(self))
    iov[window - 1].iov_len += cut_bytes
    vblk_account(self, request, piece_bytes)
    if failed:
        return vblk_status(failed)
    self.stats.bytes_written += piece_bytes
    return vblk_advance(request, piece_bytes)


# ---- flush and identification ----------------------------------------------------------------------------------------

cdef inline int vblk_check_flush(vblk_t *self, vblk_request_t *request) noexcept nogil:
    """Data descriptors and the sector of a flush carry no meaning and are not looked at."""
    self.stats.flushes += 1
    return VBLK_MORE


cdef inline int vblk_step_flush(vblk_t *self, vblk_request_t *request) noexcept nogil:
    cdef int failed = disk_flush(self.disk)
    vblk_account(self, request, 0)
    return vblk_status(failed)


cdef inline int vblk_check_id(vblk_t *self, vblk_request_t *request) noexcept nogil:
    """The identification is 20 bytes, zero-padded; a shorter buffer gets its beginning, a longer one zeros after it."""
    cdef chain_t *chain = &request.chain
    cdef uint64_t at = 0, part, i
    # All of it is written in one go, so it may not be longer than what a step moves.
    if chain.readable_bytes or chain.writable_bytes > VBLK_PIECE_BYTES:
        return VBLK_S_IOERR
    self.turn_bytes -= chain.writable_bytes
    for i in range(chain.first, chain.count):
        memset(chain.iov[i].iov_base, 0, chain.iov[i].iov_len)
        part = VBLK_ID_BYTES - at if chain.iov[i].iov_len > VBLK_ID_BYTES - at else chain.iov[i].iov_len
        memcpy(chain.iov[i].iov_base, self.id + at, part)
        at += part
    if self.log.active:
        dirtylog_mark_iov(self.log, &chain.gpa[chain.first], &chain.iov[chain.first], chain.count - chain.first)
    return VBLK_S_OK


# ---- discard and write zeroes ----------------------------------------------------------------------------------------

cdef inline int vblk_check_range(const vblk_t *self, const vblk_range_t *range, uint32_t flags_known) noexcept nogil:
    if range.flags & ~flags_known:
        return VBLK_S_UNSUPP
    if range.sectors == 0 or range.sectors > VBLK_RANGE_SECTORS:
        return VBLK_S_IOERR
    if range.sector > self.disk.size_bytes >> VBLK_SECTOR_SHIFT:
        return VBLK_S_IOERR
    return vblk_status(disk_check(self.disk, range.sector << VBLK_SECTOR_SHIFT,
                                  <uint64_t>range.sectors << VBLK_SECTOR_SHIFT))


cdef inline int vblk_check_ranges(vblk_t *self, vblk_request_t *request, uint32_t flags_known) noexcept nogil:
    """All ranges are copied, then all are valid, before the first is executed."""
    cdef uint64_t payload_bytes = request.chain.readable_bytes
    cdef int status
    cdef uint32_t i
    if self.read_only or request.chain.writable_bytes:
        return VBLK_S_IOERR
    if payload_bytes == 0 or payload_bytes & (VBLK_RANGE_BYTES - 1) or payload_bytes > sizeof(request.ranges):
        return VBLK_S_IOERR
    chain_pull(&request.chain, request.ranges, payload_bytes)
    request.range = 0
    request.range_count = <uint32_t>(payload_bytes >> 4)
    request.left_bytes = 0
    for i in range(request.range_count):
        status = vblk_check_range(self, &request.ranges[i], flags_known)
        if status != VBLK_S_OK:
            return status
    return VBLK_MORE


cdef inline int vblk_check_discard(vblk_t *self, vblk_request_t *request) noexcept nogil:
    if not vblk_has(self, VIRTIO_BLK_F_DISCARD):
        return VBLK_S_UNSUPP
    self.stats.discards += 1
    return vblk_check_ranges(self, request, 0)


cdef inline int vblk_check_zeroes(vblk_t *self, vblk_request_t *request) noexcept nogil:
    if not vblk_has(self, VIRTIO_BLK_F_WRITE_ZEROES):
        return VBLK_S_UNSUPP
    self.stats.write_zeroes += 1
    return vblk_check_ranges(self, request, VBLK_RANGE_UNMAP)


cdef inline uint64_t vblk_enter_range(vblk_request_t *request) noexcept nogil:
    """Begin the next range if the last one is done; the length of the piece to execute now."""
    if request.left_bytes == 0:
        request.offset_bytes = request.ranges[request.range].sector << VBLK_SECTOR_SHIFT
        request.left_bytes = <uint64_t>request.ranges[request.range].sectors << VBLK_SECTOR_SHIFT
    return request.left_bytes if request.left_bytes < DISK_PIECE_BYTES else DISK_PIECE_BYTES


cdef inline int vblk_leave_piece(vblk_request_t *request, uint64_t length_bytes, int failed) noexcept nogil:
    if failed:
        return vblk_status(failed)
    request.offset_bytes += length_bytes
    request.left_bytes -= length_bytes
    if request.left_bytes == 0:
        request.range += 1
    return VBLK_MORE if request.range < request.range_count else VBLK_S_OK


cdef inline int vblk_step_discard(vblk_t *self, vblk_request_t *request) noexcept nogil:
    cdef uint64_t piece_bytes = vblk_enter_range(request)
    cdef int failed = disk_discard(self.disk, request.offset_bytes, piece_bytes)
    vblk_account(self, request, VBLK_TRIM_COST_BYTES)
    return vblk_leave_piece(request, piece_bytes, failed)


cdef inline int vblk_step_zeroes(vblk_t *self, vblk_request_t *request) noexcept nogil:
    cdef uint64_t piece_bytes = vblk_enter_range(request)
    cdef int flags = vblk_durable(self)
    cdef int failed
    if request.ranges[request.range].flags & VBLK_RANGE_UNMAP:
        flags |= DISK_UNMAP
    failed = disk_write_zeroes(self.disk, request.offset_bytes, piece_bytes, flags)
    vblk_account(self, request, VBLK_TRIM_COST_BYTES if flags & DISK_UNMAP else <long long>piece_bytes)
    return vblk_leave_piece(request, piece_bytes, failed)


# ---- one request -----------------------------------------------------------------------------------------------------

cdef inline uint64_t vblk_offset(uint64_t sector) noexcept nogil:
    """In bytes; a sector whose offset does not fit becomes one beyond every disk (some types ignore the sector)."""
    if sector >> (64 - VBLK_SECTOR_SHIFT):
        return <uint64_t>-1 << VBLK_SECTOR_SHIFT
    return sector << VBLK_SECTOR_SHIFT


cdef inline int vblk_check(vblk_t *self, vblk_request_t *request) noexcept nogil:
    """Decode and validate the chain in *request*: a final status, or VBLK_MORE."""
    cdef vblk_header_t header
    self.stats.requests += 1
    request.done_at_ns = 0
    if request.chain.unusable or request.chain.readable_bytes < VBLK_HEADER_BYTES:
        return VBLK_S_IOERR
    chain_pull(&request.chain, &header, VBLK_HEADER_BYTES)
    if header.type >= VBLK_TYPES or self.ops[header.type].check == NULL:
        return VBLK_S_UNSUPP
    request.type = header.type
    request.offset_bytes = vblk_offset(header.sector)
    return self.ops[header.type].check(self, request)


cdef inline int vblk_step(vblk_t *self, vblk_request_t *request) noexcept nogil:
    return self.ops[request.type].step(self, request)


cdef inline uint32_t vblk_answer(vblk_t *self, vblk_request_t *request, int status) noexcept nogil:
    """Write the status byte; how many bytes the used element says were written."""
    cdef chain_t *chain = &request.chain
    if status != VBLK_S_OK:
        self.stats.errors += 1
    chain.status[0] = <uint8_t>status
    if self.log.active:
        dirtylog_mark(self.log, chain.status_gpa, 1)
    return 1 if chain.unusable else <uint32_t>(chain.writable_bytes + 1)


cdef inline void vblk_init(vblk_t *self, disk_t *disk, dirtylog_t *log) noexcept nogil:
    self.disk = disk
    self.log = log
    self.read_only = disk.read_only
    self.writeback = True
    self.ops[VBLK_T_IN] = vblk_op_t(vblk_check_in, vblk_step_in)
    self.ops[VBLK_T_OUT] = vblk_op_t(vblk_check_out, vblk_step_out)
    self.ops[VBLK_T_FLUSH] = vblk_op_t(vblk_check_flush, vblk_step_flush)
    self.ops[VBLK_T_GET_ID] = vblk_op_t(vblk_check_id, NULL)
    self.ops[VBLK_T_DISCARD] = vblk_op_t(vblk_check_discard, vblk_step_discard)
    self.ops[VBLK_T_WRITE_ZEROES] = vblk_op_t(vblk_check_zeroes, vblk_step_zeroes)
