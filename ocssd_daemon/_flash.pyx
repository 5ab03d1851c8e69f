# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of a raw namespace in process: arguments in, statuses out, no rules; those are in ``native/nvme_flash.pxd``."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from ocssd_daemon._fast cimport Media
from ocssd_daemon.native.media cimport media_begin
from ocssd_daemon.native.nvme_flash cimport flash_copy, flash_ns_t, flash_read, flash_req_t, flash_reset, flash_write
from ocssd_daemon.native.sys cimport iovec


cdef class Flash:
    """The commands of a raw namespace on numpy arrays, without queues: one rule book for guests and for programs.

    *namespace* is a ``nvme.namespaces.RawNamespace``, *foreign* uint8 per PU of the device. Not thread-safe.
    """

    cdef flash_ns_t ns
    cdef object kept

    def __cinit__(self, namespace, foreign):
        cdef Media media = namespace.media
        cdef unsigned char[::1] owners = foreign
        if media.m.data == NULL:
            raise ValueError("flash that keeps no data cannot be read")
        for i, field in enumerate(namespace.fields):
            self.ns.fields[i].offset, self.ns.fields[i].length, self.ns.fields[i].count = (
                field.offset, field.length, field.count)
        self.ns.media = &media.m
        self.ns.kind = namespace.kind
        self.ns.fill = 0xff if namespace.dlfeat & 7 == 2 else 0
        self.ns.chunk_base = namespace.chunk_base
        self.ns.foreign = &owners[0]
        self.kept = (media, foreign)

    def set_dulbe(self, bint enabled):
        self.ns.dulbe = enabled

    cdef flash_req_t _request(self, const uint64_t[::1] addresses, iovec *data, char *oob) noexcept:
        cdef flash_req_t r
        memset(&r, 0, sizeof(r))
        r.ns = &self.ns
        r.list = &addresses[0]
        r.n = <uint32_t>addresses.shape[0]
        r.data.iov = data
        r.has_data = data != NULL
        r.oob = oob
        media_begin(self.ns.media)
        return r

    def write(self, const uint64_t[::1] addresses, const uint8_t[:, ::1] data, const uint8_t[:, ::1] oob=None):
        """``(status, failed)``; *failed* has bit i set for address i."""
        cdef iovec iov
        iov.iov_base, iov.iov_len = <void *>&data[0, 0], data.shape[0] * data.shape[1]
        cdef flash_req_t r = self._request(addresses, &iov, <char *>&oob[0, 0] if oob is not None else NULL)
        flash_write(&r)
        return r.status, r.failed

    def read(self, const uint64_t[::1] addresses, uint8_t[:, ::1] data, uint8_t[:, ::1] oob=None):
        cdef iovec iov
        iov.iov_base, iov.iov_len = <void *>&data[0, 0], data.shape[0] * data.shape[1]
        cdef flash_req_t r = self._request(addresses, &iov, <char *>&oob[0, 0] if oob is not None else NULL)
        flash_read(&r)
        return r.status, r.failed

    def reset(self, const uint64_t[::1] addresses, uint32_t planes=1):
        cdef flash_req_t r = self._request(addresses, NULL, NULL)
        flash_reset(&r, planes, NULL)
        return r.status, r.failed

    def copy(self, const uint64_t[::1] sources, const uint64_t[::1] addresses):
        cdef flash_req_t r = self._request(addresses, NULL, NULL)
        flash_copy(&r, &sources[0])
        return r.status, r.failed
