"""C-level face of the physics for the other extensions."""

from libc.stdint cimport uint32_t

from ocssd_daemon.native.timing cimport timing_t


cdef class Timing:
    cdef timing_t t
    cdef readonly object latency
    cdef readonly uint32_t total_pus
    cdef _copy_numbers(self)
