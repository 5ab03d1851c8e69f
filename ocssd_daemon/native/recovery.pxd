"""Owns the way back: rebuilding the FTL's memory from what lies on the flash.

After a clean stop the L2P in the image is the checkpoint and only counters and bitmaps are derived from it. Otherwise the
map is rebuilt from the out-of-band entries: for each logical sector the entry with the highest sequence number wins. That
holds even for entries on erased chunks, because whatever replaced such a sector has a higher number still. Trims leave no
entry; they are remembered by the *unmapped* entries of the L2P in the image.

Nothing in the image is changed before the new map is complete, so recovery itself may be killed.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ocssd_daemon.native.ftl cimport (
    LINE_CLOSED, LINE_DEAD, LINE_FREE, NO_LINE, NO_PPA, OOB_HASHED,
    data_hash, ftl_t, invalidate, is_valid, l2p_get, l2p_set, line_chunk, line_of, move_sector, oob_mix, oob_t, set_valid,
)
from ocssd_daemon.native.gc cimport recount_spare
from ocssd_daemon.native.media cimport (
    CHUNK_FREE, CHUNK_OFFLINE, CHUNK_OPEN,
    chunk_close_early, chunk_pu, media_data, media_oob, ppa_chunk, ppa_exists, ppa_of, ppa_sector,
)

cdef enum:
    RECOVERY_OK = 0
    RECOVERY_NO_MEMORY = 1
    RECOVERY_BAD_MAP = 2        # the checkpoint points outside the flash, or twice at one sector


cdef inline void lines_from_chunks(ftl_t *f) noexcept nogil:
    """Derive each line's state and wear; a line that was open is closed where it stands."""
    cdef uint32_t line, pu, chunk, good, used
    cdef uint64_t cycles
    f.free_lines = 0
    for line in range(f.n_lines):
        good = used = 0
        cycles = 0
        for pu in range(f.n_pus):
            chunk = line_chunk(f, line, pu)
            cycles += f.media.chunks[chunk].pe_cycles
            good += f.media.chunks[chunk].state != CHUNK_OFFLINE
            used += not f.media.chunks[chunk].state & (CHUNK_FREE | CHUNK_OFFLINE)
            if f.media.chunks[chunk].state == CHUNK_OPEN:
                chunk_close_early(f.media, chunk)
        f.line_erases[line] = <uint32_t>(cycles // f.n_pus)
        f.line_state[line] = LINE_CLOSED if used or f.line_valid[line] else LINE_FREE if good else LINE_DEAD
        f.free_lines += f.line_state[line] == LINE_FREE
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
    if (oob.seq & ~OOB_HASHED) == 0 or oob.lba >= f.capacity_sectors:
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
        seq = oob.seq & ~OOB_HASHED
        f.seq = max(f.seq, seq)
        if found[oob.lba]:
            other = (<const oob_t *>media_oob(f.media, found[oob.lba] - 1)).seq & ~OOB_HASHED
            if other > seq:
                continue
        found[oob.lba] = ppa + 1


cdef inline void replace_unprogrammed(ftl_t *f) noexcept nogil:
    """Sectors that were still in the write buffer lie beyond their chunk's write pointer: write them again."""
    cdef uint32_t lba, ppa
    for lba in range(f.capacity_sectors):
        ppa = l2p_get(f, lba)
        if ppa == <uint32_t>NO_PPA or ppa_sector(f.media, ppa) < f.media.chunks[ppa_chunk(f.media, ppa)].wp:
            continue
        if move_sector(f, &f.user, ppa):
            f.recovered_sectors += 1


cdef inline int ftl_recover(ftl_t *f, bint trust_trims, bint verify_data) noexcept nogil:
    """Rebuild the map from the out-of-band entries.

    *trust_trims*: the L2P in the image is as the dead process left it, so its unmapped entries count. *verify_data*: the
    host itself may have crashed, so entries that cover their data are checked against it.
    """
    cdef uint32_t *found = <uint32_t *>calloc(f.capacity_sectors, sizeof(uint32_t))
    cdef uint32_t lba, pu, line
    if found == NULL:
        return RECOVERY_NO_MEMORY
    for pu in range(f.n_pus):
        for line in range(f.n_lines):
            if f.media.chunks[line_chunk(f, line, pu)].state != CHUNK_OFFLINE:
                scan_chunk(f, line_chunk(f, line, pu), found, verify_data)
    for lba in range(f.capacity_sectors):
        if not trust_trims or f.l2p[lba]:
            f.l2p[lba] = found[lba]
    free(found)
    ftl_load_map(f)
    replace_unprogrammed(f)
    return RECOVERY_OK
