"""Owns the C layout of the vfio-user messages that the reactor answers itself: header, register access, several writes.

The same bytes as ``protocol/vfio_user/wire.py``; a test holds the two together. QEMU docs/interop/vfio-user.rst, "Header",
"VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE", "VFIO_USER_REGION_WRITE_MULTI". Lengths and offsets in bytes.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <assert.h>
    #include <stdint.h>
    typedef struct { uint16_t id, command; uint32_t size, flags, error; } ocssd_vfio_header;
    typedef struct { uint64_t offset; uint32_t region, count; } ocssd_vfio_access;
    typedef struct { ocssd_vfio_access access; uint8_t data[8]; } ocssd_vfio_multi_entry;
    _Static_assert(sizeof(ocssd_vfio_header) == 16 && sizeof(ocssd_vfio_access) == 16, "vfio-user messages");
    _Static_assert(sizeof(ocssd_vfio_multi_entry) == 24, "VFIO_USER_REGION_WRITE_MULTI");
    """
    ctypedef struct vfio_header_t "ocssd_vfio_header":
        uint16_t id
        uint16_t command
        uint32_t size
        uint32_t flags
        uint32_t error
    ctypedef struct vfio_access_t "ocssd_vfio_access":
        uint64_t offset
        uint32_t region
        uint32_t count
    ctypedef struct vfio_multi_entry_t "ocssd_vfio_multi_entry":
        vfio_access_t access
        unsigned char data[8]

cdef enum:
    VFIO_REGION_READ = 9
    VFIO_REGION_WRITE = 10
    VFIO_REGION_WRITE_MULTI = 15
    VFIO_COMMANDS = 16          # numbers below this are looked up in the table of those that the reactor knows
    VFIO_REPLY = 1
    VFIO_NO_REPLY = 1 << 4
    VFIO_MULTI_MAX = 200
    VFIO_HEADER_BYTES = 16
    VFIO_ACCESS_BYTES = 16
    VFIO_MULTI_ENTRY_BYTES = 24
    VFIO_BAR0 = 0
