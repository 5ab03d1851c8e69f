"""Owns the execution of one I/O command: decode, validate, resolve its memory, run it on a disk or on flash.

``OPS`` are the rows of the I/O command table, installed by ``_nvme.pyx``. A row's check sets the lengths and refuses what
cannot be; only then are guest addresses looked at. NVM Express Base 1.3 section 6; OCSSD 1.2 section 5 and 2.0 section 3.
Units: LBAs of the namespace, bytes for lengths.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memcmp, memset

from ocssd_daemon.native.disk cimport (
    DISK_FUA, DISK_UNMAP, cursor_skip, cursor_t, disk_discard, disk_extent, disk_flush, disk_read, disk_t, disk_write,
    disk_write_zeroes,
)
from ocssd_daemon.native.ftl cimport ftl_sense
from ocssd_daemon.native.gc cimport ftl_read_fails
from ocssd_daemon.native.media cimport (
    CHUNK_OFFLINE, MEDIA_CHUNK_CLOSED_EARLY, MEDIA_INVALID_RESET, media_begin, media_done_ns, media_t, media_troubled,
)
from ocssd_daemon.native.nvme_dptr cimport dptr_walk, guest_copy_in, guest_copy_out, pieces_t
from ocssd_daemon.native.nvme_flash cimport (
    FIELD_CHUNK, FIELD_PLANE, KIND_BLOCK, KIND_OCSSD12, KIND_OCSSD20, VECTOR_MAX,
    address_of, flash_copy, flash_locate, flash_ns_t, flash_read, flash_req_t, flash_reset, flash_write,
)
from ocssd_daemon.native.nvme_wire cimport (
    IO_COMPARE, IO_DSM, IO_FLUSH, IO_READ, IO_VECTOR_COPY, IO_VECTOR_READ, IO_VECTOR_RESET, IO_VECTOR_WRITE, IO_VERIFY,
    IO_WRITE, IO_WRITE_ZEROES,
    NVME_COMPARE_FAILURE, NVME_INTERNAL, NVME_INVALID_FIELD, NVME_INVALID_NAMESPACE, NVME_INVALID_OPCODE,
    NVME_LBA_RANGE, NVME_METADATA_SGL_LENGTH, NVME_OK, NVME_READ_ONLY, NVME_SGL_TYPE,
    chunk_descriptor_t, dsm_range_t, sgl_t, sqe_nlb, sqe_slba, sqe_t,
)
from ocssd_daemon.native.nvmeq cimport (
    NAMESPACES_MAX, NOTICES_MAX, REPORT_NOTICE, namespace_t, notice_t, nvmeq_t, outcome_of, outcome_t,
)
from ocssd_daemon.native.reactor cimport reactor_report
from ocssd_daemon.native.sys cimport iovec

cdef extern from "errno.h" nogil:
    int EINVAL
    int ENOSPC
    int EPERM

cdef enum:
    ON_BLOCK = 1 << KIND_BLOCK
    ON_20 = 1 << KIND_OCSSD20
    ON_12 = 1 << KIND_OCSSD12
    ON_RAW = ON_20 | ON_12
    ON_ALL = ON_BLOCK | ON_RAW
    BROADCAST = 0xffffffff
    CONTROL_PRACT = 1 << 29
    CONTROL_FUA = 1 << 30
    DSM_DEALLOCATE = 1 << 2
    COMPARE_BYTES = 65536       # of the disk that COMPARE holds against the host's data at a time
    DESCRIPTOR_BYTES = 32

cdef enum:                      # data direction of a row
    DATA_NONE = 0
    DATA_FROM_HOST = 1
    DATA_TO_HOST = 2


ctypedef struct io_t:           # one command on its way
    nvmeq_t *q
    const sqe_t *s
    namespace_t *ns
    uint32_t n                  # LBAs or addresses
    uint64_t first              # LBA
    uint64_t data_bytes
    uint64_t oob_bytes
    uint64_t oob_address
    bint vector                 # `list` holds the addresses
    bint last                   # piece of the command, or all of it
    bint parked                 # goes on in pieces (nvme_long.pxd)
    uint64_t list[VECTOR_MAX]
    uint64_t result
    uint64_t due_ns

ctypedef int (*step_t)(io_t *io) noexcept nogil

ctypedef struct op_t:
    uint8_t kinds               # ON_*
    uint8_t data                # DATA_*
    step_t check                # NULL: nothing to check
    step_t run


# --- checks -------------------------------------------------------------------------------------------------------

cdef inline int check_transfer(const io_t *io) noexcept nogil:
    cdef uint64_t limit = io.q.max_transfer_bytes
    return NVME_INVALID_FIELD if limit and io.data_bytes > limit else NVME_OK


cdef inline int check_blocks(io_t *io) noexcept nogil:
    """SLBA, NLB, protection bits. On flash the address rules are the flash's own, also beyond the namespace."""
    io.first = sqe_slba(io.s)
    io.n = sqe_nlb(io.s)
    if io.s.cdw12 & CONTROL_PRACT:
        return NVME_INVALID_FIELD
    if io.ns.kind == KIND_BLOCK and (io.n > io.ns.size_lbas or io.first > io.ns.size_lbas - io.n):
        return NVME_LBA_RANGE
    return NVME_OK


cdef inline int check_data_blocks(io_t *io) noexcept nogil:
    cdef int status = check_blocks(io)
    io.data_bytes = <uint64_t>io.n << io.ns.lba_shift
    if io.ns.kind != KIND_BLOCK:
        io.oob_address = io.s.mptr
        io.oob_bytes = <uint64_t>io.n * io.ns.flash.media.geometry.oob_bytes if io.s.mptr else 0
    return status if status != NVME_OK else check_transfer(io)


cdef inline int check_write(io_t *io) noexcept nogil:
    cdef int status = check_data_blocks(io)
    return NVME_READ_ONLY if status == NVME_OK and io.ns.read_only else status


cdef inline int check_zeroes(io_t *io) noexcept nogil:
    cdef int status = check_blocks(io)
    return NVME_READ_ONLY if status == NVME_OK and io.ns.read_only else status


cdef inline int fetch_list(io_t *io, uint64_t where, uint64_t *list) noexcept nogil:
    """One address lies in the command, several in a list at a plain bus address. Copied once."""
    if io.n == 1:
        list[0] = where
        return NVME_OK
    return guest_copy_in(io.q.memory, where, list, io.n * 8)


cdef inline int check_vector(io_t *io) noexcept nogil:
    io.n = sqe_nlb(io.s)
    io.vector = True
    if io.n > VECTOR_MAX or io.s.cdw12 & CONTROL_PRACT:
        return NVME_INVALID_FIELD
    return fetch_list(io, sqe_slba(io.s), io.list)


cdef inline int check_vector_data(io_t *io) noexcept nogil:
    cdef int status = check_vector(io)
    io.data_bytes = <uint64_t>io.n << io.ns.lba_shift
    io.oob_address = io.s.mptr
    io.oob_bytes = <uint64_t>io.n * io.ns.flash.media.geometry.oob_bytes if io.s.mptr else 0
    return status if status != NVME_OK else check_transfer(io)


cdef inline int check_vector_write(io_t *io) noexcept nogil:
    cdef int status = check_vector_data(io)
    return NVME_READ_ONLY if status == NVME_OK and io.ns.read_only else status


cdef inline uint32_t plane_count(const io_t *io) noexcept nogil:
    """Planes that an erase takes: the plane mode of 1.2 (0 single, 1 dual, 2 quad; 3, of eight, is no plane mode)."""
    return 1u << (io.s.cdw12 >> 16 & 3) if io.ns.kind == KIND_OCSSD12 else 1


cdef inline int check_vector_reset(io_t *io) noexcept nogil:
    cdef int status = check_vector(io)
    if io.ns.kind == KIND_OCSSD20 and io.s.mptr:
        io.oob_address = io.s.mptr
        io.oob_bytes = <uint64_t>io.n * DESCRIPTOR_BYTES
    if status == NVME_OK and io.ns.kind == KIND_OCSSD12 and plane_count(io) > io.ns.flash.fields[FIELD_PLANE].count:
        return NVME_INVALID_FIELD
    return NVME_READ_ONLY if status == NVME_OK and io.ns.read_only else status


cdef inline int check_vector_copy(io_t *io) noexcept nogil:
    cdef int status = check_vector(io)
    return NVME_READ_ONLY if status == NVME_OK and io.ns.read_only else status


cdef inline int check_dsm(io_t *io) noexcept nogil:
    io.n = (io.s.cdw10 & 0xff) + 1
    if not io.s.cdw11 & DSM_DEALLOCATE:
        io.n = 0                # hints that we have no use for
        return NVME_OK
    io.data_bytes = io.n * sizeof(dsm_range_t)
    return NVME_READ_ONLY if io.ns.read_only else NVME_OK


# --- guest memory -------------------------------------------------------------------------------------------------

cdef inline int reserve_oob(nvmeq_t *q, uint64_t bytes) noexcept nogil:
    cdef char *grown
    if bytes <= q.oob_capacity:
        return NVME_OK
    grown = <char *>realloc(q.oob, bytes)
    if grown == NULL:
        return NVME_INTERNAL
    q.oob = grown
    q.oob_capacity = bytes
    return NVME_OK


cdef inline int resolve_oob(io_t *io) noexcept nogil:
    """With PSDT 2, MPTR is the address of one SGL descriptor. Spec: 4.1, MPTR."""
    cdef sgl_t d
    cdef int status
    if io.oob_bytes == 0 or io.s.flags >> 6 != 2:
        return NVME_OK
    status = guest_copy_in(io.q.memory, io.s.mptr, &d, sizeof(d))
    if status != NVME_OK:
        return status
    if d.identifier:
        return NVME_SGL_TYPE
    io.oob_address = d.address
    return NVME_METADATA_SGL_LENGTH if d.length < io.oob_bytes else NVME_OK


cdef inline int resolve(io_t *io, uint8_t direction) noexcept nogil:
    """Find all of the command's memory; bring the metadata in when the host sends it."""
    cdef int status
    io.q.pieces.memory = io.q.memory
    io.q.pieces.to_guest = direction == DATA_TO_HOST
    status = dptr_walk(&io.q.pieces, io.s, io.data_bytes, io.q.page_bytes)
    if status == NVME_OK:
        status = resolve_oob(io)
    if status == NVME_OK:
        status = reserve_oob(io.q, io.oob_bytes)
    if status == NVME_OK and io.oob_bytes and direction == DATA_FROM_HOST:
        status = guest_copy_in(io.q.memory, io.oob_address, io.q.oob, io.oob_bytes)
    return status


# --- block namespace ----------------------------------------------------------------------------------------------

cdef inline int disk_status(int failed, bint writing) noexcept nogil:
    """An errno of the disk as a status."""
    if failed == 0:
        return NVME_OK
    if failed == EINVAL:
        return NVME_LBA_RANGE
    if failed == EPERM:
        return NVME_READ_ONLY
    if failed == ENOSPC:
        return 0x081
    return 0x280 if writing else 0x281


cdef inline bint all_written(disk_t *d, uint64_t offset, uint64_t bytes) noexcept nogil:
    cdef uint64_t end = offset + bytes, run = 0
    while offset < end:
        if not disk_extent(d, offset, end, &run):
            return False
        offset += run
    return True


cdef inline uint64_t disk_offset(const io_t *io) noexcept nogil:
    return io.ns.disk_base_bytes + (io.first << io.ns.lba_shift)


cdef inline int block_read(io_t *io) noexcept nogil:
    cdef uint64_t offset = disk_offset(io)
    cdef int failed
    if io.ns.disk_dulbe and not all_written(io.ns.disk, offset, io.data_bytes):
        return 0x287
    failed = disk_read(io.ns.disk, offset, io.q.pieces.iov, io.q.pieces.count, io.data_bytes)
    io.due_ns = io.ns.disk.done_at_ns
    return disk_status(failed, False)


cdef inline int block_write(io_t *io) noexcept nogil:
    cdef int flags = DISK_FUA if io.s.cdw12 & CONTROL_FUA or io.q.write_through else 0
    cdef int failed = disk_write(io.ns.disk, disk_offset(io), io.q.pieces.iov, io.q.pieces.count,
                                 io.data_bytes, flags)
    io.due_ns = io.ns.disk.done_at_ns
    return disk_status(failed, True)


cdef inline int block_zeroes(io_t *io) noexcept nogil:
    cdef bint durable = io.last and (io.s.cdw12 & CONTROL_FUA or io.q.write_through)
    cdef int failed = disk_write_zeroes(io.ns.disk, disk_offset(io), <uint64_t>io.n << io.ns.lba_shift,
                                        DISK_UNMAP | (DISK_FUA if durable else 0))
    io.due_ns = io.ns.disk.done_at_ns
    return disk_status(failed, True)


cdef inline bint same_bytes(cursor_t *c, const char *expected, uint64_t n) noexcept nogil:
    cdef uint64_t piece
    while n:
        cursor_skip(c)
        piece = min(n, <uint64_t>(c.iov.iov_len - c.used))
        if memcmp(<const char *>c.iov.iov_base + c.used, expected, piece):
            return False
        expected += piece
        c.used += piece
        n -= piece
    return True


cdef inline int block_compare(io_t *io) noexcept nogil:
    cdef uint64_t offset = disk_offset(io), left = io.data_bytes, n
    cdef iovec scratch
    cdef cursor_t c
    cdef int failed
    c.iov = io.q.pieces.iov
    c.used = 0
    while left:
        n = min(left, <uint64_t>COMPARE_BYTES)
        scratch.iov_base = io.q.block
        scratch.iov_len = n
        failed = disk_read(io.ns.disk, offset, &scratch, 1, n)
        if failed:
            return disk_status(failed, False)
        if not same_bytes(&c, io.q.block, n):
            return NVME_COMPARE_FAILURE
        offset += n
        left -= n
    return NVME_OK


cdef inline int block_discard(io_t *io) noexcept nogil:
    return disk_status(disk_discard(io.ns.disk, disk_offset(io), <uint64_t>io.n << io.ns.lba_shift), True)


cdef inline int block_verify(io_t *io) noexcept nogil:
    """Can each sector be recovered? Nothing is moved, but the flash reads it."""
    cdef disk_t *d = io.ns.disk
    cdef media_t *m = d.ftl.media
    cdef uint64_t offset = disk_offset(io), end = offset + (<uint64_t>io.n << io.ns.lba_shift), sector
    if io.ns.disk_dulbe and not all_written(d, offset, end - offset):
        return 0x287
    if not media_troubled(m) and m.timing == NULL:
        return NVME_OK
    media_begin(m)
    for sector in range(offset >> d.sector_shift, (end + d.sector_bytes - 1) >> d.sector_shift):
        if media_troubled(m) and ftl_read_fails(d.ftl, <uint32_t>sector):
            return 0x281
        if m.timing != NULL:
            ftl_sense(d.ftl, <uint32_t>sector)
    io.due_ns = media_done_ns(m)
    return NVME_OK


# --- chunk notifications ------------------------------------------------------------------------------------------

cdef enum:
    NOTICE_MEDIUM_ERROR_RATE = 1 << 1
    NOTICE_HIGH_ERROR_RATE = 1 << 2
    NOTICE_REFRESHED = 1 << 4
    NOTICE_UNRECOVERABLE = 1 << 3
    NOTICE_WEAR = 1 << 8
    NOTICE_OF_CHUNK = 1 << 1


cdef inline void notify(io_t *io, uint64_t address, uint16_t state) noexcept nogil:
    """One entry of the chunk notification log, newest over oldest. Spec: 2.0, log D0h."""
    cdef notice_t *n = &io.q.notices[io.q.notice_count % NOTICES_MAX]
    io.q.notice_count += 1
    n.nc = io.q.notice_count
    n.lba = address & ~((1ull << io.ns.flash.fields[FIELD_CHUNK].offset) - 1)
    n.nsid = io.s.nsid
    n.state = state
    n.mask = NOTICE_OF_CHUNK
    n.nlb = 0
    reactor_report(io.q.reactor, &io.q.source, REPORT_NOTICE)


cdef inline uint32_t mean_wear(const media_t *m) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(m.geometry.total_chunks):
        total += m.chunks[i].wear_index
    return <uint32_t>(total // m.geometry.total_chunks)


cdef inline void note_wear(io_t *io, uint64_t address, uint32_t mean) noexcept nogil:
    """Has this reset taken the chunk out of mean ± threshold? Spec: 2.0 geometry, WIT."""
    cdef uint32_t chunk = 0, sector = 0
    if io.q.wear_threshold == 0 or not flash_locate(&io.ns.flash, address, &chunk, &sector):
        return
    if io.ns.flash.media.chunks[chunk].wear_index > mean + io.q.wear_threshold:
        notify(io, address, NOTICE_WEAR)


cdef inline void note_resets(io_t *io, const flash_req_t *r) noexcept nogil:
    """Wear of the chunks that were reset, and those that a failing reset took offline."""
    cdef uint32_t i, chunk = 0, sector = 0, mean
    if io.ns.kind != KIND_OCSSD20:
        return
    mean = mean_wear(io.ns.flash.media) if io.q.wear_threshold else 0
    for i in range(r.n):
        if not r.failed >> i & 1:
            note_wear(io, address_of(r, i), mean)
        elif (flash_locate(&io.ns.flash, address_of(r, i), &chunk, &sector) and r.status == MEDIA_INVALID_RESET
                and io.ns.flash.media.chunks[chunk].state == CHUNK_OFFLINE):
            notify(io, address_of(r, i), NOTICE_UNRECOVERABLE)


cdef inline void note_failures(io_t *io, const flash_req_t *r, int status, uint16_t state) noexcept nogil:
    cdef uint32_t i
    if io.ns.kind != KIND_OCSSD20 or r.status != status:
        return
    for i in range(min(r.n, <uint32_t>VECTOR_MAX)):
        if r.failed >> i & 1:
            notify(io, address_of(r, i), state)
            return


cdef inline void note_reads(io_t *io, const flash_req_t *r) noexcept nogil:
    """Chunks that the flash noted while they were read: hard to read, lost, or rewritten by the device for that."""
    cdef uint32_t i
    cdef uint16_t state
    if io.ns.kind != KIND_OCSSD20 or r.noted == 0:
        return
    for i in range(min(r.n, <uint32_t>VECTOR_MAX)):
        if r.noted >> i & 1:
            state = NOTICE_HIGH_ERROR_RATE if r.very_high >> i & 1 else NOTICE_MEDIUM_ERROR_RATE
            notify(io, address_of(r, i), NOTICE_UNRECOVERABLE if r.failed >> i & 1 else state)
        if r.refreshed >> i & 1:
            notify(io, address_of(r, i), NOTICE_REFRESHED)


# --- raw namespaces -----------------------------------------------------------------------------------------------

cdef inline void flash_request(io_t *io, flash_req_t *r, bint has_data) noexcept nogil:
    memset(r, 0, sizeof(flash_req_t))
    media_begin(io.ns.flash.media)
    r.ns = &io.ns.flash
    r.list = io.list if io.vector else NULL
    r.first = io.first
    r.n = io.n
    r.data.iov = io.q.pieces.iov
    r.has_data = has_data
    r.oob = io.q.oob if io.oob_bytes else NULL


cdef inline int flash_done(io_t *io, const flash_req_t *r) noexcept nogil:
    io.result = r.failed if io.vector else 0
    io.due_ns = media_done_ns(io.ns.flash.media)
    return r.status


cdef inline int raw_write(io_t *io) noexcept nogil:
    cdef flash_req_t r
    flash_request(io, &r, True)
    flash_write(&r)
    note_failures(io, &r, MEDIA_CHUNK_CLOSED_EARLY, NOTICE_HIGH_ERROR_RATE)
    return flash_done(io, &r)


cdef inline int raw_zeroes(io_t *io) noexcept nogil:
    cdef flash_req_t r
    flash_request(io, &r, False)
    flash_write(&r)
    return flash_done(io, &r)


cdef inline int return_oob(io_t *io) noexcept nogil:
    return guest_copy_out(io.q.memory, io.oob_address, io.q.oob, io.oob_bytes) if io.oob_bytes else NVME_OK


cdef inline int raw_read(io_t *io) noexcept nogil:
    cdef flash_req_t r
    cdef int status
    flash_request(io, &r, True)
    flash_read(&r)
    note_reads(io, &r)
    status = return_oob(io)
    return status if status != NVME_OK else flash_done(io, &r)


cdef inline int raw_verify(io_t *io) noexcept nogil:
    cdef flash_req_t r
    flash_request(io, &r, False)
    flash_read(&r)
    note_reads(io, &r)
    return flash_done(io, &r)


cdef inline int raw_compare(io_t *io) noexcept nogil:
    """Read into scratch memory and compare, one block after the other."""
    cdef flash_req_t r
    cdef cursor_t c
    cdef iovec scratch
    cdef uint32_t i, sector_bytes = io.ns.flash.media.geometry.sector_bytes
    c.iov = io.q.pieces.iov
    c.used = 0
    scratch.iov_base = io.q.block
    scratch.iov_len = sector_bytes
    for i in range(io.n):
        flash_request(io, &r, True)
        r.first = io.first + i
        r.n = 1
        r.oob = NULL
        r.data.iov = &scratch
        flash_read(&r)
        if r.status != NVME_OK:
            return r.status
        if not same_bytes(&c, io.q.block, sector_bytes):
            return NVME_COMPARE_FAILURE
    return NVME_OK


cdef inline int raw_reset(io_t *io) noexcept nogil:
    cdef flash_req_t r
    cdef int status
    flash_request(io, &r, False)
    r.oob = NULL
    flash_reset(&r, plane_count(io), <chunk_descriptor_t *>io.q.oob if io.oob_bytes else NULL)
    note_resets(io, &r)
    status = return_oob(io)
    return status if status != NVME_OK else flash_done(io, &r)


cdef inline int raw_copy(io_t *io) noexcept nogil:
    cdef uint64_t sources[VECTOR_MAX]
    cdef flash_req_t r
    cdef uint32_t i
    cdef int status
    for i in range(io.n):
        sources[i] = io.list[i]
    status = fetch_list(io, io.s.cdw14 | <uint64_t>io.s.cdw15 << 32, io.list)
    if status != NVME_OK:
        return status
    flash_request(io, &r, False)
    flash_copy(&r, sources)
    return flash_done(io, &r)


# --- both ---------------------------------------------------------------------------------------------------------

cdef inline int run_flush(io_t *io) noexcept nogil:
    if io.ns.kind != KIND_BLOCK:
        return NVME_OK
    return disk_status(disk_flush(io.ns.disk), True)


cdef inline int run_read(io_t *io) noexcept nogil:
    io.q.counters.reads += 1
    io.q.counters.bytes_read += io.data_bytes
    return block_read(io) if io.ns.kind == KIND_BLOCK else raw_read(io)


cdef inline int run_write(io_t *io) noexcept nogil:
    io.q.counters.writes += 1
    io.q.counters.bytes_written += io.data_bytes
    return block_write(io) if io.ns.kind == KIND_BLOCK else raw_write(io)


cdef inline int run_compare(io_t *io) noexcept nogil:
    return block_compare(io) if io.ns.kind == KIND_BLOCK else raw_compare(io)


# --- the table and its interpreter --------------------------------------------------------------------------------

cdef inline int execute_row(io_t *io, const op_t *op) noexcept nogil:
    """Validate, resolve, run."""
    cdef int status = op.check(io) if op.check != NULL else NVME_OK
    if status == NVME_OK:
        status = resolve(io, op.data)
    return op.run(io) if status == NVME_OK else status


cdef inline int find_namespace(nvmeq_t *q, const sqe_t *s, namespace_t **ns) noexcept nogil:
    if s.nsid == 0 or s.nsid > NAMESPACES_MAX or q.ns[s.nsid].kind == 0:
        return NVME_INVALID_NAMESPACE
    ns[0] = &q.ns[s.nsid]
    return NVME_OK


cdef inline int flush_all(io_t *io) noexcept nogil:
    """Flush with the broadcast NSID. Spec: 6.8."""
    cdef uint32_t i
    cdef int status = NVME_OK, one
    for i in range(1, NAMESPACES_MAX + 1):
        io.ns = &io.q.ns[i]
        one = run_flush(io) if io.ns.kind else NVME_OK
        status = one if one != NVME_OK else status
    return status
