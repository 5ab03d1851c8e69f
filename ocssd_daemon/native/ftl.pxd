# cython: cdivision=True
"""Owns the map: which flash sector holds which logical sector, and where the next one goes.

What the kernel's pblk does, as one synchronous machine: a page-mapped L2P, lines over all PUs of the target, writes
striped over the PUs in ws_opt units, out-of-band entries from which the map can be rebuilt. Garbage collection and
wear levelling live in ``gc.pxd``, start and recovery in ``recovery.pxd``.

The write buffer is the open unit itself: a sector is copied once, to the place where it will be programmed, and is served
from there; the unit is programmed when ws_opt sectors are in it, or when a flush pads it to a multiple of ws_min. With an
image file the buffer therefore outlives the process.

Order of one sector write, which makes a kill at any instruction harmless: data, out-of-band entry, L2P entry, and later the
write pointer. The L2P lies in the image too; after a kill its *unmapped* entries are what remembers trims.

Units: sectors of ``geometry.sector_bytes``; *lba* counts logical sectors, *ppa* is media.pxd's address in 32 bits.
The FTL knows no transport and no bytes below a sector.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ocssd_daemon.native.sys cimport copies_end, copy_past_cache, prefetch, store_release_u64
from ocssd_daemon.native.media cimport (
    CHUNK_FREE, CHUNK_OFFLINE, MEDIA_OK,
    MEDIA_UNRECOVERED,
    media_data, media_oob, media_program, media_read_trouble, media_sense, media_t, media_troubled, ppa_chunk, ppa_of,
    ppa_sector, store_reserve,
)
from ocssd_daemon.native.timing cimport (
    timing_admit, timing_hold, timing_revised, timing_t, timing_told, timing_wait, wait_t,
)

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    /* Out-of-band entry of one sector, as it lies on the flash. */
    typedef struct { uint64_t seq; uint32_t lba; uint32_t check; } ocssd_oob;
    _Static_assert(sizeof(ocssd_oob) == 16, "out-of-band entry");

    static inline uint32_t ocssd_oob_mix(uint64_t seq, uint32_t lba, uint32_t ppa) {
        uint64_t h = (seq ^ 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
        h = (h ^ (h >> 29) ^ (((uint64_t)ppa << 32) | lba)) * 0x94d049bb133111ebull;
        return (uint32_t)(h >> 32) ^ (uint32_t)h;
    }
    /* Four independent multiply lanes: 4 KiB in about 0.2 us, no table, the same on every machine. */
    static inline uint32_t ocssd_data_hash(const void *data, size_t n) {
        uint64_t lane[4] = { 1, 2, 3, 4 }, word[4];
        for (const char *p = data, *end = p + n; p < end; p += 32) {
            __builtin_memcpy(word, p, 32);
            for (int i = 0; i < 4; i++) lane[i] = (lane[i] ^ word[i]) * 0x9ddfea08eb382d69ull, lane[i] ^= lane[i] >> 31;
        }
        uint64_t h = lane[0] ^ (lane[1] * 3) ^ (lane[2] * 5) ^ (lane[3] * 7);
        return (uint32_t)(h >> 32) ^ (uint32_t)h;
    }
    static inline int ocssd_ctz(uint64_t v) { return __builtin_ctzll(v); }
    """
    ctypedef struct oob_t "ocssd_oob":
        uint64_t seq            # order of writing, from 1; OOB_HASHED in bit 63, OOB_LOST in bit 62
        uint32_t lba
        uint32_t check
    uint32_t oob_mix "ocssd_oob_mix" (uint64_t seq, uint32_t lba, uint32_t ppa) noexcept nogil
    uint32_t data_hash "ocssd_data_hash" (const void *data, size_t n) noexcept nogil
    const uint64_t OOB_HASHED "(1ull << 63)"       # the check covers the data
    const uint64_t OOB_LOST "(1ull << 62)"         # what GC moved here it could not read: the sector stays unreadable
    const uint64_t OOB_FLAGS "(3ull << 62)"
    int ctz64 "ocssd_ctz" (uint64_t v) noexcept nogil

cdef enum:
    NO_PPA = 0xffffffff         # unmapped; also: no place to write
    NO_LINE = 0xffffffff
    MOVE_TRIES = 3              # reads of a sector that GC moves
    LBA_PAD = 0xffffffff        # out-of-band lba of padding

cdef enum:                      # line states
    LINE_FREE = 0
    LINE_OPEN = 1
    LINE_CLOSED = 2
    LINE_PENDING = 3            # collected; erased after the next host sync (durability host)
    LINE_DEAD = 4               # no good chunk left

cdef enum:                      # line_failed
    LINE_LOST_A_CHUNK = 1
    LINE_TO_REFRESH = 2         # its data is hard to read: move it while that can be done

cdef enum:                      # victim policies
    VICTIM_GREEDY = 0
    VICTIM_COST_BENEFIT = 1
    VICTIM_D_CHOICES = 2
    VICTIM_FIFO = 3
    VICTIM_RANDOM = 4


ctypedef struct frontier_t:
    uint32_t line
    uint32_t *chunks            # good chunks of the line, in striping order
    uint32_t n_chunks
    uint32_t turn               # index into chunks
    uint32_t row                # first sector of the current unit in its chunk
    uint32_t ppa                # of that sector
    uint32_t fill               # sectors placed in the unit
    uint32_t programmed         # of these, programmed
    uint32_t held               # of the others, user sectors that the write buffer holds
    uint64_t ready_ns           # when the last of them has arrived

ctypedef struct ftl_t:
    media_t *media
    uint32_t capacity_sectors   # logical sectors offered
    uint32_t n_pus
    uint32_t *pus               # [n_pus] the PUs of this target
    uint32_t n_lines
    uint32_t unit               # ws_opt
    uint32_t words              # 64-bit words of the valid bitmap per chunk
    uint32_t *l2p               # [capacity_sectors] ppa + 1; 0: unmapped, so that fresh memory is an empty map
    uint64_t *valid             # [total_chunks][words]
    uint32_t *line_valid        # [n_lines] valid sectors
    uint8_t *line_state         # [n_lines]
    uint8_t *line_failed        # [n_lines] collect first: LINE_LOST_A_CHUNK or LINE_TO_REFRESH
    uint32_t refresh_lines      # closed lines to refresh
    uint32_t *line_erases       # [n_lines] mean P/E cycles of its chunks
    uint64_t *line_closed_seq   # [n_lines] age
    uint64_t *line_settled_at   # [n_lines] user_sectors_written from which on greedy may take it; 0: at any time
    uint32_t free_lines
    uint32_t pending_lines
    uint32_t retiring           # chunks that go offline when their line is collected
    uint32_t short_lines        # lines with at least one OFFLINE chunk
    uint64_t usable_sectors     # in chunks that are not OFFLINE
    frontier_t user
    frontier_t gc
    frontier_t *moved           # &gc, or &user with one frontier
    uint64_t seq
    uint32_t reserve_lines
    uint8_t host_durable        # durability host: out-of-band entries cover the data, erases wait for a host sync
    uint8_t retire              # take chunks that lost data out of use
    uint8_t read_only           # spare space has ended
    int notify_fd               # eventfd to signal when that happens; -1: none
    uint8_t policy
    uint32_t d_choices
    uint32_t wear_spread        # P/E difference that starts static wear levelling; 0: never
    double settle               # share of the spare space that is written before greedy takes a line of the user's
    uint64_t settle_sectors     # that many sectors; 0: takes any
    uint64_t rng
    # garbage collection in progress
    uint32_t victim
    uint32_t cursor             # word index: row of 64 sectors, then PU
    uint32_t rate_moved         # move this many sectors ...
    uint32_t rate_user          # ... per this many user sectors
    uint32_t credit             # sectors owed to GC, times rate_user
    uint32_t victims_since_levelling
    # counters (sectors unless named)
    uint64_t mapped_sectors
    uint64_t user_sectors_written
    uint64_t user_sectors_read
    uint64_t user_sectors_trimmed
    uint64_t gc_sectors_moved
    uint64_t wear_sectors_moved
    uint64_t padded_sectors
    uint64_t gc_runs
    uint64_t wear_runs
    uint32_t unpaced            # user sectors written since GC was paid
    bint pays_later             # the caller pays when it has answered (ftl_pay), so that nobody waits for GC
    uint64_t stalls             # writes that had to wait for a whole line to be collected
    uint64_t chunks_failed
    uint64_t chunks_erased
    uint64_t chunks_retired
    uint64_t lines_refreshed
    uint64_t read_failures
    uint64_t lost_sectors       # that GC could not read; 0: no read need look for their mark
    uint64_t flushes
    uint64_t recovered_sectors


# --- L2P and valid bitmap -------------------------------------------------------------------------------------------------

cdef inline uint32_t l2p_get(const ftl_t *f, uint32_t lba) noexcept nogil:
    """The ppa of *lba*, or NO_PPA."""
    return f.l2p[lba] - 1


cdef inline void l2p_set(ftl_t *f, uint32_t lba, uint32_t ppa) noexcept nogil:
    f.l2p[lba] = ppa + 1


cdef inline uint64_t *valid_word(const ftl_t *f, uint32_t ppa) noexcept nogil:
    return &f.valid[<uint64_t>ppa_chunk(f.media, ppa) * f.words + (ppa_sector(f.media, ppa) >> 6)]


cdef inline bint is_valid(const ftl_t *f, uint32_t ppa) noexcept nogil:
    return (valid_word(f, ppa)[0] >> (ppa_sector(f.media, ppa) & 63)) & 1


cdef inline uint32_t line_of(const ftl_t *f, uint32_t ppa) noexcept nogil:
    return ppa_chunk(f.media, ppa) % f.media.geometry.chunks


cdef inline void set_valid(ftl_t *f, uint32_t ppa) noexcept nogil:
    valid_word(f, ppa)[0] |= 1ull << (ppa_sector(f.media, ppa) & 63)


cdef inline void invalidate(ftl_t *f, uint32_t ppa) noexcept nogil:
    valid_word(f, ppa)[0] &= ~(1ull << (ppa_sector(f.media, ppa) & 63))
    f.line_valid[line_of(f, ppa)] -= 1


# --- lines and frontiers ------------------------------------------------------------------------------------------

cdef inline uint32_t line_chunk(const ftl_t *f, uint32_t line, uint32_t pu) noexcept nogil:
    """Chunk of *line* on the target's PU number *pu*."""
    return f.pus[pu] * f.media.geometry.chunks + line


cdef inline uint32_t least_worn_line(const ftl_t *f, bint most) noexcept nogil:
    """A FREE line: the least worn, or the most worn (*most*: for data that GC found to be cold)."""
    cdef uint32_t line, best = NO_LINE
    for line in range(f.n_lines):
        if f.line_state[line] != LINE_FREE:
            continue
        if best == NO_LINE or (f.line_erases[line] > f.line_erases[best] if most
                               else f.line_erases[line] < f.line_erases[best]):
            best = line
    return best


cdef inline void frontier_at(ftl_t *f, frontier_t *w) noexcept nogil:
    w.ppa = <uint32_t>ppa_of(f.media, w.chunks[w.turn], w.row)
    w.fill = w.programmed = 0


cdef inline bint frontier_open(ftl_t *f, frontier_t *w) noexcept nogil:
    """Take a FREE line for *w*. Returns 0 when there is none, or no room for it on the host's disk."""
    cdef uint32_t line = least_worn_line(f, w == &f.gc)
    cdef uint32_t pu, chunk
    if line == NO_LINE:
        return False
    w.n_chunks = 0
    for pu in range(f.n_pus):
        chunk = line_chunk(f, line, pu)
        if f.media.chunks[chunk].state == CHUNK_FREE and store_reserve(f.media, chunk) == MEDIA_OK:
            w.chunks[w.n_chunks] = chunk
            w.n_chunks += 1
    if w.n_chunks == 0:
        return False
    f.line_state[line] = LINE_OPEN
    f.free_lines -= 1
    w.line = line
    w.turn = w.row = 0
    frontier_at(f, w)
    return True


cdef inline void frontier_close(ftl_t *f, frontier_t *w) noexcept nogil:
    f.line_state[w.line] = LINE_CLOSED
    f.line_closed_seq[w.line] = f.seq
    # What GC moved has proved to be cold already; with one frontier nobody can tell.
    f.line_settled_at[w.line] = f.user_sectors_written + f.settle_sectors if w != f.moved else 0
    w.line = NO_LINE
    w.fill = w.programmed = 0


cdef inline void frontier_place(ftl_t *f, frontier_t *w) noexcept nogil:
    """Stand on the unit at (turn, row), wrapping to the next row and closing the line at its end."""
    if w.turn >= w.n_chunks:
        w.turn = 0
        w.row += f.unit
    if w.n_chunks == 0 or w.row >= f.media.geometry.sectors:
        frontier_close(f, w)
    else:
        frontier_at(f, w)


cdef inline void frontier_advance(ftl_t *f, frontier_t *w) noexcept nogil:
    w.turn += 1
    frontier_place(f, w)


cdef inline void frontier_drop_chunk(ftl_t *f, frontier_t *w) noexcept nogil:
    """Take the current chunk, which has failed, out of the stripe; its line is to be collected first."""
    cdef uint32_t i
    f.line_failed[w.line] = LINE_LOST_A_CHUNK
    f.chunks_failed += 1
    w.n_chunks -= 1
    for i in range(w.turn, w.n_chunks):
        w.chunks[i] = w.chunks[i + 1]
    frontier_place(f, w)


cdef inline void unit_failed(ftl_t *f, frontier_t *w) noexcept nogil:
    """A program failed: place the unit's sectors again, elsewhere. They stay readable in the buffer until then."""
    cdef uint32_t first = w.ppa + w.programmed
    cdef uint32_t n = w.fill - w.programmed
    cdef uint32_t i
    frontier_drop_chunk(f, w)
    for i in range(n):
        if is_valid(f, first + i):
            move_sector(f, w, first + i, False)
    copies_end()


cdef inline void unit_timed(ftl_t *f, frontier_t *w) noexcept nogil:
    """The unit's place in the write buffer is free when its program has ended."""
    cdef timing_t *t = f.media.timing
    cdef wait_t program = timing_told(t, f.media.ended_pu, f.media.ended_ns)
    timing_hold(t, &program, w.held)
    w.held = 0
    w.ready_ns = 0
    if w == &f.user and program.end_ns >= timing_revised(t, &t.flushed):
        t.flushed = program
    if w == f.moved:
        f.media.timing.moved_ns = max(f.media.timing.moved_ns, f.media.ended_ns)


cdef inline bint unit_program(ftl_t *f, frontier_t *w) noexcept nogil:
    """Program what is in the unit. On a failure the sectors have moved on and *w* stands somewhere else."""
    cdef uint32_t n = w.fill - w.programmed
    f.media.ready_ns = w.ready_ns
    if media_program(f.media, w.chunks[w.turn], w.row + w.programmed, n) != MEDIA_OK:
        unit_failed(f, w)
        return False
    if f.media.timing != NULL:
        unit_timed(f, w)
    w.programmed = w.fill
    if w.fill == f.unit:
        frontier_advance(f, w)
    return True


# --- one sector ---------------------------------------------------------------------------------------------------

cdef inline void write_oob(ftl_t *f, uint32_t ppa, uint32_t lba, uint64_t seq, uint32_t hashed) noexcept nogil:
    # seq goes last, and is 0 meanwhile: a kill in between leaves no entry rather than half of one.
    cdef oob_t *oob = <oob_t *>media_oob(f.media, ppa)
    store_release_u64(&oob.seq, 0)
    oob.lba = lba
    oob.check = oob_mix(seq, lba, ppa) ^ hashed
    store_release_u64(&oob.seq, seq)


cdef inline uint64_t next_seq(ftl_t *f) noexcept nogil:
    f.seq += 1
    return f.seq | (OOB_HASHED if f.host_durable else 0)


cdef inline void place(ftl_t *f, frontier_t *w, uint32_t lba, uint32_t old) noexcept nogil:
    """The sector at the frontier now holds *lba*, until now at *old*: point the map at it; program a full unit."""
    cdef uint32_t ppa = w.ppa + w.fill
    if old != <uint32_t>NO_PPA:
        invalidate(f, old)
    else:
        f.mapped_sectors += 1
    l2p_set(f, lba, ppa)
    set_valid(f, ppa)
    f.line_valid[w.line] += 1
    w.fill += 1
    if w.fill == f.unit:
        unit_program(f, w)


cdef inline bint may_be_lost(const ftl_t *f) noexcept nogil:
    """Can any read fail?"""
    return media_troubled(f.media) or f.lost_sectors != 0


cdef inline bint frontier_ready(ftl_t *f, frontier_t *w) noexcept nogil:
    return w.line != <uint32_t>NO_LINE or frontier_open(f, w)


cdef inline uint32_t owner_from_map(const ftl_t *f, uint32_t ppa) noexcept nogil:
    """The logical sector that the map keeps at *ppa*, or LBA_PAD. For an entry that is wrong: a full scan."""
    cdef uint32_t lba
    for lba in range(f.capacity_sectors):
        if l2p_get(f, lba) == ppa:
            return lba
    return LBA_PAD


cdef inline void move_ahead(const ftl_t *f, uint32_t base, uint64_t *rest) noexcept nogil:
    """Take the lowest of the sectors *rest*, which are moved soon: its first bytes and its map entry come meanwhile."""
    # Hardware looks no further than a page, and the map entry is anywhere.
    cdef uint32_t ppa
    if rest[0] == 0:
        return
    ppa = base + ctz64(rest[0])
    prefetch(media_data(f.media, ppa))
    prefetch(&f.l2p[(<const oob_t *>media_oob(f.media, ppa)).lba])
    rest[0] &= rest[0] - 1


cdef inline uint64_t lost_mark(ftl_t *f, uint32_t ppa) noexcept nogil:
    """Read *ppa* to move it. OOB_LOST when that cannot be done, now or when it was moved before; else 0."""
    cdef uint32_t _
    if f.lost_sectors and (<const oob_t *>media_oob(f.media, ppa)).seq & OOB_LOST:
        return OOB_LOST
    for _ in range(MOVE_TRIES):
        if media_read_trouble(f.media, ppa) != MEDIA_UNRECOVERED:
            return 0
        f.read_failures += 1
    if f.media.chunks[ppa_chunk(f.media, ppa)].state == CHUNK_OFFLINE:
        f.line_failed[line_of(f, ppa)] = LINE_LOST_A_CHUNK
    f.lost_sectors += 1
    return OOB_LOST


cdef inline bint move_sector(ftl_t *f, frontier_t *w, uint32_t ppa, bint from_flash) noexcept nogil:
    """Copy a valid sector to the frontier *w*. Returns 0 when no line is free; the sector then stays where it is.

    What cannot be read is moved too, marked as lost, so that its reads go on failing. *from_flash* false: it is in the
    write buffer still.
    """
    cdef oob_t *oob = <oob_t *>media_oob(f.media, ppa)
    cdef uint32_t lba = oob.lba
    cdef uint32_t hashed = 0
    cdef uint64_t mark = 0
    cdef uint32_t target
    cdef uint64_t seq
    cdef bint wrong
    if not frontier_ready(f, w):
        return False
    # A checkpoint is loaded without reading the entries. One that is wrong must not take another sector's place.
    wrong = lba >= f.capacity_sectors or l2p_get(f, lba) != ppa
    if wrong:
        lba = owner_from_map(f, ppa)
        if lba == <uint32_t>LBA_PAD:
            invalidate(f, ppa)
            return True
    target = w.ppa + w.fill
    if f.media.data != NULL:
        copy_past_cache(media_data(f.media, target), media_data(f.media, ppa), f.media.geometry.sector_bytes)
    if may_be_lost(f):
        mark = lost_mark(f, ppa) if from_flash else oob.seq & OOB_LOST
    if f.media.timing != NULL and from_flash:
        w.ready_ns = max(w.ready_ns, media_sense(f.media, ppa, f.media.timing.admitted_ns, True))
    seq = next_seq(f) | mark
    if f.host_durable:
        # Carried over, not computed again: damage to the data stays visible.
        hashed = (oob.check ^ oob_mix(oob.seq, lba, ppa)) if oob.seq & OOB_HASHED and not wrong else data_hash(
            media_data(f.media, ppa), f.media.geometry.sector_bytes)
    write_oob(f, target, lba, seq, hashed)
    place(f, w, lba, ppa)
    return True


cdef inline void commit_user(ftl_t *f, uint32_t lba) noexcept nogil:
    """The user's data is in place at the user frontier: make it *lba*."""
    cdef uint32_t ppa = f.user.ppa + f.user.fill
    cdef uint32_t hashed = data_hash(media_data(f.media, ppa), f.media.geometry.sector_bytes) if f.host_durable else 0
    write_oob(f, ppa, lba, next_seq(f), hashed)
    f.user_sectors_written += 1
    if f.media.timing != NULL:
        f.user.ready_ns = timing_admit(f.media.timing)
        f.user.held += 1
    place(f, &f.user, lba, l2p_get(f, lba))


cdef inline const char *ftl_lookup(const ftl_t *f, uint32_t lba) noexcept nogil:
    """Where *lba* lies, in flash or write buffer; NULL when nothing is mapped."""
    cdef uint32_t ppa = l2p_get(f, lba)
    return NULL if ppa == <uint32_t>NO_PPA else media_data(f.media, ppa)


cdef inline bint in_unit(const frontier_t *w, uint32_t ppa) noexcept nogil:
    return w.line != <uint32_t>NO_LINE and w.ppa <= ppa < w.ppa + w.fill


cdef inline bint in_buffer(const ftl_t *f, uint32_t ppa) noexcept nogil:
    return in_unit(&f.user, ppa) or in_unit(&f.gc, ppa)


cdef inline bint ftl_unreadable(ftl_t *f, uint32_t lba) noexcept nogil:
    """Does the read of *lba* fail? Call it only when ``may_be_lost``."""
    cdef uint32_t ppa = l2p_get(f, lba)
    if ppa == <uint32_t>NO_PPA:
        return False
    if not (f.lost_sectors and (<const oob_t *>media_oob(f.media, ppa)).seq & OOB_LOST):
        if in_buffer(f, ppa) or media_read_trouble(f.media, ppa) != MEDIA_UNRECOVERED:
            return False
    f.read_failures += 1
    return True


cdef inline void ftl_sense(ftl_t *f, uint32_t lba) noexcept nogil:
    """Time of reading *lba*: none when it is unmapped, the buffer's while its unit is open. Call it only with a timing."""
    cdef uint32_t ppa = l2p_get(f, lba)
    cdef timing_t *t = f.media.timing
    if ppa == <uint32_t>NO_PPA:
        return
    if in_buffer(f, ppa):
        timing_wait(t, t.now_ns + t.controller_ns + t.buffer_ns)
    else:
        timing_wait(t, media_sense(f.media, ppa, 0, False))


cdef inline void ftl_trim(ftl_t *f, uint32_t lba, uint32_t n) noexcept nogil:
    cdef uint32_t i, ppa
    for i in range(lba, lba + n):
        ppa = l2p_get(f, i)
        if ppa != <uint32_t>NO_PPA:
            # Map first: after a kill in between, the unmapped entry decides.
            l2p_set(f, i, NO_PPA)
            invalidate(f, ppa)
            f.mapped_sectors -= 1
            f.user_sectors_trimmed += 1


cdef inline void frontier_flush(ftl_t *f, frontier_t *w) noexcept nogil:
    """Pad the open unit to a multiple of ws_min and program it. Spec: OCSSD 2.0, WS_MIN."""
    while w.line != <uint32_t>NO_LINE and w.fill > w.programmed:
        while w.fill % f.media.geometry.ws_min:
            write_oob(f, w.ppa + w.fill, LBA_PAD, next_seq(f), 0)
            w.fill += 1
            f.padded_sectors += 1
        unit_program(f, w)


cdef inline void ftl_program_buffers(ftl_t *f) noexcept nogil:
    """Bring everything that is in the write buffers to flash."""
    f.flushes += 1
    frontier_flush(f, &f.user)
    if f.moved != &f.user:
        frontier_flush(f, f.moved)
