"""Owns the raw commands: vector and scalar write, read, reset, copy on a namespace of flash, for OCSSD 2.0 and 1.2 alike.

Both versions are one code here. What differs is data: how an address is taken apart (``field_t``), and which status a
refusal becomes (``flash_status``). The rules of the flash itself are ``media.pxd``'s.

A command is checked as a whole before anything is written; after that, each run of sectors in one chunk succeeds or
fails by itself, and the failure bitmap (bit i: address i) says which. Bytes lie where the caller resolved them.
OCSSD 2.0 section 3; OCSSD 1.2 section 5; statuses as in ``protocol/nvme/status.py``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ocssd_daemon.native.disk cimport cursor_skip, cursor_t, gather, scatter
from ocssd_daemon.native.media cimport (
    CHUNK_FREE, CHUNK_OFFLINE, CHUNK_RANDOM, MEDIA_CHUNK_CLOSED_EARLY, MEDIA_INVALID_FIELD,
    MEDIA_INVALID_RESET, MEDIA_OFFLINE, MEDIA_OK, MEDIA_OUT_OF_ORDER, MEDIA_UNRECOVERED, MEDIA_UNWRITTEN,
    MEDIA_HIGH_ECC, MEDIA_VERY_HIGH_ECC, MEDIA_WRITE_FAULT, MEDIA_WRITE_NEXT_UNIT,
    chunk_t, media_check_write, media_copy, media_data, media_oob, media_program,
    media_read_trouble, media_readable, media_refresh, media_reset, media_sense, media_t, media_troubled,
    media_wait_ended, ppa_chunk, ppa_of, ppa_sector, store_reserve,
)
from ocssd_daemon.native.nvme_wire cimport (
    NVME_EMPTY_PAGE, NVME_HIGH_ECC_12, NVME_INVALID_FIELD, NVME_LBA_RANGE, NVME_OK, NVME_WRITE_FAILED_12,
    chunk_descriptor_t,
)
from ocssd_daemon.native.timing cimport timing_wait
from ocssd_daemon.native.wear cimport NOTICE_UNRECOVERABLE, wear_note

cdef enum:
    KIND_NONE = 0
    KIND_BLOCK = 1
    KIND_OCSSD20 = 2
    KIND_OCSSD12 = 3

cdef enum:
    VECTOR_MAX = 64             # addresses of one command: the failure bitmap has 64 bits
    MARK_SHIFT = 4              # chunk_t.flags: the bad-block mark of 1.2 (nvme/raw12.py)
    MARK_BAD = 3                # BAD or GROWN_BAD
    FEEDBACK_HIGH = 1           # flash_ns_t.feedback; bit 1: very high effort only

cdef enum:                      # the parts of an address, from bit 0 up
    FIELD_SECTOR = 0
    FIELD_PLANE = 1
    FIELD_PAGE = 2
    FIELD_CHUNK = 3
    FIELD_PU = 4
    FIELD_GROUP = 5
    FIELDS = 6


ctypedef struct field_t:
    uint8_t offset
    uint8_t length
    uint32_t count

ctypedef struct flash_ns_t:
    media_t *media
    uint8_t kind
    uint8_t dulbe               # reading what is not written is an error
    uint8_t feedback            # bits of 2.0, feature CAh: which reads say what effort they took
    uint8_t fill                # predefined data: 0x00 or 0xff
    uint32_t chunk_base         # first chunk of this namespace in the device
    field_t fields[FIELDS]
    const uint8_t *foreign      # [total_pus] 1: somebody else owns the PU

ctypedef struct flash_req_t:
    flash_ns_t *ns
    const uint64_t *list        # the addresses, or NULL: n addresses from `first` on
    uint64_t first
    uint32_t n
    cursor_t data
    bint has_data               # False: zeroes are written, nothing is returned
    char *oob                   # n entries, or NULL
    uint64_t failed             # bit i: address i
    uint64_t noted              # bit i: the read of address i was noted by the flash
    uint64_t very_high          # bit i: that was for very high ECC effort
    uint64_t refreshed          # bit i: it made the device rewrite the chunk
    int status                  # the first failure

ctypedef struct run_t:          # addresses of one command that lie in one chunk, next to each other in the list
    uint32_t first
    uint32_t n
    uint32_t chunk              # of the device
    uint32_t sector
    bint exists
    bint consecutive


# --- addresses ----------------------------------------------------------------------------------------------------

cdef inline uint32_t part(const flash_ns_t *ns, uint64_t address, int field) noexcept nogil:
    return <uint32_t>((address >> ns.fields[field].offset) & ((1ull << ns.fields[field].length) - 1))


cdef inline bint flash_locate(const flash_ns_t *ns, uint64_t address, uint32_t *chunk, uint32_t *sector) noexcept nogil:
    """Chunk of the device and sector in it; False when a part is out of range or the PU is somebody else's."""
    cdef uint32_t parts[FIELDS]
    cdef int i
    for i in range(FIELDS):
        parts[i] = part(ns, address, i)
        if parts[i] >= ns.fields[i].count:
            return False
    i = FIELD_GROUP
    if address >> ns.fields[i].offset >> ns.fields[i].length:
        return False
    chunk[0] = (((parts[FIELD_GROUP] * ns.fields[FIELD_PU].count + parts[FIELD_PU]) * ns.fields[FIELD_CHUNK].count
                 + parts[FIELD_CHUNK]) * ns.fields[FIELD_PLANE].count + parts[FIELD_PLANE] + ns.chunk_base)
    sector[0] = parts[FIELD_PAGE] * ns.fields[FIELD_SECTOR].count + parts[FIELD_SECTOR]
    return True


cdef inline bint is_foreign(const flash_ns_t *ns, uint32_t chunk) noexcept nogil:
    return ns.foreign != NULL and ns.foreign[chunk // ns.media.geometry.chunks] != 0


cdef inline uint64_t address_of(const flash_req_t *r, uint32_t i) noexcept nogil:
    return r.list[i] if r.list != NULL else r.first + i


cdef inline run_t next_run(const flash_req_t *r, uint32_t i) noexcept nogil:
    """The run that starts at address i. In a random chunk a gap ends it; in a sequential one it is a fault of order."""
    cdef run_t run
    cdef uint32_t chunk, sector
    cdef bint random
    run.first = i
    run.n = 1
    run.chunk = run.sector = 0
    run.consecutive = True
    run.exists = flash_locate(r.ns, address_of(r, i), &run.chunk, &run.sector)
    if not run.exists:
        return run
    random = r.ns.media.chunks[run.chunk].type == CHUNK_RANDOM
    while i + run.n < r.n:
        if not flash_locate(r.ns, address_of(r, i + run.n), &chunk, &sector) or chunk != run.chunk:
            break
        if sector != run.sector + run.n:
            if random:
                break
            run.consecutive = False
        run.n += 1
    return run


# --- results ------------------------------------------------------------------------------------------------------

cdef inline void mark_failed(flash_req_t *r, uint32_t first, uint32_t n, int status) noexcept nogil:
    cdef uint32_t i
    if r.status == NVME_OK:
        r.status = status
    for i in range(first, min(first + n, <uint32_t>VECTOR_MAX)):
        r.failed |= 1ull << i


cdef inline int flash_status(const flash_ns_t *ns, int status) noexcept nogil:
    """A status of the flash core in the words of the namespace's version."""
    if status == MEDIA_VERY_HIGH_ECC:
        status = MEDIA_HIGH_ECC
    if ns.kind != KIND_OCSSD12:
        return status
    if status == MEDIA_UNWRITTEN:
        return NVME_EMPTY_PAGE
    if status == MEDIA_UNRECOVERED:
        return status
    if status == MEDIA_HIGH_ECC:
        return NVME_HIGH_ECC_12
    if status == MEDIA_CHUNK_CLOSED_EARLY or status == MEDIA_WRITE_NEXT_UNIT:
        return NVME_WRITE_FAILED_12
    if status == MEDIA_OK or status == NVME_LBA_RANGE or status == NVME_WRITE_FAILED_12:
        return status
    return NVME_INVALID_FIELD


# --- write --------------------------------------------------------------------------------------------------------

cdef inline uint32_t planned_wp(const flash_req_t *r, const run_t *run, bint *again) noexcept nogil:
    """Where the command itself will have left the chunk's write pointer before *run*; only lists visit a chunk twice."""
    cdef run_t earlier
    cdef uint32_t i = 0
    cdef uint32_t wp = r.ns.media.chunks[run.chunk].wp
    again[0] = False
    if r.list == NULL:
        return wp
    while i < run.first:
        earlier = next_run(r, i)
        if earlier.exists and earlier.chunk == run.chunk:
            wp = earlier.sector + earlier.n
            again[0] = True
        i += earlier.n
    return wp


cdef inline int check_run(const flash_req_t *r, const run_t *run) noexcept nogil:
    cdef const media_t *m = r.ns.media
    cdef const chunk_t *c
    cdef bint again = False
    cdef uint32_t wp
    cdef int status
    if not run.exists:
        return NVME_LBA_RANGE if r.ns.kind == KIND_OCSSD12 else MEDIA_WRITE_FAULT
    if is_foreign(r.ns, run.chunk):
        return MEDIA_WRITE_FAULT
    c = &m.chunks[run.chunk]
    wp = planned_wp(r, run, &again)
    if again and c.type != CHUNK_RANDOM:
        if run.sector + run.n > c.cnlb:
            return MEDIA_WRITE_FAULT
        if run.n % m.geometry.ws_min:
            return MEDIA_INVALID_FIELD
        status = MEDIA_OK if run.sector == wp else MEDIA_OUT_OF_ORDER
    else:
        status = media_check_write(m, run.chunk, run.sector, run.n)
    if status == MEDIA_OK and not run.consecutive:
        return MEDIA_OUT_OF_ORDER
    return status


cdef inline bint check_writes(flash_req_t *r) noexcept nogil:
    """Every run, before anything is written; the bits of the runs that break a rule are set."""
    cdef run_t run
    cdef uint32_t i = 0
    cdef int status
    while i < r.n:
        run = next_run(r, i)
        status = check_run(r, &run)
        if status != MEDIA_OK:
            mark_failed(r, run.first, run.n, flash_status(r.ns, status))
        i += run.n
    return r.status == NVME_OK


cdef inline void data_skip(flash_req_t *r, uint64_t bytes) noexcept nogil:
    cdef uint64_t piece
    while r.has_data and bytes:
        cursor_skip(&r.data)
        piece = min(bytes, <uint64_t>(r.data.iov.iov_len - r.data.used))
        r.data.used += piece
        bytes -= piece


cdef inline void place_run(flash_req_t *r, const run_t *run) noexcept nogil:
    """Data and OOB of *run* to where they will be programmed."""
    cdef media_t *m = r.ns.media
    cdef uint64_t ppa = ppa_of(m, run.chunk, run.sector)
    cdef uint64_t bytes = <uint64_t>run.n * m.geometry.sector_bytes
    if r.has_data:
        gather(&r.data, media_data(m, ppa), bytes)
    else:
        memset(media_data(m, ppa), 0, bytes)
    if r.oob != NULL:
        memcpy(media_oob(m, ppa), r.oob + <uint64_t>run.first * m.geometry.oob_bytes, <uint64_t>run.n * m.geometry.oob_bytes)


cdef inline int write_run(flash_req_t *r, const run_t *run) noexcept nogil:
    cdef media_t *m = r.ns.media
    cdef uint32_t good = 0
    cdef int status = media_check_write(m, run.chunk, run.sector, run.n)    # a run before this may have closed the chunk
    if status == MEDIA_OK and m.chunks[run.chunk].state == CHUNK_FREE:
        status = store_reserve(m, run.chunk)
    if status == MEDIA_OK:
        place_run(r, run)
        status = media_program(m, run.chunk, run.sector, run.n)
        media_wait_ended(m)
        good = m.good_sectors
    else:
        data_skip(r, <uint64_t>run.n * m.geometry.sector_bytes)
    if status != MEDIA_OK:
        mark_failed(r, run.first + good, run.n - good, flash_status(r.ns, status))
    return status


cdef inline void flash_write(flash_req_t *r) noexcept nogil:
    cdef run_t run
    cdef uint32_t i = 0
    if not check_writes(r):
        return
    while i < r.n:
        run = next_run(r, i)
        write_run(r, &run)
        i += run.n


# --- read ---------------------------------------------------------------------------------------------------------

cdef inline bint flash_readable(const flash_ns_t *ns, uint64_t address, uint64_t *ppa) noexcept nogil:
    cdef uint32_t chunk = 0, sector = 0
    if not flash_locate(ns, address, &chunk, &sector) or is_foreign(ns, chunk):
        return False
    ppa[0] = ppa_of(ns.media, chunk, sector)
    return media_readable(ns.media, ppa[0])


cdef inline void return_predefined(flash_req_t *r, uint32_t i) noexcept nogil:
    """An unwritten sector: data as DLFEAT promises, and OOB of ones.

    pblk takes the OOB's first word for a logical address when it recovers an open line: ones are its "none", while
    zeroes would map logical sector 0 to flash that was never written.
    """
    cdef media_t *m = r.ns.media
    cdef uint64_t left = m.geometry.sector_bytes, piece
    while r.has_data and left:
        cursor_skip(&r.data)
        piece = min(left, <uint64_t>(r.data.iov.iov_len - r.data.used))
        memset(<char *>r.data.iov.iov_base + r.data.used, r.ns.fill, piece)
        r.data.used += piece
        left -= piece
    if r.oob != NULL:
        memset(r.oob + <uint64_t>i * m.geometry.oob_bytes, 0xFF, m.geometry.oob_bytes)


cdef inline void return_sector(flash_req_t *r, uint32_t i, uint64_t ppa) noexcept nogil:
    cdef media_t *m = r.ns.media
    if r.has_data:
        scatter(&r.data, media_data(m, ppa), m.geometry.sector_bytes)
    if r.oob != NULL:
        memcpy(r.oob + <uint64_t>i * m.geometry.oob_bytes, media_oob(m, ppa), m.geometry.oob_bytes)
    if not media_troubled(m):
        m.chunks[ppa >> m.geometry.sector_bits].reads += 1
    m.sectors_read += 1
    if m.timing != NULL:
        timing_wait(m.timing, media_sense(m, ppa, 0, False))


cdef inline int read_trouble(flash_req_t *r, uint32_t i, uint64_t ppa) noexcept nogil:
    """What rules and wear do to this read. Notes the address when the flash noted its chunk."""
    cdef media_t *m = r.ns.media
    cdef uint64_t noticed = m.wear.noticed if m.wear != NULL else 0
    cdef int status = media_read_trouble(m, ppa)
    if status == MEDIA_UNRECOVERED and m.wear != NULL:
        # What a rule breaks is noted for the guest only: our FTL moves what it can read, and a rule may go away again.
        wear_note(m.wear, ppa_chunk(m, ppa), ppa_sector(m, ppa), NOTICE_UNRECOVERABLE)
    if m.wear != NULL and m.wear.noticed != noticed and i < VECTOR_MAX:
        r.noted |= 1ull << i
        if status == MEDIA_VERY_HIGH_ECC:
            r.very_high |= 1ull << i
        if status != MEDIA_UNRECOVERED and media_refresh(m, ppa_chunk(m, ppa)):
            r.refreshed |= 1ull << i
    return status


cdef inline bint effort_is_told(const flash_ns_t *ns, int status) noexcept nogil:
    """Does a read of that ECC effort say so? In 1.2 always; in 2.0 as the host has asked for. Spec: 2.0, feature CAh."""
    if status == MEDIA_HIGH_ECC:
        return ns.kind == KIND_OCSSD12 or ns.feedback & FEEDBACK_HIGH
    if status == MEDIA_VERY_HIGH_ECC:
        return ns.kind == KIND_OCSSD12 or ns.feedback != 0
    return False


cdef inline void read_sector(flash_req_t *r, uint32_t i, uint64_t ppa) noexcept nogil:
    """One readable sector: its data, unless the flash cannot recover it. High ECC effort is a warning: the data is valid."""
    cdef int status = read_trouble(r, i, ppa) if media_troubled(r.ns.media) else MEDIA_OK
    if status == MEDIA_UNRECOVERED:
        return_predefined(r, i)
        mark_failed(r, i, 1, flash_status(r.ns, status))
        return
    return_sector(r, i, ppa)
    if effort_is_told(r.ns, status) and r.status == NVME_OK:
        r.status = flash_status(r.ns, status)


cdef inline void flash_read(flash_req_t *r) noexcept nogil:
    """Each sector by itself: written ones are returned, for the others predefined data or a failure (DULBE, 1.2)."""
    cdef bint failing = r.ns.dulbe or (r.ns.kind == KIND_OCSSD12 and r.list != NULL)
    cdef uint64_t ppa = 0
    cdef uint32_t i
    for i in range(r.n):
        if flash_readable(r.ns, address_of(r, i), &ppa):
            read_sector(r, i, ppa)
        else:
            return_predefined(r, i)
            if failing:
                mark_failed(r, i, 1, flash_status(r.ns, MEDIA_UNWRITTEN))


# --- reset --------------------------------------------------------------------------------------------------------

cdef inline bint marked_bad(const flash_ns_t *ns, uint32_t chunk) noexcept nogil:
    return ns.kind == KIND_OCSSD12 and (ns.media.chunks[chunk].flags >> MARK_SHIFT) & MARK_BAD


cdef inline int reset_chunk(flash_ns_t *ns, uint32_t chunk) noexcept nogil:
    """One chunk, whoever asks (vector reset, DSM, 1.2 erase). Erasing an erased block is success in 1.2."""
    cdef int status
    if is_foreign(ns, chunk):
        return MEDIA_OFFLINE
    if marked_bad(ns, chunk):
        return MEDIA_INVALID_FIELD
    if ns.kind == KIND_OCSSD12 and ns.media.chunks[chunk].state == CHUNK_FREE:
        return MEDIA_OK
    status = media_reset(ns.media, chunk)
    if status == MEDIA_INVALID_RESET and ns.kind == KIND_OCSSD12:      # what may not be reset was refused above
        return NVME_WRITE_FAILED_12
    return status


cdef inline int reset_planes(flash_ns_t *ns, uint64_t address, uint32_t planes) noexcept nogil:
    """The block of *address*, in all *planes* planes that the 1.2 plane mode takes together."""
    cdef uint32_t chunk = 0, sector = 0, plane
    cdef int status = MEDIA_OK, one
    if not flash_locate(ns, address, &chunk, &sector):
        return NVME_LBA_RANGE if ns.kind == KIND_OCSSD12 else MEDIA_INVALID_RESET
    if planes == 1:
        return reset_chunk(ns, chunk)
    chunk -= part(ns, address, FIELD_PLANE) % planes
    for plane in range(planes):
        one = reset_chunk(ns, chunk + plane)
        if one != MEDIA_OK:
            status = one
    return status


cdef inline void describe_chunk(const flash_ns_t *ns, uint64_t address, chunk_descriptor_t *d) noexcept nogil:
    """The chunk's entry of the chunk information log. Spec: 2.0, chunk descriptor."""
    cdef uint32_t chunk = 0, sector = 0
    cdef const chunk_t *c
    memset(d, 0, sizeof(chunk_descriptor_t))
    d.slba = address & ~((1ull << ns.fields[FIELD_CHUNK].offset) - 1)
    d.wp = <uint64_t>-1
    d.state = CHUNK_OFFLINE
    if not flash_locate(ns, address, &chunk, &sector):
        return
    c = &ns.media.chunks[chunk]
    d.type = c.type
    d.wear_index = c.wear_index
    d.cnlb = c.cnlb
    if is_foreign(ns, chunk):
        return
    d.state = c.state
    if c.state != CHUNK_OFFLINE and c.type != CHUNK_RANDOM:
        d.wp = c.wp


cdef inline void flash_reset(flash_req_t *r, uint32_t planes, chunk_descriptor_t *descriptors) noexcept nogil:
    """Every address is tried; a failure in the middle does not undo the others, and the command completes once."""
    cdef uint32_t i
    cdef int status
    for i in range(r.n):
        status = reset_planes(r.ns, address_of(r, i), planes)
        if status != MEDIA_OK:
            mark_failed(r, i, 1, flash_status(r.ns, status))
        if descriptors != NULL:
            describe_chunk(r.ns, address_of(r, i), &descriptors[i])


cdef inline int flash_reset_range(flash_ns_t *ns, uint64_t slba, uint32_t nlb) noexcept nogil:
    """Dataset Management on a raw namespace: exactly one chunk. Spec: 2.0, DSM deallocate."""
    cdef uint32_t chunk = 0, sector = 0
    if not flash_locate(ns, slba, &chunk, &sector):
        return flash_status(ns, MEDIA_INVALID_RESET)
    if sector:
        return NVME_INVALID_FIELD
    if nlb != ns.media.chunks[chunk].cnlb:
        return NVME_LBA_RANGE
    return flash_status(ns, reset_chunk(ns, chunk))


# --- copy ---------------------------------------------------------------------------------------------------------

cdef inline bint find_sources(flash_req_t *r, const uint64_t *sources, uint64_t *ppas) noexcept nogil:
    cdef uint32_t i
    for i in range(r.n):
        ppas[i] = 0
        if not flash_readable(r.ns, sources[i], &ppas[i]):
            mark_failed(r, i, 1, MEDIA_UNRECOVERED if not r.ns.dulbe else MEDIA_UNWRITTEN)
    return r.status == NVME_OK


cdef inline void flash_copy(flash_req_t *r, const uint64_t *sources) noexcept nogil:
    """Copy sector by sector to the addresses of *r*; all must be readable and writable, or nothing is done."""
    cdef uint64_t ppas[VECTOR_MAX]
    cdef run_t run
    cdef uint32_t i = 0
    cdef int status
    if not find_sources(r, sources, ppas) or not check_writes(r):
        return
    while i < r.n:
        run = next_run(r, i)
        status = media_copy(r.ns.media, &ppas[i], ppa_of(r.ns.media, run.chunk, run.sector), run.n)
        if status != MEDIA_OK:
            mark_failed(r, run.first, run.n, flash_status(r.ns, status))
        i += run.n
