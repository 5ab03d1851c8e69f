"""C-level face of the NVMe queues for the other extensions: the structs behind GuestMemory and NvmeQueues."""

from libc.stdint cimport uint32_t, uint64_t

from ocssd_daemon._fast cimport Reactor
from ocssd_daemon.native.gmem cimport gmem_t
from ocssd_daemon.native.nvme_flash cimport flash_ns_t
from ocssd_daemon.native.nvmeq cimport nvmeq_t


cdef class GuestMemory:
    cdef gmem_t g
    cdef Reactor reactor

cdef class NvmeQueues:
    cdef nvmeq_t *q
    cdef Reactor reactor
    cdef GuestMemory memory
    cdef object doorbells
    cdef list kept
    cdef dict raw
    cdef _join(self, uint64_t token)
    cdef _format_chunks(self, flash_ns_t *flash, uint32_t first, uint32_t count)
