"""Owns the NBD transmission phase of one connection: requests in, replies out, as a source of the reactor.

Spec: NBD ``doc/proto.md`` "Transmission"; extension-ext-header. Offsets and lengths are bytes, deadlines nanoseconds
of CLOCK_MONOTONIC. Negotiation is over before this starts; what was agreed is ``mode``, ``flags`` and ``contexts``.

One request at a time is *the operation*: decoded once from the receive buffer, checked as a whole (``op_check``), then
done in steps by the function that ``handlers`` names for it. A step is bounded, so a trim of the whole device, or a
write whose payload is still under way, leaves the loop to others in between. What a client can make us hold is bounded
too: one receive buffer, OUT_LIMIT_BYTES and one reply that it does not read, HELD_LIMIT replies waiting for the flash's
deadline; at these limits nothing more is read from its socket.

Payloads of writes go to the disk from the receive buffer as they arrive, in whole sectors. That is one copy more than
receiving into a buffer of their own would be for the kernel, but the pieces are still in the cache when the disk copies
them, and a client that announces 32 MiB makes us allocate nothing.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, strlen

from ocssd_daemon.native.disk cimport (
    DISK_FUA, DISK_PIECE_BYTES, DISK_UNMAP,
    disk_discard, disk_flush, disk_read, disk_t, disk_write, disk_write_zeroes,
)
from ocssd_daemon.native.nbdextent cimport EXTENT_LOOK_BYTES, EXTENT_TURN_BYTES, extents_t
from ocssd_daemon.native.nbdout cimport (
    OUT_BLOCKED, OUT_DEAD, block_new, block_t, out_append, out_commit, out_free, out_room, out_send, out_t,
)
from ocssd_daemon.native.nbdwire cimport *
from ocssd_daemon.native.reactor cimport (
    EPOLLIN, EPOLLOUT,
    reactor_defer, reactor_report, reactor_rewatch, reactor_t, reactor_unwatch, source_t,
)
from ocssd_daemon.native.sys cimport iovec

cdef extern from "errno.h" nogil:
    int errno
    int EAGAIN
    int EINTR
    int ENOMEM

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    int MSG_DONTWAIT

cdef extern from "sys/epoll.h" nogil:
    uint32_t EPOLLHUP
    uint32_t EPOLLERR

cdef extern from *:
    """
    #include <stdint.h>
    #define NBD_FLAG_READ_ONLY (1 << 1)
    #define NBD_FLAG_SEND_FLUSH (1 << 2)
    #define NBD_FLAG_SEND_FUA (1 << 3)
    #define NBD_FLAG_SEND_TRIM (1 << 5)
    #define NBD_FLAG_SEND_WRITE_ZEROES (1 << 6)
    #define NBD_FLAG_SEND_DF (1 << 7)
    #define NBD_FLAG_SEND_CACHE (1 << 10)
    #define NBD_FLAG_SEND_FAST_ZERO (1 << 11)
    #define NBD_FLAG_BLOCK_STATUS_PAYLOAD (1 << 12)

    /* What each command needs and may carry. Spec: "Request types", "Command flags". */
    typedef struct {
        uint16_t needs;             /* transmission flag without which the command was not offered */
        uint16_t command_flags;     /* besides FUA, which every command may carry */
        uint8_t ranged;             /* offset and length name a piece of the disk */
        uint8_t modifies;
    } ocssd_nbd_rule;
    static const ocssd_nbd_rule ocssd_nbd_rules[8] = {
        /* READ         */ { 0,                          4 /* DF */,                  1, 0 },
        /* WRITE        */ { 0,                          32 /* PAYLOAD_LEN */,        1, 1 },
        /* DISC         */ { 0,                          0xffff,                      0, 0 },
        /* FLUSH        */ { NBD_FLAG_SEND_FLUSH,        0,                           0, 0 },
        /* TRIM         */ { NBD_FLAG_SEND_TRIM,         0,                           1, 1 },
        /* CACHE        */ { NBD_FLAG_SEND_CACHE,        0,                           1, 0 },
        /* WRITE_ZEROES */ { NBD_FLAG_SEND_WRITE_ZEROES, 2 | 16 /* NO_HOLE FAST_ZERO */, 1, 1 },
        /* BLOCK_STATUS */ { 0,                          8 | 32 /* REQ_ONE PAYLOAD_LEN */, 1, 0 },
    };
    /* Command flags that exist only when this transmission flag was offered. */
    static inline uint16_t ocssd_nbd_offered_flags(uint32_t flags, int extended) {
        return (flags & NBD_FLAG_SEND_FUA ? 1 : 0) | 2 | (flags & NBD_FLAG_SEND_DF ? 4 : 0) | 8 |
               (flags & NBD_FLAG_SEND_FAST_ZERO ? 16 : 0) | (extended ? 32 : 0);
    }
    """
    enum:
        NBD_FLAG_READ_ONLY
        NBD_FLAG_BLOCK_STATUS_PAYLOAD
    ctypedef struct rule_t "ocssd_nbd_rule":
        uint16_t needs
        uint16_t command_flags
        uint8_t ranged
        uint8_t modifies
    const rule_t *nbd_rules "ocssd_nbd_rules"
    uint16_t nbd_offered_flags "ocssd_nbd_offered_flags" (uint32_t flags, int extended) noexcept nogil

cdef enum:
    IN_BYTES = 256 * 1024           # 60 writes of 4 KiB per recv; must exceed a sector (64 KiB at most) and a header
    OUT_LIMIT_BYTES = 1 << 20       # unsent bytes at which requests wait
    HELD_LIMIT_BYTES = 16 << 20     # bytes waiting for deadlines at which requests wait: 64 reads of 256 KiB
    HELD_LIMIT = 4096               # the same in replies
    FLUSH_BYTES = 64 * 1024         # send in the middle of a batch, so that the client works while we do
    TURN_BYTES = 1 << 20            # work per turn: well below 1 ms
    PIECE_BYTES = 256 * 1024        # work per step
    SMALL_READ_BYTES = 64 * 1024    # above it, a reply gets a block of its own
    DRAIN_LIMIT_BYTES = 32 << 20    # a refused payload is read and dropped up to here; beyond, the session ends
    MAX_CONTEXTS = 4
    MAX_EXTENTS = 2048              # per context and reply; the spec lets a reply be short

cdef enum:                          # states
    CONN_OPEN = 0
    CONN_CLOSING = 1                # reads no more; sends what is owed
    CONN_CLOSED = 2                 # reported; waits to be removed

cdef enum:                          # reports: why it ended
    END_DISCONNECT = 1              # NBD_CMD_DISC
    END_EOF = 2                     # closed without
    END_ERROR = 3                   # the socket failed
    END_PROTOCOL = 4                # framing lost
    END_MEMORY = 5
    END_SHUTDOWN = 6

ctypedef enum step_t:
    STEP_DONE                       # the request is answered
    STEP_MORE                       # there is more to do
    STEP_INPUT                      # bytes from the client are missing

ctypedef struct nbd_stats_t:
    uint64_t connections
    uint64_t requests
    uint64_t errors
    uint64_t bytes_read
    uint64_t bytes_written

ctypedef struct op_t:
    nbd_request_t request
    uint64_t cursor_bytes           # next offset to work on
    uint64_t end_bytes
    uint64_t payload_bytes          # payload that is still to come
    uint64_t done_at_ns             # latest deadline of its pieces; 0: now
    block_t *block                  # the reply, when it is not written straight into the queue
    uint32_t error
    const char *reason
    uint32_t contexts               # of BLOCK_STATUS: bits that are still to be reported
    uint64_t run_bytes              # extent being grown
    uint64_t run_flags
    uint32_t extents
    uint32_t chunk_at               # where the current chunk begins in the block

ctypedef step_t (*handler_t)(nbd_conn_t *c, op_t *op) noexcept nogil

ctypedef struct nbd_conn_t:
    source_t source
    reactor_t *reactor
    disk_t *disk
    nbd_stats_t *stats
    const handler_t *handlers       # [NBD_CMDS]
    const extents_t *extents        # [MAX_CONTEXTS] by context id
    int fd
    nbd_mode_t mode
    uint32_t flags                  # transmission flags
    uint16_t command_flags          # those that were offered
    uint32_t contexts               # bit n: context id n was chosen
    uint64_t max_payload_bytes
    uint8_t state
    uint8_t end                     # reason to report
    uint8_t shutting_down
    uint8_t op_active
    uint8_t readable
    uint8_t blocked                 # the socket took no more
    uint8_t hung_up
    uint32_t watched                # epoll events asked for
    char *in_data
    uint32_t in_head
    uint32_t in_tail
    op_t op
    out_t out
    uint32_t held
    uint64_t held_bytes
    int64_t turn_bytes


# --- ends ---

cdef inline void conn_closing(nbd_conn_t *c, uint8_t end) noexcept nogil:
    """Read no more; the rest of the replies still goes out."""
    if c.state == CONN_OPEN:
        c.state = CONN_CLOSING
        c.end = end


cdef inline void op_drop(nbd_conn_t *c) noexcept nogil:
    free(c.op.block)
    c.op.block = NULL
    c.op_active = 0


cdef inline void conn_end(nbd_conn_t *c, uint8_t end) noexcept nogil:
    """Nothing goes in or out from here; trio closes the socket."""
    if c.state == CONN_CLOSED:
        return
    conn_closing(c, end)
    c.state = CONN_CLOSED
    c.source.more = 0
    op_drop(c)
    out_free(&c.out)
    reactor_unwatch(c.reactor, c.fd)
    reactor_report(c.reactor, &c.source, c.end)


# --- replies ---

cdef inline void conn_hold(nbd_conn_t *c, block_t *block, uint64_t done_at_ns) noexcept nogil:
    c.held += 1
    c.held_bytes += block.tail
    reactor_defer(c.reactor, &c.source, done_at_ns, <uint64_t>block, 0)


cdef inline void conn_complete(source_t *source, uint64_t a, uint64_t b) noexcept nogil:
    """A held reply is due."""
    cdef nbd_conn_t *c = <nbd_conn_t *>source
    cdef block_t *block = <block_t *>a
    c.held -= 1
    c.held_bytes -= block.tail
    if c.state == CONN_CLOSED:
        free(block)
        return
    out_append(&c.out, block)
    source.more = 1


cdef inline void op_post(nbd_conn_t *c, op_t *op, char *reply, uint32_t n) noexcept nogil:
    """The *n* bytes at *reply*, at the queue's end, are the answer: send them when the flash would be done."""
    cdef block_t *block = NULL
    if op.done_at_ns:
        block = block_new(n)
    if block == NULL:
        out_commit(&c.out, n)
        return
    memcpy(block.data, reply, n)
    block.tail = n
    conn_hold(c, block, op.done_at_ns)


cdef inline void op_post_block(nbd_conn_t *c, op_t *op, uint32_t n) noexcept nogil:
    """The operation's own block, filled to *n*, is the answer."""
    cdef block_t *block = op.block
    op.block = NULL
    block.tail = n
    if op.done_at_ns:
        conn_hold(c, block, op.done_at_ns)
    else:
        out_append(&c.out, block)


cdef inline step_t op_finish(nbd_conn_t *c) noexcept nogil:
    c.stats.requests += 1
    c.stats.errors += c.op.error != NBD_OK
    op_drop(c)
    return STEP_DONE


cdef inline char *encode_status(nbd_conn_t *c, op_t *op, char *p) noexcept nogil:
    cdef uint16_t n
    if c.mode == NBD_SIMPLE:
        return nbd_encode_simple(p, op.request.cookie, op.error)
    if op.error == NBD_OK:
        return nbd_encode_chunk(p, c.mode, &op.request, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0)
    n = <uint16_t>strlen(op.reason)
    p = nbd_encode_chunk(p, c.mode, &op.request, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 6 + n)
    p = put_be32(p, op.error)
    p = put_be16(p, n)
    memcpy(p, op.reason, n)
    return p + n


cdef inline step_t op_answer(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Answer with a status: success without data, or ``op.error`` with ``op.reason``."""
    cdef char *reply = out_room(&c.out, NBD_REPLY_MAX_BYTES + 6 + 256)
    if reply == NULL:
        conn_end(c, END_MEMORY)
        return STEP_DONE
    op_post(c, op, reply, <uint32_t>(encode_status(c, op, reply) - reply))
    return op_finish(c)


cdef inline void op_fail(op_t *op, uint32_t error, const char *reason) noexcept nogil:
    """The first error of an operation is the one that is told."""
    if op.error == NBD_OK:
        op.error = error
        op.reason = reason


cdef inline bint op_disk(nbd_conn_t *c, op_t *op, int status) noexcept nogil:
    """Take the result of a disk call; returns whether it failed. EIO, ENOSPC, EPERM, EINVAL are NBD's numbers too."""
    if c.disk.done_at_ns > op.done_at_ns:
        op.done_at_ns = c.disk.done_at_ns
    if status:
        op_fail(op, <uint32_t>status, b"the disk failed the request")
    return status != 0


# --- what is refused ---

cdef inline void op_check_range(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Spec: "Size constraints". A length of 0 has no meaning in the spec; it is refused, as nbdkit does."""
    cdef uint64_t size_bytes = c.disk.size_bytes
    cdef uint64_t mask = c.disk.block_bytes - 1
    if op.request.length_bytes == 0:
        op_fail(op, NBD_EINVAL, b"length is 0")
    elif op.request.offset_bytes > size_bytes or op.request.length_bytes > size_bytes - op.request.offset_bytes:
        op_fail(op, NBD_EINVAL, b"beyond the end of the export")
    elif (op.request.offset_bytes | op.request.length_bytes) & mask:
        op_fail(op, NBD_EINVAL, b"not aligned to the minimum block size")
    op.cursor_bytes = op.request.offset_bytes
    op.end_bytes = op.request.offset_bytes + op.request.length_bytes


cdef inline void op_check(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Set ``op.error`` unless the request is one that was offered and makes sense."""
    cdef const rule_t *rule
    if op.request.type >= NBD_CMDS:
        op_fail(op, NBD_EINVAL, b"unknown command")
        return
    rule = &nbd_rules[op.request.type]
    if op.request.type != NBD_CMD_DISC and op.request.flags & ~(
            (rule.command_flags | NBD_CMD_FLAG_FUA) & c.command_flags):
        op_fail(op, NBD_EINVAL, b"command flag not valid here")
    elif c.shutting_down:
        op_fail(op, NBD_ESHUTDOWN, b"the server is shutting down")
    elif rule.modifies and c.flags & NBD_FLAG_READ_ONLY:
        op_fail(op, NBD_EPERM, b"the export is read-only")
    elif rule.needs & ~c.flags:
        op_fail(op, NBD_EINVAL, b"command not offered")
    elif not rule.ranged and (op.request.offset_bytes or op.request.length_bytes):
        op_fail(op, NBD_EINVAL, b"this command has no offset and no length")
    elif rule.ranged and not (op.request.type == NBD_CMD_BLOCK_STATUS and op.payload_bytes):
        op_check_range(c, op)


cdef inline uint64_t op_payload(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Length of the payload behind the header. Spec: NBD_CMD_FLAG_PAYLOAD_LEN; in compact mode only WRITE has one.

    A write has one even without the flag: the client of QEMU 11.1 leaves it out, and QEMU's server takes it so too.
    """
    cdef bint flagged = c.mode == NBD_EXTENDED and op.request.flags & NBD_CMD_FLAG_PAYLOAD_LEN
    return op.request.length_bytes if flagged or op.request.type == NBD_CMD_WRITE else 0


cdef inline step_t op_take(nbd_conn_t *c) noexcept nogil:
    """Decode and check the next request; it is then the operation."""
    cdef op_t *op = &c.op
    cdef uint32_t n = nbd_request_bytes(c.mode)
    if c.in_tail - c.in_head < n:
        return STEP_INPUT
    op.error = NBD_OK
    op.done_at_ns = 0
    op.contexts = 0
    c.op_active = 1
    if not nbd_decode_request(c.in_data + c.in_head, c.mode, &op.request):
        op_drop(c)
        conn_closing(c, END_PROTOCOL)
        return STEP_DONE
    c.in_head += n
    op.payload_bytes = op_payload(c, op)
    if op.payload_bytes > c.max_payload_bytes:
        op_fail(op, NBD_EINVAL, b"payload larger than the maximum")
        if op.payload_bytes > DRAIN_LIMIT_BYTES:    # too far to the next request
            conn_closing(c, END_PROTOCOL)
            return op_answer(c, op)
    op_check(c, op)
    return STEP_MORE


# --- the commands ---

cdef inline step_t step_drain(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Read past what is left of a refused request's payload, then answer."""
    cdef uint64_t n = c.in_tail - c.in_head
    if n > op.payload_bytes:
        n = op.payload_bytes
    c.in_head += <uint32_t>n
    c.turn_bytes -= <int64_t>n
    op.payload_bytes -= n
    return STEP_INPUT if op.payload_bytes else op_answer(c, op)


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
        op.block = block_new(header_bytes + <uint32_t>op.request.length_bytes)
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


cdef inline step_t step_read(nbd_conn_t *c, op_t *op) noexcept nogil:
    cdef uint32_t header_bytes = read_header_bytes(c)
    cdef uint32_t n = <uint32_t>op.request.length_bytes
    cdef char *reply
    if op.request.length_bytes > c.max_payload_bytes:
        op_fail(op, NBD_EINVAL, b"read larger than the maximum payload")
        return STEP_MORE
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
    op_post_block(c, op, op.chunk_at)
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


# --- the source ---

cdef inline bint conn_full(nbd_conn_t *c) noexcept nogil:
    """Does the client owe us some reading, or the flash some time, before we take more?"""
    return c.out.bytes >= OUT_LIMIT_BYTES or c.held >= HELD_LIMIT or c.held_bytes >= HELD_LIMIT_BYTES


cdef inline step_t conn_advance(nbd_conn_t *c) noexcept nogil:
    cdef step_t taken
    if not c.op_active:
        taken = op_take(c)
        if taken != STEP_MORE:
            return taken
    if c.op.error:
        return step_drain(c, &c.op)
    return c.handlers[c.op.request.type](c, &c.op)


cdef inline bint conn_fill(nbd_conn_t *c) noexcept nogil:
    """Receive what is there behind what is left. Returns whether anything came."""
    cdef ssize_t n
    cdef size_t room
    if not c.readable:
        return False
    if c.in_head:
        memmove(c.in_data, c.in_data + c.in_head, c.in_tail - c.in_head)
        c.in_tail -= c.in_head
        c.in_head = 0
    room = IN_BYTES - c.in_tail
    n = recv(c.fd, c.in_data + c.in_tail, room, MSG_DONTWAIT)
    if n > 0:
        c.in_tail += <uint32_t>n
        c.readable = <size_t>n == room      # epoll is level-triggered: it tells again if there is more
        return True
    if n == 0:
        conn_closing(c, END_EOF)
    elif errno != EINTR:
        c.readable = 0
        if errno != EAGAIN:
            conn_end(c, END_ERROR)
    return False


cdef inline void conn_send(nbd_conn_t *c) noexcept nogil:
    cdef int result
    if c.blocked or c.out.bytes == 0:
        return
    result = out_send(&c.out, c.fd)
    c.blocked = result == OUT_BLOCKED
    if result == OUT_DEAD:
        conn_end(c, END_ERROR)


cdef inline void conn_watch(nbd_conn_t *c) noexcept nogil:
    """Ask epoll for what can be used: a level that nobody acts on would keep the loop awake."""
    cdef uint32_t events = EPOLLIN if c.state == CONN_OPEN and not conn_full(c) else 0
    if c.blocked:
        events |= EPOLLOUT
    if events != c.watched:
        reactor_rewatch(c.reactor, c.fd, events)
        c.watched = events


cdef inline void conn_settle(nbd_conn_t *c, bint starved) noexcept nogil:
    """End of a turn: is there more to do without an event, and is it over?"""
    cdef bint owed = c.out.bytes or c.held
    if c.state == CONN_CLOSED:
        return
    if c.hung_up and (c.state == CONN_CLOSING or conn_full(c)):
        conn_end(c, END_EOF)
    elif c.state == CONN_CLOSING and not owed:
        conn_end(c, c.end)
    else:
        c.source.more = c.state == CONN_OPEN and not starved and not conn_full(c)
        conn_watch(c)
    if c.shutting_down and starved and not owed:
        conn_end(c, END_SHUTDOWN)


cdef inline int conn_poll(source_t *source, int budget) noexcept nogil:
    cdef nbd_conn_t *c = <nbd_conn_t *>source
    cdef bint starved = False
    cdef int done = 0
    cdef step_t result
    c.turn_bytes = TURN_BYTES
    # Nobody waits for the rest of an operation that takes many turns.
    if c.hung_up and c.op_active and c.op.payload_bytes == 0:
        conn_end(c, END_EOF)
    while c.state == CONN_OPEN and done < budget and c.turn_bytes > 0 and not conn_full(c):
        result = conn_advance(c)
        done += result == STEP_DONE
        if result == STEP_INPUT and not conn_fill(c):
            starved = not c.readable
            break
        if c.out.bytes >= FLUSH_BYTES:
            conn_send(c)
    conn_send(c)
    conn_settle(c, starved)
    return done or c.turn_bytes != TURN_BYTES


cdef inline void conn_ready(source_t *source, int fd, uint32_t events) noexcept nogil:
    cdef nbd_conn_t *c = <nbd_conn_t *>source
    if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
        c.readable = 1
    if events & (EPOLLHUP | EPOLLERR):
        c.hung_up = 1
    if events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
        c.blocked = 0
    source.more = 1


cdef inline int conn_arm(source_t *source) noexcept nogil:
    return 0        # epoll has it


cdef inline void conn_disarm(source_t *source) noexcept nogil:
    pass
