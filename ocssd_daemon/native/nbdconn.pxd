"""Owns one NBD connection as a source of the reactor: when to receive, to work, to send, and to stop listening.

Work is bounded per turn, so a trim of the whole device, or a write whose payload is still under way, leaves the loop to
others in between. What a client can make us hold is bounded too: one receive buffer, OUT_LIMIT_BYTES and one reply that
it does not read, HELD_LIMIT replies waiting for the flash's deadline; at these limits nothing more is read from its
socket. What a request does is in ``nbdcmd.pxd``.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memmove

from ocssd_daemon.native.nbdop cimport *
from ocssd_daemon.native.nbdout cimport OUT_BLOCKED, OUT_DEAD, out_send
from ocssd_daemon.native.reactor cimport EPOLLIN, EPOLLOUT, reactor_rewatch, source_t

cdef extern from "errno.h" nogil:
    int errno
    int EAGAIN
    int EINTR

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    int MSG_DONTWAIT

cdef extern from "sys/epoll.h" nogil:
    uint32_t EPOLLHUP
    uint32_t EPOLLERR


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
    cdef int told = 0
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
        if c.out.bytes >= FLUSH_BYTES or done - told >= FLUSH_REPLIES:
            conn_send(c)
            told = done
    conn_send(c)
    # Many bytes in few requests: the client needs its time, and maybe this CPU, to prepare the next ones.
    source.bulk = TURN_BYTES - c.turn_bytes >= BULK_BYTES and TURN_BYTES - c.turn_bytes >= done * BULK_REQUEST_BYTES
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
