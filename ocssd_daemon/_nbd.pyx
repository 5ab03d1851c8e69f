# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of NBD's transmission phase: arguments, the tables of commands and contexts, start and stop.

What a request does is in ``native/nbdcmd.pxd``, its bytes in ``native/nbdwire.pxd``. A connection is a source of the
reactor from ``start`` to ``stop``; in between the reactor's thread owns its state, and both calls take its lock.
"""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import os

from ocssd_daemon._fast cimport Disk, Reactor
from ocssd_daemon.native.nbdcmd cimport (
    step_block_status, step_cache, step_disconnect, step_flush, step_read, step_trim, step_write, step_write_zeroes,
)
from ocssd_daemon.native.nbdconn cimport conn_arm, conn_disarm, conn_poll, conn_ready
from ocssd_daemon.native.nbdextent cimport extent_allocation, extent_chunk_state, extents_t
from ocssd_daemon.native.nbdop cimport (
    CONN_CLOSED, END_DISCONNECT, END_EOF, END_ERROR, END_MEMORY, END_PROTOCOL, END_SHUTDOWN, IN_BYTES, MAX_CONTEXTS,
    conn_complete, conn_end, handler_t, nbd_conn_t, nbd_offered_flags, nbd_stats_t,
)
from ocssd_daemon.native.nbdwire cimport *
from ocssd_daemon.native.reactor cimport (
    EPOLLIN, reactor_add, reactor_lock, reactor_remove, reactor_unlock, reactor_watch,
)

cdef handler_t HANDLERS[NBD_CMDS]
HANDLERS[<int>NBD_CMD_READ] = step_read
HANDLERS[<int>NBD_CMD_WRITE] = step_write
HANDLERS[<int>NBD_CMD_DISC] = step_disconnect
HANDLERS[<int>NBD_CMD_FLUSH] = step_flush
HANDLERS[<int>NBD_CMD_TRIM] = step_trim
HANDLERS[<int>NBD_CMD_CACHE] = step_cache
HANDLERS[<int>NBD_CMD_WRITE_ZEROES] = step_write_zeroes
HANDLERS[<int>NBD_CMD_BLOCK_STATUS] = step_block_status

cdef extents_t EXTENTS[MAX_CONTEXTS]
EXTENTS[1] = extent_allocation
EXTENTS[2] = extent_chunk_state

#: Metadata contexts that exist, with their ids on the wire.
CONTEXTS = {"base:allocation": 1, "x-ocssd:chunk-state": 2}

#: Why a connection ended: the codes that it reports through ``Reactor.events``.
ENDS = {
    END_DISCONNECT: "client disconnected",
    END_EOF: "client closed the connection",
    END_ERROR: "connection lost",
    END_PROTOCOL: "client broke the protocol",
    END_MEMORY: "out of memory",
    END_SHUTDOWN: "shut down",
}


cdef class NbdStats:
    """Counters that all connections of one transport share."""

    cdef nbd_stats_t s

    def as_dict(self):
        return {
            "connections": self.s.connections,
            "requests": self.s.requests,
            "errors": self.s.errors,
            "bytes_read": self.s.bytes_read,
            "bytes_written": self.s.bytes_written,
        }


@cython.no_gc_clear         # __dealloc__ needs the reactor, also at the end of a cycle
cdef class NbdConnection:
    """The transmission phase on the socket *fd*, which stays the caller's and must be open until ``stop`` has returned.

    *flags* are the transmission flags that the client was told, *context_ids* the contexts that it chose, *leftover*
    what it sent behind the last option. When the connection ends, the reactor reports (*token*, a key of ``ENDS``).
    """

    cdef nbd_conn_t c
    cdef Reactor reactor
    cdef Disk disk
    cdef NbdStats stats

    def __cinit__(self, Reactor reactor, Disk disk, NbdStats stats, int fd, uint64_t token, *, uint32_t flags,
                  bint structured=False, bint extended=False, context_ids=(), bytes leftover=b"",
                  uint64_t max_payload_bytes=32 << 20):
        cdef nbd_conn_t *c = &self.c
        if len(leftover) > IN_BYTES:
            raise ValueError(f"leftover: {len(leftover)} bytes, at most {IN_BYTES}")
        self.reactor = reactor
        self.disk = disk
        self.stats = stats
        c.reactor = &reactor.r
        c.disk = &disk.d
        c.stats = &stats.s
        c.handlers = HANDLERS
        c.extents = EXTENTS
        c.fd = fd
        c.mode = NBD_EXTENDED if extended else NBD_STRUCTURED if structured else NBD_SIMPLE
        c.flags = flags
        c.command_flags = nbd_offered_flags(flags, extended)
        c.max_payload_bytes = max_payload_bytes
        for number in context_ids:
            if number not in CONTEXTS.values():
                raise ValueError(f"no context has id {number}")
            c.contexts |= 1u << <int>number
        c.in_data = <char *>malloc(IN_BYTES)
        if c.in_data == NULL:
            raise MemoryError
        memcpy(c.in_data, <const char *>leftover, len(leftover))
        c.in_tail = len(leftover)
        self._init_source(token)

    cdef _init_source(self, uint64_t token):
        self.c.source.poll = conn_poll
        self.c.source.arm = conn_arm
        self.c.source.disarm = conn_disarm
        self.c.source.ready = conn_ready
        self.c.source.complete = conn_complete
        self.c.source.token = token

    def __dealloc__(self):
        if self.reactor is not None and self.c.source.attached:
            self.stop()
        free(self.c.in_data)

    def start(self):
        """Serve from now on. Raises OSError if the socket cannot be watched."""
        cdef nbd_conn_t *c = &self.c
        cdef int failed
        with nogil:
            reactor_lock(c.reactor)
            failed = reactor_watch(c.reactor, &c.source, c.fd, EPOLLIN)
            if not failed:
                c.watched = EPOLLIN
                c.stats.connections += 1
                reactor_add(c.reactor, &c.source)
            reactor_unlock(c.reactor)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def shutdown(self):
        """Answer what has been sent so far, refuse requests that come now with ESHUTDOWN, then end."""
        with nogil:
            reactor_lock(self.c.reactor)
            self.c.shutting_down = 1
            self.c.source.more = self.c.state != CONN_CLOSED
            reactor_unlock(self.c.reactor)

    def stop(self):
        """Leave the reactor; replies that are not sent are lost. May be called twice."""
        cdef nbd_conn_t *c = &self.c
        with nogil:
            reactor_lock(c.reactor)
            reactor_remove(c.reactor, &c.source)
            conn_end(c, END_EOF)
            reactor_unlock(c.reactor)

    @property
    def idle(self):
        """Nothing is being worked on and nothing is left to send."""
        return not (self.c.op_active or self.c.out.bytes or self.c.held or self.c.source.more)

    @property
    def buffered_bytes(self):
        """What this client makes us hold besides its fixed buffers: unsent and deferred replies."""
        return self.c.out.bytes + self.c.held_bytes


# --- the codec, for the tests that hold it to protocol/nbd/wire.py ---

cdef nbd_mode_t mode_of(str name) except *:
    return {"simple": NBD_SIMPLE, "structured": NBD_STRUCTURED, "extended": NBD_EXTENDED}[name]


def decode_request(bytes data, str mode):
    """Fields of a request header, or None when the magic is not that of *mode*."""
    cdef nbd_request_t request
    cdef nbd_mode_t m = mode_of(mode)
    if len(data) != nbd_request_bytes(m):
        raise ValueError(f"{len(data)} bytes, a request has {nbd_request_bytes(m)}")
    if not nbd_decode_request(data, m, &request):
        return None
    return request


def encode_simple(uint64_t cookie, uint32_t error):
    cdef char reply[NBD_SIMPLE_REPLY_BYTES]
    nbd_encode_simple(reply, cookie, error)
    return reply[:NBD_SIMPLE_REPLY_BYTES]


def encode_chunk(str mode, uint64_t cookie, uint64_t offset_bytes, uint16_t flags, uint16_t type,
                 uint64_t length_bytes):
    """Header of a structured or extended reply chunk."""
    cdef char reply[NBD_REPLY_MAX_BYTES]
    cdef nbd_request_t request
    cdef nbd_mode_t m = mode_of(mode)
    memset(&request, 0, sizeof(request))
    request.cookie = cookie
    request.offset_bytes = offset_bytes
    nbd_encode_chunk(reply, m, &request, flags, type, length_bytes)
    return reply[:nbd_reply_bytes(m)]
