"""Owns the C layout of what lies in an NVMe queue: submission entry, completion entry, SGL descriptor, DSM range.

The same bytes as ``protocol/nvme/commands.py``; a test holds the two together. NVM Express Base 1.3, 4.2, 4.4, 4.6.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <assert.h>
    #include <stdint.h>
    typedef struct {
        uint8_t opcode, flags;
        uint16_t cid;
        uint32_t nsid, cdw2, cdw3;
        uint64_t mptr, prp1, prp2;
        uint32_t cdw10, cdw11, cdw12, cdw13, cdw14, cdw15;
    } ocssd_sqe;
    typedef struct { uint32_t dw0, dw1; uint16_t sqhd, sqid, cid, status_phase; } ocssd_cqe;
    typedef struct { uint64_t address; uint32_t length; uint8_t reserved[3], identifier; } ocssd_sgl;
    typedef struct { uint32_t context, nlb; uint64_t slba; } ocssd_dsm_range;
    typedef struct { uint8_t state, type, wear_index, reserved[5]; uint64_t slba, cnlb, wp; } ocssd_chunk_descriptor;
    _Static_assert(sizeof(ocssd_sqe) == 64 && sizeof(ocssd_cqe) == 16, "queue entries");
    _Static_assert(sizeof(ocssd_sgl) == 16 && sizeof(ocssd_dsm_range) == 16, "descriptors");
    _Static_assert(sizeof(ocssd_chunk_descriptor) == 32, "chunk descriptor");
    """
    ctypedef struct sqe_t "ocssd_sqe":
        uint8_t opcode
        uint8_t flags
        uint16_t cid
        uint32_t nsid
        uint32_t cdw2
        uint32_t cdw3
        uint64_t mptr
        uint64_t prp1
        uint64_t prp2
        uint32_t cdw10
        uint32_t cdw11
        uint32_t cdw12
        uint32_t cdw13
        uint32_t cdw14
        uint32_t cdw15
    ctypedef struct cqe_t "ocssd_cqe":
        uint32_t dw0
        uint32_t dw1
        uint16_t sqhd
        uint16_t sqid
        uint16_t cid
        uint16_t status_phase
    ctypedef struct sgl_t "ocssd_sgl":
        uint64_t address
        uint32_t length
        uint8_t identifier
    ctypedef struct dsm_range_t "ocssd_dsm_range":
        uint32_t context
        uint32_t nlb
        uint64_t slba
    ctypedef struct chunk_descriptor_t "ocssd_chunk_descriptor":
        uint8_t state
        uint8_t type
        uint8_t wear_index
        uint64_t slba
        uint64_t cnlb
        uint64_t wp

cdef enum:                      # opcodes of the I/O command sets
    IO_FLUSH = 0x00
    IO_WRITE = 0x01
    IO_READ = 0x02
    IO_COMPARE = 0x05
    IO_WRITE_ZEROES = 0x08
    IO_DSM = 0x09
    IO_VERIFY = 0x0c
    IO_VECTOR_RESET = 0x90
    IO_VECTOR_WRITE = 0x91
    IO_VECTOR_READ = 0x92
    IO_VECTOR_COPY = 0x93

cdef enum:                      # statuses (SCT << 8 | SC); the media's own are in media.pxd
    NVME_OK = 0x000
    NVME_INVALID_OPCODE = 0x001
    NVME_INVALID_FIELD = 0x002
    NVME_DATA_TRANSFER = 0x004
    NVME_INTERNAL = 0x006
    NVME_FAILED_FUSED = 0x009
    NVME_MISSING_FUSED = 0x00a
    NVME_INVALID_NAMESPACE = 0x00b
    NVME_SGL_SEGMENT = 0x00d
    NVME_DATA_SGL_LENGTH = 0x00f
    NVME_METADATA_SGL_LENGTH = 0x010
    NVME_SGL_TYPE = 0x011
    NVME_PRP_OFFSET = 0x013
    NVME_LBA_RANGE = 0x080
    NVME_NOT_READY = 0x082
    NVME_WRITE_FAILED_12 = 0x0ff
    NVME_READ_ONLY = 0x182
    NVME_COMPARE_FAILURE = 0x285
    NVME_EMPTY_PAGE = 0x2ff
    NVME_HIGH_ECC_12 = 0x700    # a warning of OCSSD 1.2 devices that hosts know: the data is valid
    NVME_DNR = 0x4000


cdef inline int nvme_status_field(int status) noexcept nogil:
    """With Do Not Retry where a retry cannot help; the rule of ``protocol/nvme/status.py``, held together by a test."""
    if (status == NVME_OK or 0x006 <= status <= NVME_FAILED_FUSED or status == 0x082 or status == 0x2d0
            or status == 0x2f0 or status == 0x2f1):
        return status
    return status | NVME_DNR


cdef inline uint64_t sqe_slba(const sqe_t *s) noexcept nogil:
    return s.cdw10 | <uint64_t>s.cdw11 << 32


cdef inline uint32_t sqe_nlb(const sqe_t *s) noexcept nogil:
    return (s.cdw12 & 0xffff) + 1
