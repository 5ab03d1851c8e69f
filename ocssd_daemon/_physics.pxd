"""C-level face of the physics for the other extensions."""

from libc.stdint cimport uint32_t

from ocssd_daemon.native.faults cimport faults_t, rule_t
from ocssd_daemon.native.timing cimport timing_t
from ocssd_daemon.native.wear cimport wear_t


cdef class Timing:
    cdef timing_t t
    cdef readonly object latency
    cdef readonly uint32_t total_pus
    cdef object kinds
    cdef _copy_numbers(self)

cdef class Faults:
    cdef faults_t f
    cdef dict texts
    cdef dict triggers
    cdef rule_t *_place(self) except NULL
    cdef uint32_t last_id

cdef class Wear:
    cdef wear_t w
    cdef object noted
