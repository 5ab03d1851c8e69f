"""C-level face of the core for the other extensions: the structs behind Media, Ftl, Disk and Reactor."""

from libc.stdint cimport uint32_t, uint64_t

from ocssd_daemon.native.disk cimport disk_t
from ocssd_daemon.native.ftl cimport ftl_t
from ocssd_daemon.native.media cimport media_t
from ocssd_daemon.native.reactor cimport reactor_t


cdef class Media:
    cdef media_t m
    cdef readonly object geometry
    cdef readonly object store
    cdef readonly dict attached     # what the media points at: kept alive here
    cdef object _views
    cdef _count_open(self)

cdef class Ftl:
    cdef ftl_t f
    cdef readonly Media media
    cdef object _views
    cdef _allocate(self, targets)

cdef class Disk:
    cdef disk_t d
    cdef readonly Ftl ftl
    cdef _need_data(self)

cdef class Reactor:
    cdef Media media
    cdef reactor_t r
    cdef bint open
