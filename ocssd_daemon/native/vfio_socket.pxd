"""Owns the time in which the reactor reads a vfio-user socket: doorbells in, queues run, everything else left to trio.

The socket has one reader and writer at a time. trio lends it to the reactor when no message is half read, no DMA message
is under way and it owes no reply. The reactor looks at the bytes without taking them (MSG_PEEK), copies once, and serves
the messages it knows, from the head of the stream on, then takes exactly those. At the first byte that is not a whole,
well-formed, known message (also at the end of the stream, or when a descriptor came along) it gives the socket back; trio
finds the stream, and the descriptors in it, as the client sent them. So every rule about messages stays where it was, in
``protocol/vfio_user/session.py``, and the reactor cannot get one wrong: what it is not sure about it does not touch.

Known are writes of the doorbells of live I/O queues, and reads of controller registers out of the copy that trio keeps up
to date. Both are answered within the turn. A reply that the client's socket does not take is kept for trio to send.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from ocssd_daemon.native.nvmeq cimport DOORBELLS_AT, REGISTERS_BYTES, doorbell_slot, doorbell_take, nvmeq_t
from ocssd_daemon.native.reactor cimport EPOLLIN, reactor_t, reactor_unwatch, reactor_watch, source_t
from ocssd_daemon.native.sys cimport eventfd_signal
from ocssd_daemon.native.vfio_wire cimport (
    VFIO_ACCESS_BYTES, VFIO_BAR0, VFIO_COMMANDS, VFIO_HEADER_BYTES, VFIO_MULTI_ENTRY_BYTES, VFIO_MULTI_MAX, VFIO_NO_REPLY,
    VFIO_REPLY, vfio_access_t, vfio_header_t, vfio_multi_entry_t,
)

cdef extern from *:
    """
    #include <errno.h>
    #include <sys/socket.h>
    /* Bytes at the head of the stream, left there. 0: none now; -1: trio must look (end, error, a descriptor). */
    static inline int ocssd_peek(int fd, void *buffer, size_t length) {
        struct iovec iov = { buffer, length };
        struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };
        ssize_t n = recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);
        if (n > 0 && !(message.msg_flags & MSG_CTRUNC)) return (int)n;
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
    }
    /* Takes `length` bytes that were peeked; returns how many could not be taken: none, unless someone else reads too. */
    static inline size_t ocssd_take(int fd, void *buffer, size_t length) {
        while (length) {
            ssize_t n = recv(fd, buffer, length, MSG_DONTWAIT);
            if (n > 0) length -= (size_t)n;
            else if (n == 0 || errno != EINTR) break;
        }
        return length;
    }
    static inline size_t ocssd_send_some(int fd, const void *data, size_t length) {
        ssize_t n;
        do n = send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL); while (n < 0 && errno == EINTR);
        return n < 0 ? 0 : (size_t)n;
    }
    """
    int peek "ocssd_peek" (int fd, void *buffer, size_t length) noexcept nogil
    size_t take "ocssd_take" (int fd, void *buffer, size_t length) noexcept nogil
    size_t send_some "ocssd_send_some" (int fd, const void *data, size_t length) noexcept nogil

cdef enum:
    PEEK_BYTES = 8192           # a whole WRITE_MULTI, or 220 doorbells
    REPLY_MAX_BYTES = 40        # header, access, eight bytes of a register
    MESSAGE_MIN_BYTES = 32      # of those that are known: a register read
    OUT_BYTES = 10240           # PEEK_BYTES / MESSAGE_MIN_BYTES * REPLY_MAX_BYTES
    QUIET_TURNS = 16            # turns between two looks while doorbells come through memory

ctypedef struct vfio_socket_t

# Serves one whole message, or returns False and has changed nothing.
ctypedef bint (*vfio_serve_t)(vfio_socket_t *self, const vfio_header_t *head, const char *payload) noexcept nogil

ctypedef struct vfio_socket_t:
    source_t source             # first: the reactor hands this back
    reactor_t *reactor
    nvmeq_t *queues
    vfio_serve_t *served_by     # by command; NULL: trio's
    int fd                      # the client's socket
    int returned_fd             # eventfd: the socket is trio's again
    bint lent
    uint32_t quiet              # turns until the next look
    uint32_t out_bytes          # replies that are not sent
    uint64_t served             # messages that the reactor answered
    uint64_t returns            # times that it gave the socket back
    char peeked[PEEK_BYTES]
    char out[OUT_BYTES]


# --- who has the socket -------------------------------------------------------------------------------------------

cdef inline int vfio_lend(vfio_socket_t *self) noexcept nogil:
    """The reactor reads from now on; its lock is held. Returns 0 or an errno."""
    cdef int failed = reactor_watch(self.reactor, &self.source, self.fd, EPOLLIN)
    self.lent = failed == 0
    self.quiet = 0
    self.source.more = self.lent
    return failed


cdef inline void vfio_give_back(vfio_socket_t *self) noexcept nogil:
    if not self.lent:
        return
    reactor_unwatch(self.reactor, self.fd)
    self.lent = False
    self.returns += 1
    eventfd_signal(self.returned_fd)


# --- messages -----------------------------------------------------------------------------------------------------

cdef inline void put_reply(vfio_socket_t *self, const vfio_header_t *head, const void *body, uint32_t body_bytes,
                           const void *data, uint32_t data_bytes) noexcept nogil:
    """Queue the reply to *head*, unless it wants none. There is room: see OUT_BYTES."""
    cdef vfio_header_t reply
    cdef char *at = self.out + self.out_bytes
    if head.flags & VFIO_NO_REPLY:
        return
    reply.id, reply.command, reply.flags, reply.error = head.id, head.command, VFIO_REPLY, 0
    reply.size = VFIO_HEADER_BYTES + body_bytes + data_bytes
    memcpy(at, &reply, VFIO_HEADER_BYTES)
    memcpy(at + VFIO_HEADER_BYTES, body, body_bytes)
    memcpy(at + VFIO_HEADER_BYTES + body_bytes, data, data_bytes)
    self.out_bytes += reply.size


cdef inline int slot_of(const nvmeq_t *q, const vfio_access_t *access) noexcept nogil:
    """The doorbell of a live I/O queue that a four-byte write to *access* rings, or -1."""
    cdef int slot
    if access.region != VFIO_BAR0 or access.count != 4 or access.offset < DOORBELLS_AT:
        return -1
    slot = doorbell_slot(q, access.offset - DOORBELLS_AT)
    return slot if slot >= 2 else -1        # the admin queue is trio's


cdef inline uint32_t value_of(const void *data) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, data, 4)
    return value


cdef inline bint serve_write(vfio_socket_t *self, const vfio_header_t *head, const char *payload) noexcept nogil:
    cdef vfio_access_t access
    cdef int slot
    if head.size != VFIO_HEADER_BYTES + VFIO_ACCESS_BYTES + 4:
        return False
    memcpy(&access, payload, VFIO_ACCESS_BYTES)
    slot = slot_of(self.queues, &access)
    if slot < 0:
        return False
    doorbell_take(self.queues, slot, value_of(payload + VFIO_ACCESS_BYTES))
    put_reply(self, head, &access, VFIO_ACCESS_BYTES, NULL, 0)
    return True


cdef inline bint serve_write_multi(vfio_socket_t *self, const vfio_header_t *head, const char *payload) noexcept nogil:
    """All of its writes, or none: first every entry is looked up, then every one is done."""
    cdef vfio_multi_entry_t entry
    cdef int slots[VFIO_MULTI_MAX]
    cdef uint64_t count, i
    if head.size < VFIO_HEADER_BYTES + 8:
        return False
    memcpy(&count, payload, 8)
    if count == 0 or count > VFIO_MULTI_MAX or head.size != VFIO_HEADER_BYTES + 8 + count * VFIO_MULTI_ENTRY_BYTES:
        return False
    for i in range(count):
        memcpy(&entry, payload + 8 + i * VFIO_MULTI_ENTRY_BYTES, VFIO_MULTI_ENTRY_BYTES)
        slots[i] = slot_of(self.queues, &entry.access)
        if slots[i] < 0:
            return False
    for i in range(count):
        doorbell_take(self.queues, slots[i], value_of(payload + 8 + i * VFIO_MULTI_ENTRY_BYTES + VFIO_ACCESS_BYTES))
    put_reply(self, head, &count, 8, NULL, 0)
    return True


cdef inline bint serve_read(vfio_socket_t *self, const vfio_header_t *head, const char *payload) noexcept nogil:
    cdef vfio_access_t access
    if head.size != VFIO_HEADER_BYTES + VFIO_ACCESS_BYTES or head.flags & VFIO_NO_REPLY:
        return False
    memcpy(&access, payload, VFIO_ACCESS_BYTES)
    if access.region != VFIO_BAR0 or (access.count != 4 and access.count != 8):
        return False
    if access.offset > REGISTERS_BYTES - access.count:
        return False
    put_reply(self, head, &access, VFIO_ACCESS_BYTES, self.queues.registers + access.offset, access.count)
    return True


cdef inline uint32_t serve_message(vfio_socket_t *self, const char *at, uint32_t bytes) noexcept nogil:
    """Serve the message at the head of *bytes*; its size, or 0 when it is incomplete or not for us."""
    cdef vfio_header_t head
    cdef vfio_serve_t serve
    if bytes < VFIO_HEADER_BYTES:
        return 0
    memcpy(&head, at, VFIO_HEADER_BYTES)
    if head.command >= VFIO_COMMANDS or head.flags & ~<uint32_t>VFIO_NO_REPLY:
        return 0
    if head.size < MESSAGE_MIN_BYTES or head.size > bytes:
        return 0
    serve = self.served_by[head.command]
    return head.size if serve != NULL and serve(self, &head, at + VFIO_HEADER_BYTES) else 0


# --- the source ---------------------------------------------------------------------------------------------------

cdef inline bint flush_replies(vfio_socket_t *self) noexcept nogil:
    """Send what was answered; False when the client's socket did not take all of it."""
    cdef uint32_t sent
    if self.out_bytes == 0:
        return True
    sent = <uint32_t>send_some(self.fd, self.out, self.out_bytes)
    self.out_bytes -= sent
    memmove(self.out, self.out + sent, self.out_bytes)
    return self.out_bytes == 0


cdef inline uint32_t serve_messages(vfio_socket_t *self, uint32_t bytes) noexcept nogil:
    """Serve the known messages at the head of what was peeked; how many bytes they are."""
    cdef uint32_t at = 0, size
    while at < bytes:
        size = serve_message(self, self.peeked + at, bytes - at)
        if size == 0:
            break
        at += size
        self.served += 1
    return at


cdef inline int vfio_poll(source_t *source, int budget) noexcept nogil:
    """Serve what one look shows. Returns the bytes taken: work, for the loop."""
    cdef vfio_socket_t *self = <vfio_socket_t *>source
    cdef int bytes
    cdef uint32_t done
    source.more = 0
    if not self.lent:
        return 0
    if self.quiet:
        self.quiet -= 1
        return 0
    bytes = peek(self.fd, self.peeked, PEEK_BYTES)
    if bytes == 0:
        self.quiet = QUIET_TURNS if self.queues.shadow or self.queues.mapped_doorbells else 0
        return 0
    done = serve_messages(self, <uint32_t>bytes) if bytes > 0 else 0
    # What is left is not for us, unless it is only the part of a message that the buffer cut off.
    if (take(self.fd, self.peeked, done) or not flush_replies(self) or done == 0
            or (<int>done < bytes and bytes < PEEK_BYTES)):
        vfio_give_back(self)
    return <int>done


cdef inline int vfio_arm(source_t *source) noexcept nogil:
    (<vfio_socket_t *>source).quiet = 0
    return 0        # epoll has it


cdef inline void vfio_disarm(source_t *source) noexcept nogil:
    pass


cdef inline void vfio_ready(source_t *source, int fd, uint32_t events) noexcept nogil:
    (<vfio_socket_t *>source).quiet = 0


cdef inline void vfio_complete(source_t *source, uint64_t a, uint64_t b) noexcept nogil:
    pass            # nothing is ever deferred
