"""Owns the native codec of the NBD transmission phase: headers in, reply headers out. No I/O, no state.

Spec: NBD ``doc/proto.md`` "Request message", "Simple reply message", "Structured reply chunk message", and the
extension branch ``extension-ext-header``. Host-order structs here, big-endian bytes there; lengths and offsets are
bytes. ``protocol/nbd/wire.py`` has the same structs in construct, and a test holds the two together.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <endian.h>
    #include <stdint.h>
    """
    uint16_t be16toh(uint16_t) noexcept nogil
    uint32_t be32toh(uint32_t) noexcept nogil
    uint64_t be64toh(uint64_t) noexcept nogil
    uint16_t htobe16(uint16_t) noexcept nogil
    uint32_t htobe32(uint32_t) noexcept nogil
    uint64_t htobe64(uint64_t) noexcept nogil

cdef enum:
    NBD_REQUEST_MAGIC = 0x25609513
    NBD_EXTENDED_REQUEST_MAGIC = 0x21E41C71
    NBD_SIMPLE_REPLY_MAGIC = 0x67446698
    NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF
    NBD_EXTENDED_REPLY_MAGIC = 0x6E8A278C

    NBD_REQUEST_BYTES = 28
    NBD_EXTENDED_REQUEST_BYTES = 32
    NBD_SIMPLE_REPLY_BYTES = 16
    NBD_STRUCTURED_REPLY_BYTES = 20
    NBD_EXTENDED_REPLY_BYTES = 32
    NBD_REPLY_MAX_BYTES = 32        # the largest reply header

    NBD_CMD_READ = 0
    NBD_CMD_WRITE = 1
    NBD_CMD_DISC = 2
    NBD_CMD_FLUSH = 3
    NBD_CMD_TRIM = 4
    NBD_CMD_CACHE = 5
    NBD_CMD_WRITE_ZEROES = 6
    NBD_CMD_BLOCK_STATUS = 7
    NBD_CMDS = 8

    NBD_CMD_FLAG_FUA = 1
    NBD_CMD_FLAG_NO_HOLE = 2
    NBD_CMD_FLAG_DF = 4
    NBD_CMD_FLAG_REQ_ONE = 8
    NBD_CMD_FLAG_FAST_ZERO = 16
    NBD_CMD_FLAG_PAYLOAD_LEN = 32

    NBD_REPLY_FLAG_DONE = 1
    NBD_REPLY_TYPE_NONE = 0
    NBD_REPLY_TYPE_OFFSET_DATA = 1
    NBD_REPLY_TYPE_OFFSET_HOLE = 2
    NBD_REPLY_TYPE_BLOCK_STATUS = 5
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6
    NBD_REPLY_TYPE_ERROR = 0x8001

    NBD_STATE_HOLE = 1
    NBD_STATE_ZERO = 2

    NBD_OK = 0
    NBD_EPERM = 1
    NBD_EIO = 5
    NBD_ENOMEM = 12
    NBD_EINVAL = 22
    NBD_ENOSPC = 28
    NBD_ENOTSUP = 95
    NBD_ESHUTDOWN = 108


ctypedef enum nbd_mode_t:
    NBD_SIMPLE          # compact requests, simple replies
    NBD_STRUCTURED      # compact requests, structured replies
    NBD_EXTENDED        # extended requests and replies

ctypedef struct nbd_request_t:
    uint16_t flags
    uint16_t type
    uint64_t cookie
    uint64_t offset_bytes
    uint64_t length_bytes


# Wire bytes have no alignment, so every access is a memcpy; compilers make one load and one swap of each.

cdef inline uint16_t get_be16(const char *p) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, p, 2)
    return be16toh(value)

cdef inline uint32_t get_be32(const char *p) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, p, 4)
    return be32toh(value)

cdef inline uint64_t get_be64(const char *p) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, p, 8)
    return be64toh(value)

cdef inline char *put_be16(char *p, uint16_t value) noexcept nogil:
    value = htobe16(value)
    memcpy(p, &value, 2)
    return p + 2

cdef inline char *put_be32(char *p, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(p, &value, 4)
    return p + 4

cdef inline char *put_be64(char *p, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(p, &value, 8)
    return p + 8


cdef inline uint32_t nbd_request_bytes(nbd_mode_t mode) noexcept nogil:
    return NBD_EXTENDED_REQUEST_BYTES if mode == NBD_EXTENDED else NBD_REQUEST_BYTES

cdef inline uint32_t nbd_reply_bytes(nbd_mode_t mode) noexcept nogil:
    if mode == NBD_SIMPLE:
        return NBD_SIMPLE_REPLY_BYTES
    return NBD_EXTENDED_REPLY_BYTES if mode == NBD_EXTENDED else NBD_STRUCTURED_REPLY_BYTES


cdef inline bint nbd_decode_request(const char *p, nbd_mode_t mode, nbd_request_t *request) noexcept nogil:
    """Decode the nbd_request_bytes(mode) at *p*; 0 if the magic is not that of the mode."""
    cdef uint32_t magic = NBD_EXTENDED_REQUEST_MAGIC if mode == NBD_EXTENDED else NBD_REQUEST_MAGIC
    request.flags = get_be16(p + 4)
    request.type = get_be16(p + 6)
    request.cookie = get_be64(p + 8)
    request.offset_bytes = get_be64(p + 16)
    request.length_bytes = get_be64(p + 24) if mode == NBD_EXTENDED else get_be32(p + 24)
    return get_be32(p) == magic


cdef inline char *nbd_encode_simple(char *p, uint64_t cookie, uint32_t error) noexcept nogil:
    p = put_be32(p, NBD_SIMPLE_REPLY_MAGIC)
    p = put_be32(p, error)
    return put_be64(p, cookie)


cdef inline char *nbd_encode_chunk(char *p, nbd_mode_t mode, const nbd_request_t *request, uint16_t flags,
                                   uint16_t type, uint64_t length_bytes) noexcept nogil:
    """Header of a structured or extended chunk with *length_bytes* of payload; returns where the payload goes."""
    p = put_be32(p, NBD_EXTENDED_REPLY_MAGIC if mode == NBD_EXTENDED else NBD_STRUCTURED_REPLY_MAGIC)
    p = put_be16(p, flags)
    p = put_be16(p, type)
    p = put_be64(p, request.cookie)
    if mode == NBD_EXTENDED:
        p = put_be64(p, request.offset_bytes)
        return put_be64(p, length_bytes)
    return put_be32(p, <uint32_t> length_bytes)
