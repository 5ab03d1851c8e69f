# cython: cdivision=True
"""Owns the rules of the flash: what may be written, read, reset and copied, and the state of every chunk.

All rules of the Open-Channel SSD specification 2.0 (write pointer, ws_min, mw_cunits, open-chunk limits, chunk states)
are enforced here and nowhere else; OCSSD 1.2, OCSSD 2.0, the host FTL and the Python API are callers. Results are NVMe
status values (SCT << 8 | SC, without the DNR bit): 0 is success.

Addresses: a *chunk index* counts chunks in the order of the chunk log (chunk within PU within group). A *ppa* is
``chunk_index << sector_bits | sector``, so that taking it apart costs a shift. Sizes are in sectors unless they say bytes.

The media knows no L2P, no transport and reads no clock. Spec: OCSSD 2.0 (29 Jan 2018), sections 2.3-2.6 and 3.1-3.3.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ocssd_daemon.native.sys cimport store_release_u64
from ocssd_daemon.native.faults cimport (
    FAULT_CORRUPT, FAULT_OFFLINE, FAULT_POWER_CUT, FAULT_READ, FAULT_RESET, FAULT_TORN, FAULT_WRITE,
    fault_random, faults_ask, faults_t, rule_t,
)
from ocssd_daemon.native.timing cimport (
    timing_begin, timing_delay, timing_erase, timing_occupy, timing_program, timing_rewrite_ns, timing_sense, timing_t,
    timing_told, timing_wait, timing_wait_for, wait_t,
)
from ocssd_daemon.native.wear cimport (
    NOTICE_HIGH_ERRORS, NOTICE_MEDIUM_ERRORS, NOTICE_REFRESHED, NOTICE_UNRECOVERABLE, NOTICE_WEAR,
    READ_GOOD, READ_UNCORRECTABLE, READ_VERY_HIGH_ECC,
    wear_error_mean, wear_fails, wear_note, wear_read, wear_t,
)


cdef enum:                      # chunk states and types: the values of the chunk information log
    CHUNK_FREE = 1
    CHUNK_CLOSED = 2
    CHUNK_OPEN = 4
    CHUNK_OFFLINE = 8
    CHUNK_SEQUENTIAL = 1
    CHUNK_RANDOM = 2

cdef enum:                      # chunk_t.flags: armed faults
    CHUNK_FAIL_WRITE = 1        # the next program fails and closes the chunk early
    CHUNK_FAIL_RESET = 2        # the next reset fails and takes the chunk offline
    CHUNK_DIES = 4              # with FAIL_WRITE: the chunk goes offline at once
    CHUNK_RETIRED = 8           # the FTL takes it offline instead of erasing it

cdef extern from *:
    """
    #define OCSSD_REFRESH_HELPS 0.75
    """
    const double REFRESH_HELPS "OCSSD_REFRESH_HELPS"    # a rewritten chunk has at most this share of the errors

cdef enum:                      # media_t.flags
    MEDIA_EARLY_RESET = 1       # an OPEN chunk may be reset (pblk needs it)
    MEDIA_MULTI_RESET = 2       # a FREE chunk may be reset (MCCAP bit 1)

cdef enum:                      # NVMe status values
    MEDIA_OK = 0
    MEDIA_INVALID_FIELD = 0x002
    MEDIA_WRITE_FAULT = 0x280
    MEDIA_UNRECOVERED = 0x281
    MEDIA_UNWRITTEN = 0x287     # deallocated or unwritten logical block
    MEDIA_OFFLINE = 0x2c0
    MEDIA_INVALID_RESET = 0x2c1
    MEDIA_HIGH_ECC = 0x2d0      # a warning: the data is valid
    MEDIA_VERY_HIGH_ECC = 0x12d0    # the same to the host, which may ask for these alone (feature CAh)
    MEDIA_WRITE_NEXT_UNIT = 0x2f0
    MEDIA_CHUNK_CLOSED_EARLY = 0x2f1
    MEDIA_OUT_OF_ORDER = 0x2f2

cdef enum:
    NO_WP = 0xffffffff          # write pointer of an OFFLINE chunk


ctypedef struct geometry_t:
    uint32_t groups
    uint32_t pus                # per group
    uint32_t chunks             # per PU
    uint32_t sectors            # per chunk
    uint32_t sector_bytes
    uint32_t oob_bytes          # per sector
    uint32_t ws_min
    uint32_t ws_opt
    uint32_t mw_cunits
    uint32_t maxoc              # 0: no limit
    uint32_t maxocpu            # 0: no limit
    uint32_t total_pus
    uint32_t total_chunks
    uint32_t sector_bits

cdef extern from *:
    """
    #include <stdint.h>
    #include <assert.h>
    /* One entry of the chunk table, as it lies in the image file. state..wp are one 64-bit word, stored at once, so
       that a kill between two instructions never leaves a state without its write pointer. */
    typedef struct {
        uint8_t state;
        uint8_t type;
        uint8_t wear_index;
        uint8_t flags;
        uint32_t wp;
        uint32_t cnlb;
        uint32_t pe_cycles;
        uint32_t pe_limit;
        uint32_t reads;
        uint64_t programmed_ns;
    } ocssd_chunk;
    _Static_assert(sizeof(ocssd_chunk) == 32, "chunk table entry");

    static inline uint64_t ocssd_chunk_word(const ocssd_chunk *c, uint8_t state, uint32_t wp, uint8_t wear_index, uint8_t flags) {
        ocssd_chunk w = { .state = state, .type = c->type, .wear_index = wear_index, .flags = flags, .wp = wp };
        uint64_t word;
        __builtin_memcpy(&word, &w, 8);
        return word;
    }
    """
    ctypedef struct chunk_t "ocssd_chunk":
        uint8_t state
        uint8_t type
        uint8_t wear_index
        uint8_t flags
        uint32_t wp
        uint32_t cnlb
        uint32_t pe_cycles
        uint32_t pe_limit       # P/E cycles after which a reset takes the chunk offline; 0: none
        uint32_t reads          # since the last reset
        uint64_t programmed_ns
    uint64_t chunk_word "ocssd_chunk_word" (const chunk_t *c, uint8_t state, uint32_t wp, uint8_t wear_index, uint8_t flags) noexcept nogil

cdef extern from "fcntl.h" nogil:
    int fallocate(int fd, int mode, long long offset, long long length)

cdef extern from "errno.h" nogil:
    int errno
    int EDQUOT
    int EINTR
    int ENOSPC


ctypedef struct media_t:
    geometry_t geometry
    chunk_t *chunks             # [total_chunks]
    char *oob                   # [total_chunks * sectors][oob_bytes]
    char *data                  # [total_chunks * sectors][sector_bytes]; NULL: no data kept (simulation)
    uint32_t *open_of_pu        # [total_pus] open chunks
    uint32_t open_total
    uint32_t flags
    int store_fd                # image file, -1 in RAM
    uint64_t data_offset        # of the data region in the image file
    uint64_t oob_offset
    uint64_t sectors_written
    uint64_t sectors_read
    uint64_t chunks_reset
    uint64_t write_failures
    uint64_t reset_failures
    uint64_t store_full         # chunks that could not be opened because the host's disk is full
    uint64_t now_ns             # time of the command in hand
    uint64_t (*clock)() noexcept nogil      # NULL: the owner sets now_ns (virtual time)
    timing_t *timing            # NULL: everything ends at once
    uint64_t ready_ns           # the next program or reset begins no earlier; it takes this back to 0
    uint64_t ended_ns           # when the last program or reset ends
    uint32_t ended_pu           # where it was
    uint32_t good_sectors       # of the program that failed last: so many from its start are readable
    uint64_t extra_ns           # the next sense takes longer by this; it takes it back to 0
    faults_t *faults            # NULL: no rules
    wear_t *wear                # NULL: flash that does not age
    uint64_t born_ns            # time of the clock at which the drive was ``age_ns`` old
    uint64_t age_ns


# --- time ---------------------------------------------------------------------------------------------------------

cdef inline void media_begin(media_t *m) noexcept nogil:
    """A command begins: take the time. Costs a branch when nothing depends on it."""
    if m.timing == NULL and m.wear == NULL:
        return
    if m.clock != NULL:
        m.now_ns = m.clock()
    if m.timing != NULL:
        timing_begin(m.timing, m.now_ns)


cdef inline void media_wait_ended(media_t *m) noexcept nogil:
    """The command in hand lasts until its program or reset has ended."""
    cdef wait_t w
    if m.timing != NULL:
        w = timing_told(m.timing, m.ended_pu, m.ended_ns)
        timing_wait_for(m.timing, &w)


cdef inline uint64_t media_done_ns(const media_t *m) noexcept nogil:
    """When the command in hand ends; 0: now."""
    if m.timing == NULL or m.timing.done_ns <= m.now_ns:
        return 0
    return m.timing.done_ns


# --- addresses ----------------------------------------------------------------------------------------------------

cdef inline uint64_t ppa_of(const media_t *m, uint32_t chunk, uint32_t sector) noexcept nogil:
    return (<uint64_t>chunk << m.geometry.sector_bits) | sector

cdef inline uint32_t ppa_chunk(const media_t *m, uint64_t ppa) noexcept nogil:
    return <uint32_t>(ppa >> m.geometry.sector_bits)

cdef inline uint32_t ppa_sector(const media_t *m, uint64_t ppa) noexcept nogil:
    return <uint32_t>(ppa & ((1ull << m.geometry.sector_bits) - 1))

cdef inline bint ppa_exists(const media_t *m, uint64_t ppa) noexcept nogil:
    return (ppa >> m.geometry.sector_bits) < m.geometry.total_chunks and ppa_sector(m, ppa) < m.geometry.sectors

cdef inline uint64_t sector_index(const media_t *m, uint64_t ppa) noexcept nogil:
    """Row of the data and OOB arrays."""
    return <uint64_t>ppa_chunk(m, ppa) * m.geometry.sectors + ppa_sector(m, ppa)

cdef inline char *media_data(const media_t *m, uint64_t ppa) noexcept nogil:
    return m.data + sector_index(m, ppa) * m.geometry.sector_bytes

cdef inline char *media_oob(const media_t *m, uint64_t ppa) noexcept nogil:
    return m.oob + sector_index(m, ppa) * m.geometry.oob_bytes

cdef inline uint32_t chunk_pu(const media_t *m, uint32_t chunk) noexcept nogil:
    return chunk // m.geometry.chunks


# --- state transitions --------------------------------------------------------------------------------------------

cdef inline void chunk_set(chunk_t *c, uint8_t state, uint32_t wp) noexcept nogil:
    store_release_u64(c, chunk_word(c, state, wp, c.wear_index, c.flags))


cdef inline void chunk_set_wear(chunk_t *c, uint8_t wear_index) noexcept nogil:
    store_release_u64(c, chunk_word(c, c.state, c.wp, wear_index, c.flags))


cdef inline void chunk_opened(media_t *m, uint32_t chunk) noexcept nogil:
    m.open_of_pu[chunk_pu(m, chunk)] += 1
    m.open_total += 1


cdef inline void chunk_not_open(media_t *m, uint32_t chunk) noexcept nogil:
    m.open_of_pu[chunk_pu(m, chunk)] -= 1
    m.open_total -= 1


cdef inline void chunk_close_early(media_t *m, uint32_t chunk) noexcept nogil:
    """OPEN to CLOSED with the write pointer where it is; sectors below it stay readable."""
    cdef chunk_t *c = &m.chunks[chunk]
    if c.state == CHUNK_OPEN:
        chunk_not_open(m, chunk)
    chunk_set(c, CHUNK_CLOSED, c.wp)


cdef inline void chunk_go_offline(media_t *m, uint32_t chunk) noexcept nogil:
    cdef chunk_t *c = &m.chunks[chunk]
    if c.state == CHUNK_OPEN:
        chunk_not_open(m, chunk)
    chunk_set(c, CHUNK_OFFLINE, NO_WP)


cdef inline bint may_open(const media_t *m, uint32_t chunk) noexcept nogil:
    """Is there room for one more open chunk? Spec: 2.0 geometry, MAXOC and MAXOCPU."""
    cdef const geometry_t *g = &m.geometry
    return ((g.maxoc == 0 or m.open_total < g.maxoc)
            and (g.maxocpu == 0 or m.open_of_pu[chunk_pu(m, chunk)] < g.maxocpu))


cdef inline bint disk_is_full(int fd, uint64_t offset, uint64_t length) noexcept nogil:
    """Allocate a range of the image. File systems that cannot do it ahead of time are trusted to have room."""
    while fallocate(fd, 0, offset, length) != 0:
        if errno != EINTR:
            return errno == ENOSPC or errno == EDQUOT
    return False


cdef inline int store_reserve(media_t *m, uint32_t chunk) noexcept nogil:
    """Make the host file system reserve the chunk's data and OOB now: a full disk is a write fault here, a SIGBUS later."""
    cdef uint64_t data_bytes = <uint64_t>m.geometry.sectors * m.geometry.sector_bytes
    cdef uint64_t oob_bytes = <uint64_t>m.geometry.sectors * m.geometry.oob_bytes
    if m.store_fd < 0 or m.data == NULL:
        return MEDIA_OK
    if disk_is_full(m.store_fd, m.data_offset + chunk * data_bytes, data_bytes) or (
            oob_bytes and disk_is_full(m.store_fd, m.oob_offset + chunk * oob_bytes, oob_bytes)):
        m.store_full += 1
        return MEDIA_WRITE_FAULT
    return MEDIA_OK


cdef inline int store_reserve_first(media_t *m, uint32_t chunk) noexcept nogil:
    """The same before the first write to a FREE chunk."""
    return store_reserve(m, chunk) if m.chunks[chunk].state == CHUNK_FREE else MEDIA_OK


cdef inline uint8_t wear_index_after(const chunk_t *c) noexcept nogil:
    """With one P/E cycle more: 255 x used / limit, monotone. Spec: 2.0 chunk descriptor, WLI.

    Without a limit there is nothing to relate to: what a chunk state file or an imported image says stays.
    """
    if c.pe_limit == 0:
        return c.wear_index
    return <uint8_t>min(<uint64_t>255, 255 * (<uint64_t>c.pe_cycles + 1) // c.pe_limit)


# --- misfortune: rules and wear -----------------------------------------------------------------------------------

cdef extern from "signal.h" nogil:
    int raise_signal "raise" (int)
    int SIGKILL

cdef inline bint media_troubled(const media_t *m) noexcept nogil:
    return m.faults != NULL or m.wear != NULL


cdef inline uint64_t media_age_ns(const media_t *m) noexcept nogil:
    return m.age_ns + (m.now_ns - m.born_ns if m.now_ns > m.born_ns else 0)


cdef inline rule_t *media_ask(media_t *m, uint32_t operation, uint32_t chunk, uint32_t sector, uint32_t n) noexcept nogil:
    """The rule that strikes, or NULL; delays are taken on the PU's timeline here."""
    cdef rule_t *rule
    if m.faults == NULL:
        return NULL
    rule = faults_ask(m.faults, operation, chunk, sector, n)
    if m.timing != NULL and m.faults.delay_ns + m.faults.hang_ns:
        timing_delay(m.timing, chunk_pu(m, chunk), m.faults.delay_ns, m.faults.hang_ns)
    if rule != NULL and rule.action == FAULT_POWER_CUT:
        raise_signal(SIGKILL)
    return rule


cdef inline void media_write_trouble(media_t *m, uint32_t chunk, uint32_t sector, uint32_t n) noexcept nogil:
    """Arm the fault that this program meets, if any. A rule for later sectors lets the earlier ones be written."""
    cdef chunk_t *c = &m.chunks[chunk]
    cdef const rule_t *rule = media_ask(m, FAULT_WRITE, chunk, sector, n)
    cdef uint32_t half = m.geometry.sector_bytes >> 1
    if rule == NULL:
        pass
    elif rule.action == FAULT_TORN:
        if m.data != NULL:
            memset(media_data(m, ppa_of(m, chunk, sector + n - 1)) + half, 0, half)
    elif rule.action == FAULT_OFFLINE:
        c.flags |= CHUNK_FAIL_WRITE | CHUNK_DIES
    else:
        c.flags |= CHUNK_FAIL_WRITE
        m.good_sectors = rule.sector.first - sector if rule.sector.first > sector else 0
    if m.wear == NULL:
        return
    if c.state == CHUNK_FREE:
        c.programmed_ns = media_age_ns(m)
    if wear_fails(m.wear, c.pe_cycles, c.pe_limit):
        m.wear.program_failures += 1
        c.flags |= CHUNK_FAIL_WRITE


cdef inline void media_erase_trouble(media_t *m, uint32_t chunk) noexcept nogil:
    """Arm the fault that this erase meets, if any."""
    cdef chunk_t *c = &m.chunks[chunk]
    if media_ask(m, FAULT_RESET, chunk, 0, m.geometry.sectors) != NULL:
        c.flags |= CHUNK_FAIL_RESET
    if m.wear == NULL:
        return
    m.wear.noted[chunk] = 0
    if wear_fails(m.wear, c.pe_cycles, c.pe_limit):
        m.wear.erase_failures += 1
        c.flags |= CHUNK_FAIL_RESET
    # Noted when it crosses into the next band of the wear-level index. Spec: 2.0 section 2.3, WIT.
    if m.wear.wear_delta and wear_index_after(c) // m.wear.wear_delta > c.wear_index // m.wear.wear_delta:
        wear_note(m.wear, chunk, 0, NOTICE_WEAR)


cdef inline void media_corrupt(media_t *m, uint64_t ppa, uint64_t bits) noexcept nogil:
    """Flip stored bits, for good."""
    cdef uint64_t at, _
    for _ in range(bits):
        at = fault_random(&m.faults.rng) % (8 * <uint64_t>m.geometry.sector_bytes)
        media_data(m, ppa)[at >> 3] ^= <char>(1 << (at & 7))


cdef inline int media_rules_read(media_t *m, uint64_t ppa) noexcept nogil:
    cdef uint32_t chunk = ppa_chunk(m, ppa)
    cdef const rule_t *rule = media_ask(m, FAULT_READ, chunk, ppa_sector(m, ppa), 1)
    if rule == NULL:
        return MEDIA_OK
    if rule.action == FAULT_CORRUPT:
        if m.data != NULL:
            media_corrupt(m, ppa, rule.amount)
        return MEDIA_OK
    if rule.action == FAULT_OFFLINE:
        chunk_go_offline(m, chunk)
    return MEDIA_UNRECOVERED


cdef inline double media_error_mean(const media_t *m, const chunk_t *c) noexcept nogil:
    """Expected raw bit errors of a sector of *c* now."""
    cdef uint64_t age_ns = media_age_ns(m)
    cdef double days = <double>(age_ns - c.programmed_ns if age_ns > c.programmed_ns else 0) / 86400e9
    return wear_error_mean(m.wear, c.pe_cycles, c.pe_limit, c.reads, days)


cdef inline int media_wear_read(media_t *m, uint64_t ppa) noexcept nogil:
    cdef uint32_t chunk = ppa_chunk(m, ppa)
    cdef int outcome
    if m.wear.ecc_bits == 0:
        return MEDIA_OK
    outcome = wear_read(m.wear, media_error_mean(m, &m.chunks[chunk]))
    m.extra_ns += m.wear.extra_ns
    if outcome == READ_GOOD:
        return MEDIA_OK
    if outcome == READ_UNCORRECTABLE:
        wear_note(m.wear, chunk, ppa_sector(m, ppa), NOTICE_UNRECOVERABLE)
        return MEDIA_UNRECOVERED
    if outcome == READ_VERY_HIGH_ECC:
        wear_note(m.wear, chunk, ppa_sector(m, ppa), NOTICE_HIGH_ERRORS)
        return MEDIA_VERY_HIGH_ECC
    wear_note(m.wear, chunk, ppa_sector(m, ppa), NOTICE_MEDIUM_ERRORS)
    return MEDIA_HIGH_ECC


cdef inline int media_read_trouble(media_t *m, uint64_t ppa) noexcept nogil:
    """What befalls the read of one sector; call it before ``media_sense``, when ``media_troubled``.

    MEDIA_OK, MEDIA_HIGH_ECC, MEDIA_VERY_HIGH_ECC (warnings, the data is valid) or MEDIA_UNRECOVERED.
    """
    m.chunks[ppa_chunk(m, ppa)].reads += 1
    cdef int status = media_rules_read(m, ppa) if m.faults != NULL else MEDIA_OK
    if status == MEDIA_OK and m.wear != NULL:
        status = media_wear_read(m, ppa)
    return status


# --- write --------------------------------------------------------------------------------------------------------

cdef inline int media_check_write(const media_t *m, uint32_t chunk, uint32_t sector, uint32_t n) noexcept nogil:
    """May *n* sectors be written at *sector* of *chunk*? Spec: 2.0 section 2.3 (state machine) and 2.4 (write rules)."""
    cdef const chunk_t *c = &m.chunks[chunk]
    if c.state & (CHUNK_OFFLINE | CHUNK_CLOSED):
        return MEDIA_WRITE_FAULT
    if n == 0 or <uint64_t>sector + n > c.cnlb:
        return MEDIA_WRITE_FAULT
    if c.type == CHUNK_SEQUENTIAL:
        if n % m.geometry.ws_min:
            return MEDIA_INVALID_FIELD
        if sector != c.wp:
            return MEDIA_OUT_OF_ORDER
    if c.state == CHUNK_FREE and not may_open(m, chunk):
        return MEDIA_WRITE_FAULT
    return MEDIA_OK


cdef inline bint media_refresh(media_t *m, uint32_t chunk) noexcept nogil:
    """The device itself rewrites a CLOSED chunk in place: one P/E cycle, and its data is young again.

    Returns 0 when it does not: the setting is off, the cycle would be the chunk's last, or it would not help, because wear
    and not age or reads make the errors. Spec: 2.0, log D0h, bit 4.
    """
    cdef chunk_t *c = &m.chunks[chunk]
    if m.wear == NULL or not m.wear.refresh or c.state != CHUNK_CLOSED or (c.pe_limit and c.pe_cycles + 1 >= c.pe_limit):
        return False
    if wear_error_mean(m.wear, c.pe_cycles + 1, c.pe_limit, 0, 0) > REFRESH_HELPS * media_error_mean(m, c):
        return False
    if m.timing != NULL:
        timing_occupy(m.timing, chunk_pu(m, chunk), timing_rewrite_ns(m.timing, c.wp), 0)
    chunk_set_wear(c, wear_index_after(c))
    c.pe_cycles += 1
    c.reads = 0
    c.programmed_ns = media_age_ns(m)
    m.wear.noted[chunk] = 0
    m.wear.chunks_refreshed += 1
    wear_note(m.wear, chunk, 0, NOTICE_REFRESHED)
    return True


cdef inline int media_program_failed(media_t *m, uint32_t chunk, uint32_t sector) noexcept nogil:
    """An armed write fault after ``good_sectors`` from *sector* on: those are readable, the chunk closes early and its
    next reset fails. Spec: 2.0 status 2F1h.
    """
    cdef chunk_t *c = &m.chunks[chunk]
    m.write_failures += 1
    m.sectors_written += m.good_sectors
    if m.good_sectors:
        chunk_set(c, CHUNK_OPEN, max(sector + m.good_sectors, c.wp))
    cdef bint dies = c.flags & CHUNK_DIES
    c.flags = (c.flags & ~(CHUNK_FAIL_WRITE | CHUNK_DIES)) | CHUNK_FAIL_RESET
    chunk_close_early(m, chunk)
    if dies:
        chunk_go_offline(m, chunk)
    return MEDIA_CHUNK_CLOSED_EARLY


cdef inline int media_program(media_t *m, uint32_t chunk, uint32_t sector, uint32_t n) noexcept nogil:
    """Program *n* sectors whose data and OOB are in place already: check, then move the write pointer.

    The order is data, OOB, write pointer: what lies below the pointer is whole at any instant.
    """
    cdef chunk_t *c = &m.chunks[chunk]
    cdef uint32_t wp
    cdef int status = media_check_write(m, chunk, sector, n)
    m.good_sectors = 0
    if status != MEDIA_OK:
        return status
    if media_troubled(m):
        media_write_trouble(m, chunk, sector, n)
    if m.timing != NULL:
        m.ended_pu = chunk_pu(m, chunk)
        m.ended_ns = timing_program(m.timing, chunk_pu(m, chunk), sector, n, m.ready_ns)
        m.ready_ns = 0
    if c.state == CHUNK_FREE:
        chunk_set(c, CHUNK_OPEN, 0)
        chunk_opened(m, chunk)
    if c.flags & CHUNK_FAIL_WRITE:
        return media_program_failed(m, chunk, sector)
    m.sectors_written += n
    wp = sector + n
    if c.type == CHUNK_RANDOM:
        # The write pointer of a random chunk is not valid; it stays OPEN until it is reset.
        chunk_set(c, CHUNK_OPEN, max(wp, c.wp))
        return MEDIA_OK
    if wp == c.cnlb:
        chunk_not_open(m, chunk)
        chunk_set(c, CHUNK_CLOSED, wp)
    else:
        chunk_set(c, CHUNK_OPEN, wp)
    return MEDIA_OK


cdef inline int media_write(media_t *m, uint64_t ppa, uint32_t n, const char *data, const char *oob) noexcept nogil:
    """Write *n* sectors of one chunk from *ppa* on; *oob* may be NULL (the old OOB stays)."""
    cdef int status
    if not ppa_exists(m, ppa):
        return MEDIA_WRITE_FAULT
    status = media_check_write(m, ppa_chunk(m, ppa), ppa_sector(m, ppa), n)
    if status != MEDIA_OK:
        return status
    status = store_reserve_first(m, ppa_chunk(m, ppa))
    if status != MEDIA_OK:
        return status
    if m.data != NULL:
        memcpy(media_data(m, ppa), data, <size_t>n * m.geometry.sector_bytes)
    if oob != NULL:
        memcpy(media_oob(m, ppa), oob, <size_t>n * m.geometry.oob_bytes)
    status = media_program(m, ppa_chunk(m, ppa), ppa_sector(m, ppa), n)
    media_wait_ended(m)
    return status


# --- read ---------------------------------------------------------------------------------------------------------

cdef inline bint media_readable(const media_t *m, uint64_t ppa) noexcept nogil:
    """Does *ppa* hold data that the host may read back? Spec: 2.0 section 2.4, mw_cunits."""
    cdef const chunk_t *c
    cdef uint32_t sector = ppa_sector(m, ppa)
    if not ppa_exists(m, ppa):
        return False
    c = &m.chunks[ppa_chunk(m, ppa)]
    if c.state == CHUNK_CLOSED:
        return sector < c.wp
    if c.state != CHUNK_OPEN:
        return False
    if c.type == CHUNK_RANDOM:
        return sector < c.wp
    return c.wp >= m.geometry.mw_cunits and sector < c.wp - m.geometry.mw_cunits


cdef inline uint64_t media_sense(media_t *m, uint64_t ppa, uint64_t ready_ns, bint background) noexcept nogil:
    """Time of reading one sector; call it only with a timing. Returns when the sector is in the controller."""
    cdef uint32_t chunk = ppa_chunk(m, ppa)
    cdef uint64_t extra_ns = m.extra_ns
    m.extra_ns = 0
    return timing_sense(m.timing, chunk_pu(m, chunk), chunk, ppa_sector(m, ppa), ready_ns, extra_ns, background)


cdef inline int media_read(media_t *m, uint64_t ppa, char *data, char *oob) noexcept nogil:
    """Copy one sector (*data* and *oob* may be NULL). Buffers are filled with MEDIA_OK and MEDIA_HIGH_ECC only, which
    stands for very high effort too.
    """
    cdef int status = MEDIA_OK
    if not media_readable(m, ppa):
        return MEDIA_UNWRITTEN
    if media_troubled(m):
        status = media_read_trouble(m, ppa)
        if status == MEDIA_UNRECOVERED:
            return status
    if data != NULL and m.data != NULL:
        memcpy(data, media_data(m, ppa), m.geometry.sector_bytes)
    if oob != NULL:
        memcpy(oob, media_oob(m, ppa), m.geometry.oob_bytes)
    if not media_troubled(m):
        m.chunks[ppa_chunk(m, ppa)].reads += 1
    m.sectors_read += 1
    if m.timing != NULL:
        timing_wait(m.timing, media_sense(m, ppa, 0, False))
    return MEDIA_HIGH_ECC if status == MEDIA_VERY_HIGH_ECC else status


# --- reset and copy -----------------------------------------------------------------------------------------------

cdef inline int media_check_reset(const media_t *m, uint32_t chunk) noexcept nogil:
    cdef uint8_t state = m.chunks[chunk].state
    if state == CHUNK_OFFLINE:
        return MEDIA_OFFLINE
    if state == CHUNK_FREE and not m.flags & MEDIA_MULTI_RESET:
        return MEDIA_INVALID_RESET
    if state == CHUNK_OPEN and not m.flags & MEDIA_EARLY_RESET:
        return MEDIA_INVALID_RESET
    return MEDIA_OK


cdef inline int media_erase(media_t *m, uint32_t chunk) noexcept nogil:
    """Erase *chunk*: FREE, write pointer 0, one P/E cycle more. A worn-out or failing chunk goes OFFLINE instead."""
    cdef chunk_t *c
    cdef int status
    if chunk >= m.geometry.total_chunks:
        return MEDIA_INVALID_RESET
    status = media_check_reset(m, chunk)
    if status != MEDIA_OK:
        return status
    c = &m.chunks[chunk]
    if media_troubled(m):
        media_erase_trouble(m, chunk)
    if m.timing != NULL:
        m.ended_pu = chunk_pu(m, chunk)
        m.ended_ns = timing_erase(m.timing, chunk_pu(m, chunk), m.ready_ns)
        m.ready_ns = 0
    c.wear_index = wear_index_after(c)
    c.pe_cycles += 1
    if c.flags & CHUNK_FAIL_RESET or (c.pe_limit and c.pe_cycles >= c.pe_limit):
        m.reset_failures += 1
        chunk_go_offline(m, chunk)
        return MEDIA_INVALID_RESET
    if c.state == CHUNK_OPEN:
        chunk_not_open(m, chunk)
    c.reads = 0
    m.chunks_reset += 1
    chunk_set(c, CHUNK_FREE, 0)
    return MEDIA_OK


cdef inline int media_reset(media_t *m, uint32_t chunk) noexcept nogil:
    """``media_erase`` as a command that lasts as long as the erase."""
    cdef int status = media_erase(m, chunk)
    if status == MEDIA_OK:
        media_wait_ended(m)
    return status


cdef inline int media_copy(media_t *m, const uint64_t *source, uint64_t target, uint32_t n) noexcept nogil:
    """Copy *n* sectors (data and OOB) from anywhere to consecutive sectors of one chunk. Spec: 2.0 vector copy."""
    cdef uint32_t i
    cdef int status
    for i in range(n):
        if not media_readable(m, source[i]):
            return MEDIA_UNWRITTEN
        if media_troubled(m) and media_read_trouble(m, source[i]) == MEDIA_UNRECOVERED:
            return MEDIA_UNRECOVERED
    if not ppa_exists(m, target):
        return MEDIA_WRITE_FAULT
    status = media_check_write(m, ppa_chunk(m, target), ppa_sector(m, target), n)
    if status == MEDIA_OK:
        status = store_reserve_first(m, ppa_chunk(m, target))
    if status != MEDIA_OK:
        return status
    for i in range(n):
        if m.data != NULL:
            memcpy(media_data(m, target + i), media_data(m, source[i]), m.geometry.sector_bytes)
        memcpy(media_oob(m, target + i), media_oob(m, source[i]), m.geometry.oob_bytes)
        if m.timing != NULL:
            m.ready_ns = max(m.ready_ns, media_sense(m, source[i], 0, False))
    m.sectors_read += n
    status = media_program(m, ppa_chunk(m, target), ppa_sector(m, target), n)
    media_wait_ended(m)
    return status
