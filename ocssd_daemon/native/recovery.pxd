# cython: cdivision=True
"""Owns the way back: rebuilding the FTL's memory from what lies on the flash.

After a clean stop the L2P in the image is the checkpoint and only counters and bitmaps are derived from it. Otherwise the
map is rebuilt from the out-of-band entries: for each logical sector the entry with the highest sequence number wins. That
holds even for entries on erased chunks, because whatever replaced such a sector has a higher number still. Trims leave no
entry; they are remembered by the *unmapped* entries of the L2P in the image.

Nothing in the image is changed before the new map is complete, so recovery itself may be killed.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from ocssd_daemon.native.ftl cimport (
    LBA_PAD, LINE_CLOSED, LINE_DEAD, LINE_FREE, LINE_OPEN, NO_LINE, NO_PPA, OOB_FLAGS, OOB_HASHED, OOB_LOST,
    data_hash, frontier_t, ftl_t, is_valid, l2p_get, line_chunk, line_of, next_seq, oob_mix, oob_t, set_valid,
    unit_program, write_oob,
)
from ocssd_daemon.native.gc cimport recount_spare
from ocssd_daemon.native.media cimport (
    CHUNK_CLOSED, CHUNK_FREE, CHUNK_OFFLINE, CHUNK_OPEN, CHUNK_RETIRED,
    chunk_close_early, chunk_pu, chunk_t, media_data, media_oob, ppa_chunk, ppa_exists, ppa_of,
)

cdef enum:
    RECOVERY_OK = 0
    RECOVERY_NO_MEMORY = 1
    RECOVERY_BAD_MAP = 2        # the checkpoint points outside the flash, or twice at one sector


cdef inline void line_from_chunks(ftl_t *f, uint32_t line) noexcept nogil:
    """Derive a line's state, wear and age from its chunks."""
    cdef uint32_t pu, good = 0, used = 0
    cdef uint64_t cycles = 0
    cdef const chunk_t *c
    f.line_closed_seq[line] = 0
    for pu in range(f.n_pus):
        c = &f.media.chunks[line_chunk(f, line, pu)]
        cycles += c.pe_cycles
        good += c.state != CHUNK_OFFLINE
        f.retiring += c.state != CHUNK_OFFLINE and (c.flags & CHUNK_RETIRED) != 0
        if not c.state & (CHUNK_FREE | CHUNK_OFFLINE):
            used += 1
            if c.wp:
                f.line_closed_seq[line] = max(f.line_closed_seq[line], seq_at(f, line_chunk(f, line, pu), c.wp - 1))
    f.line_erases[line] = <uint32_t>(cycles // f.n_pus)
    f.line_state[line] = LINE_CLOSED if used or f.line_valid[line] else LINE_FREE if good else LINE_DEAD


cdef inline uint64_t seq_at(const ftl_t *f, uint32_t chunk, uint32_t sector) noexcept nogil:
    return (<const oob_t *>media_oob(f.media, ppa_of(f.media, chunk, sector))).seq & ~OOB_FLAGS


cdef inline bint chunk_takes_part(const ftl_t *f, uint32_t chunk) noexcept nogil:
    """Is *chunk* in the stripe of an open line: still to be written, or written to its end?"""
    cdef const chunk_t *c = &f.media.chunks[chunk]
    return c.state & (CHUNK_FREE | CHUNK_OPEN) or (c.state == CHUNK_CLOSED and c.wp == f.media.geometry.sectors)


cdef inline bint stand_on_line(ftl_t *f, frontier_t *w, uint32_t line) noexcept nogil:
    """Put *w* where *line* was being written: the first unit of the stripe that is not full. 0: it cannot go on there."""
    cdef uint32_t pu, i, wp, lowest = f.media.geometry.sectors
    w.n_chunks = 0
    for pu in range(f.n_pus):
        if chunk_takes_part(f, line_chunk(f, line, pu)):
            w.chunks[w.n_chunks] = line_chunk(f, line, pu)
            w.n_chunks += 1
            lowest = min(lowest, f.media.chunks[line_chunk(f, line, pu)].wp)
    w.row = lowest // f.unit * f.unit
    if w.row >= f.media.geometry.sectors:
        return False
    w.turn = 0
    while f.media.chunks[w.chunks[w.turn]].wp >= w.row + f.unit:
        w.turn += 1
    for i in range(w.turn + 1, w.n_chunks):
        wp = f.media.chunks[w.chunks[i]].wp
        if wp != w.row:
            return False
    return True


cdef inline void restore_unit(ftl_t *f, frontier_t *w) noexcept nogil:
    """Take up what is in the open unit: programmed sectors, and live ones that were still in the write buffer."""
    cdef uint32_t i
    w.ppa = <uint32_t>ppa_of(f.media, w.chunks[w.turn], w.row)
    w.fill = w.programmed = f.media.chunks[w.chunks[w.turn]].wp - w.row
    for i in range(w.programmed, f.unit):
        if is_valid(f, w.ppa + i):
            w.fill = i + 1
            f.recovered_sectors += 1
    for i in range(w.programmed, w.fill):
        if not is_valid(f, w.ppa + i):
            write_oob(f, w.ppa + i, LBA_PAD, next_seq(f), 0)


cdef inline bint line_is_resumable(const ftl_t *f, uint32_t line) noexcept nogil:
    """Was *line* being written? A FREE chunk beside full ones may also be an erase that was cut short: nothing is valid then."""
    cdef uint32_t pu, to_write = 0
    if f.line_state[line] != LINE_CLOSED or f.line_valid[line] == 0:
        return False
    for pu in range(f.n_pus):
        to_write += (f.media.chunks[line_chunk(f, line, pu)].state & (CHUNK_FREE | CHUNK_OPEN)) != 0
    return to_write > 0


cdef inline void close_line_early(ftl_t *f, uint32_t line) noexcept nogil:
    cdef uint32_t pu
    for pu in range(f.n_pus):
        if f.media.chunks[line_chunk(f, line, pu)].state == CHUNK_OPEN:
            chunk_close_early(f.media, line_chunk(f, line, pu))


cdef inline void resume_line(ftl_t *f, uint32_t line) noexcept nogil:
    """Go on with a line that was open; a crash must not cost the lines that GC needs to work."""
    cdef frontier_t *w = &f.user if f.user.line == <uint32_t>NO_LINE else &f.gc
    if w.line != <uint32_t>NO_LINE or (w == &f.gc and f.moved == &f.user) or not stand_on_line(f, w, line):
        close_line_early(f, line)
        return
    w.line = line
    f.line_state[line] = LINE_OPEN
    restore_unit(f, w)
    if w.fill == f.unit:
        unit_program(f, w)


cdef inline void lines_from_chunks(ftl_t *f) noexcept nogil:
    cdef uint32_t line
    f.free_lines = f.retiring = 0
    for line in range(f.n_lines):
        line_from_chunks(f, line)
        f.free_lines += f.line_state[line] == LINE_FREE
    for line in range(f.n_lines):
        if line_is_resumable(f, line):
            resume_line(f, line)
        elif f.line_state[line] == LINE_CLOSED:
            close_line_early(f, line)
    recount_spare(f)


cdef inline bint belongs(const ftl_t *f, uint32_t ppa) noexcept nogil:
    cdef uint32_t i
    if not ppa_exists(f.media, ppa):
        return False
    if f.n_pus == f.media.geometry.total_pus:
        return True
    for i in range(f.n_pus):
        if f.pus[i] == chunk_pu(f.media, ppa_chunk(f.media, ppa)):
            return True
    return False


cdef inline int ftl_load_map(ftl_t *f) noexcept nogil:
    """Derive everything else from the L2P. Returns RECOVERY_OK or RECOVERY_BAD_MAP."""
    cdef uint32_t lba, ppa
    f.mapped_sectors = 0
    for lba in range(f.capacity_sectors):
        ppa = l2p_get(f, lba)
        if ppa == <uint32_t>NO_PPA:
            continue
        if not belongs(f, ppa) or is_valid(f, ppa):
            return RECOVERY_BAD_MAP
        set_valid(f, ppa)
        f.line_valid[line_of(f, ppa)] += 1
        f.mapped_sectors += 1
    lines_from_chunks(f)
    return RECOVERY_OK


cdef inline bint entry_is_good(const ftl_t *f, const oob_t *oob, uint32_t ppa, bint verify_data) noexcept nogil:
    cdef uint32_t check = oob_mix(oob.seq, oob.lba, ppa)
    if (oob.seq & ~OOB_FLAGS) == 0 or oob.lba >= f.capacity_sectors:
        return False
    if not oob.seq & OOB_HASHED:
        return oob.check == check
    return not verify_data or oob.check == check ^ data_hash(
        media_data(f.media, ppa), f.media.geometry.sector_bytes)


cdef inline void scan_chunk(ftl_t *f, uint32_t chunk, uint32_t *found, bint verify_data) noexcept nogil:
    """Let every good out-of-band entry of *chunk* compete for its logical sector; found[] holds ppa + 1."""
    cdef uint32_t sector, ppa
    cdef uint64_t seq, other
    cdef const oob_t *oob
    for sector in range(f.media.geometry.sectors):
        ppa = <uint32_t>ppa_of(f.media, chunk, sector)
        oob = <const oob_t *>media_oob(f.media, ppa)
        if not entry_is_good(f, oob, ppa, verify_data):
            continue
        seq = oob.seq & ~OOB_FLAGS
        f.seq = max(f.seq, seq)
        if found[oob.lba]:
            other = (<const oob_t *>media_oob(f.media, found[oob.lba] - 1)).seq & ~OOB_FLAGS
            if other > seq:
                continue
        found[oob.lba] = ppa + 1


cdef inline int ftl_recover(ftl_t *f, bint trust_trims, bint verify_data) noexcept nogil:
    """Rebuild the map from the out-of-band entries.

    *trust_trims*: the L2P in the image is as the dead process left it, so its unmapped entries count. *verify_data*: the
    host itself may have crashed, so entries that cover their data are checked against it.
    """
    cdef uint32_t *found = <uint32_t *>calloc(f.capacity_sectors, sizeof(uint32_t))
    cdef uint32_t lba, pu, line
    cdef uint64_t lost = 0
    if found == NULL:
        return RECOVERY_NO_MEMORY
    for pu in range(f.n_pus):
        for line in range(f.n_lines):
            # OFFLINE ones too: a chunk that failed holds what was not moved out of it yet.
            scan_chunk(f, line_chunk(f, line, pu), found, verify_data)
    for lba in range(f.capacity_sectors):
        if not trust_trims or f.l2p[lba]:
            f.l2p[lba] = found[lba]
            if found[lba] and (<const oob_t *>media_oob(f.media, found[lba] - 1)).seq & OOB_LOST:
                lost += 1
    f.lost_sectors = max(f.lost_sectors, lost)
    free(found)
    return ftl_load_map(f)
