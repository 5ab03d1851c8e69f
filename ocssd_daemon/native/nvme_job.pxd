"""Owns the record of a command that goes on in pieces, and the list of them. What a piece does is nvme_long.pxd's."""

from libc.stdint cimport uint32_t, uint64_t

from ocssd_daemon.native.nvme_wire cimport dsm_range_t, sqe_t
from ocssd_daemon.native.reactor cimport source_t

cdef enum:
    JOBS_MAX = 1024             # at once; one more is asked to come again


ctypedef struct job_t:
    job_t *next
    sqe_t s
    uint32_t sqid
    uint64_t at                 # LBAs of the range in hand, half-open: done up to here
    uint64_t end
    uint64_t left               # LBAs that deallocation may still go over
    uint64_t due_ns             # when the flash has done all of it; 0: now
    uint32_t next_range         # of Dataset Management
    uint32_t range_count
    dsm_range_t *ranges         # lie behind the record

ctypedef struct jobs_t:
    source_t source             # first: polled while there are jobs
    void *owner                 # the nvmeq_t
    job_t *first
    job_t *last
    uint32_t count
