"""Owns one NBD connection's state and the life of a request in it: taken, checked, answered.

Spec: NBD ``doc/proto.md`` "Transmission"; extension-ext-header. Offsets and lengths are bytes, deadlines nanoseconds
of CLOCK_MONOTONIC. Negotiation is over before this starts; what was agreed is ``mode``, ``flags`` and ``contexts``.

One request at a time is *the operation*: decoded once from the receive buffer, checked as a whole (``op_check``), then
done in steps by its command (``nbdcmd.pxd``), and answered. When that happens is ``nbdconn.pxd``'s.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, strlen

from ocssd_daemon.native.disk cimport disk_t
from ocssd_daemon.native.nbdextent cimport extents_t
from ocssd_daemon.native.nbdout cimport block_new, block_t, out_append, out_commit, out_free, out_room, out_t
from ocssd_daemon.native.nbdwire cimport *
from ocssd_daemon.native.reactor cimport reactor_defer, reactor_report, reactor_t, reactor_unwatch, source_t

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
    FLUSH_REPLIES = 16              # the same for replies without data
    TURN_BYTES = 1 << 20            # work per turn: well below 1 ms
    PIECE_BYTES = 256 * 1024        # work per step
    BULK_BYTES = 64 * 1024          # a turn of so many bytes, in requests as large as the next: bulk
    BULK_REQUEST_BYTES = 32 * 1024
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
    op.chunk_at = 0
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


cdef inline step_t step_drain(nbd_conn_t *c, op_t *op) noexcept nogil:
    """Read past what is left of a refused request's payload, then answer."""
    cdef uint64_t n = c.in_tail - c.in_head
    if n > op.payload_bytes:
        n = op.payload_bytes
    c.in_head += <uint32_t>n
    c.turn_bytes -= <int64_t>n
    op.payload_bytes -= n
    return STEP_INPUT if op.payload_bytes else op_answer(c, op)
