# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of the vfio-user socket that trio and the reactor share: lend it, take it back, the table of known messages.

When the reactor gives it back, and why nothing can be lost in between, is in ``native/vfio_socket.pxd``.
"""

cimport cython
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free

import os

from ocssd_daemon._fast cimport Reactor
from ocssd_daemon._nvme cimport NvmeQueues
from ocssd_daemon.native.nvmeq cimport NO_FD
from ocssd_daemon.native.reactor cimport reactor_add, reactor_remove
from ocssd_daemon.native.vfio_socket cimport (
    serve_read, serve_write, serve_write_multi, vfio_arm, vfio_complete, vfio_disarm, vfio_give_back, vfio_lend, vfio_poll,
    vfio_ready, vfio_serve_t, vfio_socket_t,
)
from ocssd_daemon.native.vfio_wire cimport (
    VFIO_COMMANDS, VFIO_REGION_READ, VFIO_REGION_WRITE, VFIO_REGION_WRITE_MULTI, vfio_access_t, vfio_header_t,
    vfio_multi_entry_t,
)

cdef vfio_serve_t SERVED_BY[VFIO_COMMANDS]
SERVED_BY[<int>VFIO_REGION_READ] = serve_read
SERVED_BY[<int>VFIO_REGION_WRITE] = serve_write
SERVED_BY[<int>VFIO_REGION_WRITE_MULTI] = serve_write_multi


@cython.no_gc_clear         # __dealloc__ needs the reactor, also at the end of a cycle
cdef class SharedSocket:
    """The non-blocking socket *fd*, which stays the caller's and must be open until ``close`` has returned.

    ``returned_fd`` (an eventfd) is readable when the socket is trio's again after ``lend``.
    """

    cdef vfio_socket_t *s
    cdef NvmeQueues queues
    cdef Reactor reactor
    cdef readonly int returned_fd

    def __cinit__(self, NvmeQueues queues, int fd):
        self.returned_fd = NO_FD
        self.queues, self.reactor = queues, queues.reactor
        self.s = <vfio_socket_t *>calloc(1, sizeof(vfio_socket_t))
        if self.s == NULL:
            raise MemoryError("vfio-user socket")
        self.s.reactor, self.s.queues, self.s.served_by, self.s.fd = &self.reactor.r, queues.q, SERVED_BY, fd
        self.s.source.poll = vfio_poll
        self.s.source.arm = vfio_arm
        self.s.source.disarm = vfio_disarm
        self.s.source.ready = vfio_ready
        self.s.source.complete = vfio_complete
        self.s.source.memory_polled = 1         # while the loop is awake, a look is cheaper than asking epoll
        self.s.returned_fd = self.returned_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self.reactor.paused():
            reactor_add(&self.reactor.r, &self.s.source)

    def close(self):
        """Leave the reactor. May be called twice; before the queues are closed."""
        if self.returned_fd == NO_FD:
            return
        with self.reactor.paused():
            vfio_give_back(self.s)
            reactor_remove(&self.reactor.r, &self.s.source)
        os.close(self.returned_fd)
        self.returned_fd = NO_FD

    def __dealloc__(self):
        if self.s != NULL and self.reactor is not None and self.s.source.attached:
            self.close()                # a session that failed while it was made
        free(self.s)

    def lend(self):
        """The reactor reads and writes from now on. Raises OSError if the socket cannot be watched."""
        with self.reactor.paused():
            failed = vfio_lend(self.s)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def take_back(self):
        """The socket is trio's when this returns; harmless if it is already."""
        with self.reactor.paused():
            vfio_give_back(self.s)

    def unsent(self):
        """Bytes of replies that must go out before anything else does; they are the caller's now."""
        cdef uint32_t bytes = self.s.out_bytes
        if self.s.lent or bytes == 0:
            return b""
        self.s.out_bytes = 0
        return (<const char *>self.s.out)[:bytes]

    @property
    def lent(self):
        return bool(self.s.lent)

    @property
    def served(self):
        """Messages that the reactor answered."""
        return self.s.served

    @property
    def returns(self):
        """Times that the reactor gave the socket back."""
        return self.s.returns


# --- the layouts, for the test that holds them to protocol/vfio_user/wire.py ---

def decode_header(const unsigned char[::1] data):
    return (<const vfio_header_t *>&data[0])[0]


def decode_access(const unsigned char[::1] data):
    return (<const vfio_access_t *>&data[0])[0]


LAYOUT_BYTES = {"header": sizeof(vfio_header_t), "access": sizeof(vfio_access_t), "multi_entry": sizeof(vfio_multi_entry_t)}
