"""Owns what each NBD command does: one function per command, called again until the operation is answered.

Spec: NBD ``doc/proto.md`` "Request types", "Structured reply types". A step is bounded to one piece of work.

Payloads of writes go to the disk from the receive buffer as they arrive, in whole sectors: a client that announces 32 MiB
makes us allocate nothing, and one that stops in the middle of a sector leaves that sector as it was. Receiving straight
into the sectors saves no time (measured, 4 KiB: 1.0 us, through the buffer 0.8 us): the kernel fetches each cache line of
the target before it fills it, which ``copy_past_cache`` does not.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ocssd_daemon.native.disk cimport (
    DISK_FUA, DISK_PIECE_BYTES, DISK_UNMAP, disk_discard, disk_extent, disk_flush, disk_read, disk_write,
    disk_write_zeroes,
)
from ocssd_daemon.native.nbdextent cimport EXTENT_LOOK_BYTES, EXTENT_TURN_BYTES
from ocssd_daemon.native.nbdop cimport *
from ocssd_daemon.native.nbdout cimport block_new, out_block, out_recycle, out_room
from ocssd_daemon.native.nbdwire cimport *
from ocssd_daemon.native.sys cimport iovec


cdef enum:
    HOLE_BYTES = 12                 # payload of an OFFSET_HOLE chunk: offset, length
    EXTENT_STEP_BYTES = 16 * 1024   # what looking for the end of a hole costs, as bytes moved


cdef inline void op_post_short(nbd_conn_t *c, op_t *op, uint32_t n) noexcept nogil:
    """Answer with the block's first *n* bytes.

    A short reply joins the others: what is unsent is counted in its bytes, not in those of a block for the longest.
    """
    cdef char *reply = out_room(&c.out, n) if n <= SMALL_READ_BYTES else NULL
    if reply == NULL:
        op_post_block(c, op, n)
        return
    memcpy(reply, op.block.data, n)
    op_post(c, op, reply, n)
    out_recycle(&c.out, op.block)
    op.block = NULL


# --- READ, WRITE, TRIM, WRITE_ZEROES and the small ones ---

cdef inline uint32_t read_header_bytes(nbd_conn_t *c) noexcept nogil:
    return nbd_reply_bytes(c.mode) + (0 if c.mode == NBD_SIMPLE else 8)


cdef inline void encode_read_header(nbd_conn_t *c, op_t *op, char *p) noexcept nogil:
    if c.mode == NBD_SIMPLE:
        nbd_encode_simple(p, op.request.cookie, NBD_OK)
        return
    p = nbd_encode_chunk(p, c.mode, &op.request, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA,
                         8 + op.request.length_bytes)
    put_be64(p, op.request.offset_bytes)


cdef inline bint read_piece(nbd_conn_t *c, op_t *op, char *data, uint64_t n) noexcept nogil:
    """Read *n* bytes at the cursor; returns whether that failed."""
    cdef iovec iov
    iov.iov_base = data
    iov.iov_len = n
    if op_disk(c, op, disk_read(c.disk, op.cursor_bytes, &iov, 1, n)):
        return True
    op.cursor_bytes += n
    c.turn_bytes -= <int64_t>n
    return False


cdef inline step_t step_read_large(nbd_conn_t *c, op_t *op) noexcept nogil:
    """One piece; the reply is queued when all of it was read, since a simple reply cannot tell an error later."""
    cdef uint32_t header_bytes = read_header_bytes(c)
    cdef uint64_t done = op.cursor_bytes - op.request.offset_bytes
    cdef uint64_t n = op.end_bytes - op.cursor_bytes
    if op.block == NULL:
        op.block = out_block(&c.out, header_bytes + <uint32_t>op.request.length_bytes)
        if op.block == NULL:
            op_fail(op, NBD_ENOMEM, b"out of memory")
            return STEP_MORE
    if read_piece(c, op, op.block.data + header_bytes + done, n if n < PIECE_BYTES else PIECE_BYTES):
        return STEP_MORE
    if op.cursor_bytes < op.end_bytes:
        return STEP_MORE
    c.stats.bytes_read += op.request.length_bytes
    encode_read_header(c, op, op.block.data)
    op_post_block(c, op, header_bytes + <uint32_t>op.request.length_bytes)
    return op_finish(c)


cdef inline bint read_has_holes(nbd_conn_t *c, op_t *op) noexcept nogil:
    """May the reply say so, and is there something to say? Asked when the read begins."""
    cdef uint64_t length_bytes
    if c.mode == NBD_SIMPLE or op.request.flags & NBD_CMD_FLAG_DF or op.block != NULL:
        return False
    return not disk_extent(c.disk, op.cursor_bytes, op.end_bytes, &length_bytes) or (
        length_bytes < op.end_bytes - op.cursor_bytes)


cdef inline bint sparse_begin(nbd_conn_t *c, op_t *op) noexcept nogil:
    """A block that holds the longest reply: every other sector a hole. Returns 0 without memory."""
    cdef uint64_t chunks = (op.request.length_bytes >> c.disk.sector_shift) + 2 + op.request.length_bytes // PIECE_BYTES
    op.block = out_block(&c.out, <uint32_t>(op.request.length_bytes + chunks * (NBD_REPLY_MAX_BYTES + HOLE_BYTES)))
    op.chunk_at = 0
    return op.block != NULL


cdef inline step_t step_read_sparse(nbd_conn_t *c, op_t *op) noexcept nogil:
    """One chunk: a hole, or a piece of data. Spec: NBD_REPLY_TYPE_OFFSET_HOLE, NBD_REPLY_TYPE_OFFSET_DATA."""
    cdef uint64_t at = op.cursor_bytes
    cdef uint64_t n
    cdef bint mapped
    cdef char *p
    if op.block == NULL and not sparse_begin(c, op):
        op_fail(op, NBD_ENOMEM, b"out of memory")
        return STEP_MORE
    mapped = disk_extent(c.disk, at, op.end_bytes, &n)
    if mapped:
        n = min(n, <uint64_t>PIECE_BYTES)
        if read_piece(c, op, op.block.data + op.chunk_at + nbd_reply_bytes(c.mode) + 8, n):
            return STEP_MORE
    else:
        op.cursor_bytes += n
        c.turn_bytes -= EXTENT_STEP_BYTES
    p = nbd_encode_chunk(op.block.data + op.chunk_at, c.mode, &op.request,
                         NBD_REPLY_FLAG_DONE if op.cursor_bytes == op.end_bytes else 0,
                         NBD_REPLY_TYPE_OFFSET_DATA if mapped else NBD_REPLY_TYPE_OFFSET_HOLE,
                         8 + n if mapped else HOLE_BYTES)
    p = put_be64(p, at)
    p = p + n if mapped else put_be32(p, <uint32_t>n)
    op.chunk_at = <uint32_t>(p - op.block.data)
    if op.cursor_bytes < op.end_bytes:
        return STEP_MORE
    c.stats.bytes_read += op.request.length_bytes
    op_post_short(c, op, op.chunk_at)
    return op_finish(c)


cdef inline step_t step_read(nbd_conn_t *c, op_t *op) noexcept nogil:
    cdef uint32_t header_bytes = read_header_bytes(c)
    cdef uint32_t n = <uint32_t>op.request.length_bytes
    cdef char *reply
    if op.request.length_bytes > c.max_payload_bytes:
        op_fail(op, NBD_EINVAL, b"read larger than the maximum payload")
        return STEP_MORE
    if op.block != NULL and op.chunk_at or read_has_holes(c, op):
        return step_read_sparse(c, op)
    if n > SMALL_READ_BYTES:
        return step_read_large(c, op)
    reply = out_room(&c.out, header_bytes + n)
    if reply == NULL:
        op_fail(op, NBD_ENOMEM, b"out of memory")
        return STEP_MORE
    if read_piece(c, op, reply + header_bytes, n):
        return STEP_MORE
    c.stats.bytes_read += n
    encode_read_header(c, op, reply)
    op_post(c, op, reply, header_bytes + n)
    return op_finish(c)


cdef inline uint64_t piece_end(nbd_conn_t *c, op_t *op, uint64_t limit_bytes) noexcept nogil:
    """Where the next piece ends: at most *limit_bytes* on, at a sector's edge or at the operation's end.

    A cut inside a sector would cost a read-modify-write twice, and a discard would forget that sector.
    """
    if op.end_bytes - op.cursor_bytes <= limit_bytes:
        return op.end_bytes
    return (op.cursor_bytes + limit_bytes) & ~<uint64_t>(c.disk.sector_bytes - 1)


cdef inline step_t op_commit(nbd_conn_t *c, op_t *op, bint durable) noexcept nogil:
    """All pieces are done: make them durable if FUA asks for it and no piece has, then answer."""
    if op.request.flags & NBD_CMD_FLAG_FUA and not durable:
        op_disk(c, op, disk_flush(c.disk))
    return op_answer(c, op)


cdef inline step_t step_write(nbd_conn_t *c, op_t *op) noexcept nogil:
    cdef uint64_t end = piece_end(c, op, c.in_tail - c.in_head)
    cdef bint whole = end == op.end_bytes and op.cursor_bytes == op.request.offset_bytes
    cdef bint durable = whole and op.request.flags & NBD_CMD_FLAG_FUA
    cdef uint64_t n
    cdef iovec iov
    if end <= op.cursor_bytes:
        return STEP_INPUT
    n = end - op.cursor_bytes
    iov.iov_base = c.in_data + c.in_head
    iov.iov_len = n
    if op_disk(c, op, disk_write(c.disk, op.cursor_bytes, &iov, 1, n, DISK_FUA if durable else 0)):
        return STEP_MORE
    c.in_head += <uint32_t>n
    c.turn_bytes -= <int64_t>n
    op.payload_bytes -= n
    op.cursor_bytes = end
    if op.payload_bytes:
        return STEP_MORE
    c.stats.bytes_written += op.request.length_bytes
    return op_commit(c, op, durable)


cdef inline step_t step_disconnect(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Spec: NBD_CMD_DISC has no reply; all requests before it are answered."""
    conn_closing(c, END_DISCONNECT)
    return op_finish(c)


cdef inline step_t step_flush(nbd_conn_t *c, op_t *op) noexcept nogil:
    op_disk(c, op, disk_flush(c.disk))
    return op_answer(c, op)


cdef inline step_t step_cache(nbd_conn_t *c, op_t *op) noexcept nogil:
    """The flash is memory already: there is nothing to fetch."""
    return op_answer(c, op)


cdef inline step_t op_next_piece(nbd_conn_t *c, op_t *op, uint64_t end, int status) noexcept nogil:
    """The piece up to *end* has been worked on; one such piece is a turn's work."""
    c.turn_bytes -= TURN_BYTES
    if op_disk(c, op, status):
        return STEP_MORE
    op.cursor_bytes = end
    return STEP_MORE if end < op.end_bytes else op_commit(c, op, False)


cdef inline step_t step_trim(nbd_conn_t *c, op_t *op) noexcept nogil:
    cdef uint64_t end = piece_end(c, op, DISK_PIECE_BYTES)
    return op_next_piece(c, op, end, disk_discard(c.disk, op.cursor_bytes, end - op.cursor_bytes))


cdef inline step_t step_write_zeroes(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Unmapping is fast, writing zeroes is not: FAST_ZERO with NO_HOLE is what cannot be done quickly."""
    cdef uint64_t end = piece_end(c, op, DISK_PIECE_BYTES)
    cdef bint no_hole = op.request.flags & NBD_CMD_FLAG_NO_HOLE
    if no_hole and op.request.flags & NBD_CMD_FLAG_FAST_ZERO:
        op_fail(op, NBD_ENOTSUP, b"zeroes without a hole are written")
        return STEP_MORE
    return op_next_piece(c, op, end, disk_write_zeroes(c.disk, op.cursor_bytes, end - op.cursor_bytes,
                                                       0 if no_hole else DISK_UNMAP))


# --- BLOCK_STATUS ---

cdef inline uint32_t extent_bytes(nbd_conn_t *c) noexcept nogil:
    return 16 if c.mode == NBD_EXTENDED else 8


cdef inline uint32_t status_payload_bytes(nbd_conn_t *c) noexcept nogil:
    """Of a chunk, before its extents: context id, and in extended chunks the number of extents."""
    return 8 if c.mode == NBD_EXTENDED else 4


cdef inline void status_take_filter(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Payload of BLOCK_STATUS: effect length, then the ids to report. Spec: NBD_FLAG_BLOCK_STATUS_PAYLOAD."""
    cdef const char *p = c.in_data + c.in_head
    cdef uint64_t n = (op.payload_bytes - 8) >> 2
    cdef uint32_t i, number
    op.request.length_bytes = get_be64(p)
    op_check_range(c, op)
    for i in range(n):
        number = get_be32(p + 8 + 4 * i)
        if number >= MAX_CONTEXTS or not (c.contexts >> number) & 1 or (op.contexts >> number) & 1:
            op_fail(op, NBD_EINVAL, b"context id not negotiated, or given twice")
            return
        op.contexts |= 1u << number
    c.in_head += <uint32_t>op.payload_bytes
    op.payload_bytes = 0


cdef inline step_t status_begin(nbd_conn_t *c, op_t *op) noexcept nogil:
    cdef uint32_t chunk_bytes = NBD_REPLY_MAX_BYTES + 8 + MAX_EXTENTS * 16
    if op.payload_bytes:
        if op.payload_bytes % 4 or op.payload_bytes < 12 or op.payload_bytes > 8 + 4 * MAX_CONTEXTS:
            op_fail(op, NBD_EINVAL, b"payload is not a length and context ids")
            return STEP_MORE
        if c.in_tail - c.in_head < op.payload_bytes:
            return STEP_INPUT
        status_take_filter(c, op)
    else:
        op.contexts = c.contexts
    if op.contexts == 0:
        op_fail(op, NBD_EINVAL, b"no metadata context was negotiated")
    if op.error:
        return STEP_MORE
    op.block = block_new(MAX_CONTEXTS * chunk_bytes)
    if op.block == NULL:
        op_fail(op, NBD_ENOMEM, b"out of memory")
    op.run_bytes = 0
    op.extents = 0
    op.chunk_at = 0
    return STEP_MORE


cdef inline uint32_t lowest_bit(uint32_t bits) noexcept nogil:
    cdef uint32_t n = 0
    while not (bits >> n) & 1:
        n += 1
    return n


cdef inline void status_end_run(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Write the extent that has been grown behind the others of its chunk."""
    cdef uint32_t at = op.chunk_at + nbd_reply_bytes(c.mode) + status_payload_bytes(c) + op.extents * extent_bytes(c)
    cdef char *p = op.block.data + at
    if c.mode == NBD_EXTENDED:
        put_be64(put_be64(p, op.run_bytes), op.run_flags)
    else:
        put_be32(put_be32(p, <uint32_t>op.run_bytes), <uint32_t>op.run_flags)
    op.extents += 1
    op.run_bytes = 0


cdef inline step_t status_end_chunk(nbd_conn_t *c, op_t *op, uint32_t context) noexcept nogil:
    cdef uint32_t n = status_payload_bytes(c) + op.extents * extent_bytes(c)
    cdef char *p = op.block.data + op.chunk_at
    op.contexts &= op.contexts - 1
    p = nbd_encode_chunk(p, c.mode, &op.request, 0 if op.contexts else NBD_REPLY_FLAG_DONE,
                         NBD_REPLY_TYPE_BLOCK_STATUS_EXT if c.mode == NBD_EXTENDED else NBD_REPLY_TYPE_BLOCK_STATUS, n)
    p = put_be32(p, context)
    if c.mode == NBD_EXTENDED:
        put_be32(p, op.extents)
    op.chunk_at += nbd_reply_bytes(c.mode) + n
    op.extents = 0
    op.cursor_bytes = op.request.offset_bytes
    if op.contexts:
        return STEP_MORE
    op_post_short(c, op, op.chunk_at)
    return op_finish(c)


cdef inline bint status_full(op_t *op) noexcept nogil:
    return op.extents >= (1 if op.request.flags & NBD_CMD_FLAG_REQ_ONE else <uint32_t>MAX_EXTENTS)


cdef inline step_t step_block_status(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Grow extents from the cursor on, context by context, a bounded number of look-ups per step."""
    cdef uint64_t length_bytes, flags
    cdef uint64_t looked_bytes = 0
    cdef uint32_t context
    if op.block == NULL:
        return status_begin(c, op)
    context = lowest_bit(op.contexts)
    while op.cursor_bytes < op.end_bytes and not status_full(op):
        if looked_bytes >= EXTENT_TURN_BYTES:
            c.turn_bytes -= TURN_BYTES
            return STEP_MORE
        flags = c.extents[context](c.disk, op.cursor_bytes, op.end_bytes, &length_bytes)
        looked_bytes += length_bytes + EXTENT_LOOK_BYTES
        if op.run_bytes and flags != op.run_flags:
            status_end_run(c, op)
            continue
        op.run_flags = flags
        op.run_bytes += length_bytes
        op.cursor_bytes += length_bytes
    if op.run_bytes and not status_full(op):
        status_end_run(c, op)
    op.run_bytes = 0
    return status_end_chunk(c, op, context)
