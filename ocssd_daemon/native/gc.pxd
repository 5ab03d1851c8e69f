# cython: cdivision=True
"""Owns the free lines: which line to collect next, how fast, and how wear is spread.

Collection is paced, not bursty: while few lines are free, each user sector pays for as many moves as the victim needs to
be free by the time its space is used up (moved : user = valid : invalid of the victim). Two rules make it impossible to
starve: the user may open a line only while ``keep_lines`` stay free for GC, and a write that finds none collects until
there is one, always choosing the emptiest line.

Sizes are sectors. Knows the FTL's structures and nothing above them.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.ftl cimport (
    commit_user,
    LINE_CLOSED, LINE_DEAD, LINE_FREE, LINE_PENDING, NO_LINE, NO_PPA,
    VICTIM_COST_BENEFIT, VICTIM_D_CHOICES, VICTIM_FIFO, VICTIM_GREEDY, VICTIM_RANDOM,
    LINE_LOST_A_CHUNK, LINE_OPEN, LINE_TO_REFRESH, ctz64, frontier_close, frontier_flush, frontier_open, frontier_t,
    ftl_unreadable, ftl_t, l2p_get, line_chunk, line_of, move_ahead, move_sector,
)
from ocssd_daemon.native.media cimport (
    CHUNK_FAIL_RESET, CHUNK_FREE, CHUNK_OFFLINE, CHUNK_OPEN, CHUNK_RETIRED, MEDIA_OK,
    chunk_close_early, chunk_go_offline, chunk_t, media_erase, ppa_chunk, ppa_of,
)
from ocssd_daemon.native.sys cimport copies_end, eventfd_signal
from ocssd_daemon.native.wear cimport (
    NOTICE_HIGH_ERRORS, NOTICE_MEDIUM_ERRORS, NOTICE_REFRESHED, NOTICE_UNRECOVERABLE, NOTICES, wear_note, wear_t,
)

cdef extern from "errno.h" nogil:
    int errno
    int EINTR

cdef extern from "unistd.h" nogil:
    int fdatasync(int)

cdef enum:
    WEAR_EVERY = 8              # at most one victim in so many is chosen for wear instead of for space
    RANDOM_TRIES = 8            # random victims in a row that may free too little
    LATER_UNITS = 4             # who pays later owes at most so many units
    MOVES_AHEAD = 8             # sectors whose map entries are on their way while one is moved
    RATE_CAP = 64               # most moves that one user sector pays for; the reserve covers the rest


cdef inline uint64_t next_random(ftl_t *f) noexcept nogil:
    """xorshift64*: seeded, the same everywhere."""
    f.rng ^= f.rng >> 12
    f.rng ^= f.rng << 25
    f.rng ^= f.rng >> 27
    return f.rng * 0x2545f4914f6cdd1dull


# --- choice of the victim -----------------------------------------------------------------------------------------

cdef inline double victim_score(const ftl_t *f, uint32_t line, uint32_t policy) noexcept nogil:
    """Higher is better. Cost-benefit: (1 - u) x age / 2u (Rosenblum and Ousterhout, LFS, section 3.6)."""
    cdef double valid = f.line_valid[line]
    cdef double total = <double>f.n_pus * f.media.geometry.sectors
    if policy == VICTIM_FIFO:
        return -<double>f.line_closed_seq[line]
    if policy == VICTIM_COST_BENEFIT:
        return (total - valid) * <double>(f.seq - f.line_closed_seq[line] + 1) / (2 * valid + 1)
    return -valid


cdef inline uint32_t best_victim(const ftl_t *f, uint32_t policy) noexcept nogil:
    """The best CLOSED line; lines with a failed chunk come first, whatever the policy."""
    cdef uint32_t line, best = NO_LINE
    cdef double score, best_score = 0
    for line in range(f.n_lines):
        if f.line_state[line] != LINE_CLOSED:
            continue
        if f.line_failed[line]:
            return line
        score = victim_score(f, line, policy)
        if best == <uint32_t>NO_LINE or score > best_score:
            best = line
            best_score = score
    return best


cdef inline uint32_t emptiest_line(const ftl_t *f) noexcept nogil:
    """Greedy, without the arithmetic of the general case: this scan runs for every victim of the default policy."""
    cdef uint32_t line, best = NO_LINE, best_valid = NO_LINE
    for line in range(f.n_lines):
        if f.line_state[line] == LINE_CLOSED and (f.line_valid[line] < best_valid or f.line_failed[line]):
            best = line
            best_valid = 0 if f.line_failed[line] else f.line_valid[line]
    return best


cdef inline uint32_t emptiest_settled_line(const ftl_t *f) noexcept nogil:
    """Greedy, but data that the user has just written gets time to be overwritten before it is moved.

    The age threshold of Menon and Stockmeyer (1998). A line of the user's frontier is passed over until ``settle_sectors``
    were written after it, unless nothing in it is valid or no other line has garbage.
    """
    cdef uint32_t line, best = NO_LINE, best_valid = f.n_pus * f.media.geometry.sectors
    for line in range(f.n_lines):
        if f.line_state[line] != LINE_CLOSED:
            continue
        if f.line_failed[line]:
            return line
        if f.line_valid[line] >= best_valid or (
                f.line_settled_at[line] > f.user_sectors_written and f.line_valid[line] > 0):
            continue
        if f.short_lines and f.line_valid[line] >= line_good_sectors(f, line):
            continue                # short, and full
        best = line
        best_valid = f.line_valid[line]
    return best if best != <uint32_t>NO_LINE else emptiest_line(f)


cdef inline uint32_t line_good_sectors(const ftl_t *f, uint32_t line) noexcept nogil:
    """What the line will hold once it is erased."""
    cdef uint32_t pu, good = 0
    cdef const chunk_t *c
    for pu in range(f.n_pus):
        c = &f.media.chunks[line_chunk(f, line, pu)]
        good += c.state != CHUNK_OFFLINE and not c.flags & CHUNK_FAIL_RESET
    return good * f.media.geometry.sectors


cdef inline uint32_t most_garbage_line(const ftl_t *f) noexcept nogil:
    """The line that gives the most space. With short lines that need not be the emptiest one."""
    cdef uint32_t line, good, best = NO_LINE
    cdef uint32_t gain, best_gain = 0
    for line in range(f.n_lines):
        if f.line_state[line] != LINE_CLOSED:
            continue
        good = line_good_sectors(f, line)
        gain = good - f.line_valid[line] if good > f.line_valid[line] else 0
        if gain > best_gain:
            best = line
            best_gain = gain
    return best if best != <uint32_t>NO_LINE else emptiest_line(f)


cdef inline uint32_t sampled_victim(ftl_t *f, uint32_t samples) noexcept nogil:
    """The emptiest of *samples* CLOSED lines drawn at random (d-choices; one sample is a random victim)."""
    cdef uint32_t line, best = NO_LINE, drawn = 0, tries = 0
    while drawn < samples and tries < 64 * samples:
        tries += 1
        line = <uint32_t>(((next_random(f) >> 32) * f.n_lines) >> 32)
        if f.line_state[line] != LINE_CLOSED:
            continue
        drawn += 1
        if best == <uint32_t>NO_LINE or f.line_valid[line] < f.line_valid[best]:
            best = line
    return best if best != <uint32_t>NO_LINE else emptiest_line(f)


cdef inline uint32_t coldest_line(ftl_t *f) noexcept nogil:
    """Static wear levelling: the least-worn CLOSED line when the spread has grown too wide, else NO_LINE."""
    cdef uint32_t line, coldest = NO_LINE, most = 0
    if f.wear_spread == 0 or f.victims_since_levelling < WEAR_EVERY:
        return NO_LINE
    for line in range(f.n_lines):
        if f.line_state[line] == LINE_DEAD:
            continue
        most = max(most, f.line_erases[line])
        if f.line_state[line] == LINE_CLOSED and (
                coldest == <uint32_t>NO_LINE or f.line_erases[line] < f.line_erases[coldest]):
            coldest = line
    if coldest == <uint32_t>NO_LINE or most - f.line_erases[coldest] <= f.wear_spread:
        return NO_LINE
    return coldest


cdef inline uint32_t urgent_victim(const ftl_t *f) noexcept nogil:
    return most_garbage_line(f) if f.short_lines else emptiest_line(f)


cdef inline uint32_t policy_victim(ftl_t *f) noexcept nogil:
    if f.policy == VICTIM_GREEDY:
        return emptiest_settled_line(f)
    if f.policy == VICTIM_D_CHOICES:
        return sampled_victim(f, f.d_choices)
    if f.policy == VICTIM_RANDOM:
        return sampled_victim(f, 1)
    return best_victim(f, f.policy)


cdef inline uint32_t line_to_refresh(const ftl_t *f) noexcept nogil:
    cdef uint32_t line
    for line in range(f.n_lines):
        if f.line_state[line] == LINE_CLOSED and f.line_failed[line] == LINE_TO_REFRESH:
            return line
    return NO_LINE


cdef inline void start_victim(ftl_t *f, uint32_t line) noexcept nogil:
    cdef uint32_t total = f.n_pus * f.media.geometry.sectors
    f.victim = line
    f.cursor = 0
    f.credit = 0
    f.gc_runs += 1
    if f.line_failed[line] == LINE_TO_REFRESH:
        f.refresh_lines -= 1
        f.lines_refreshed += 1
    f.rate_moved = f.line_valid[line]
    f.rate_user = max(<uint32_t>1, max(total - f.line_valid[line], f.line_valid[line] // RATE_CAP))


cdef inline bint pick_victim(ftl_t *f, bint urgent) noexcept nogil:
    """Start on the next victim. *urgent*: the emptiest, whatever the policy. Returns 0 when there is none."""
    cdef uint32_t line = NO_LINE if urgent else coldest_line(f)
    if f.refresh_lines and not urgent:
        start_victim(f, line_to_refresh(f))
        return True
    if line != <uint32_t>NO_LINE:
        f.victims_since_levelling = 0
        f.wear_runs += 1
    else:
        line = urgent_victim(f) if urgent else policy_victim(f)
        f.victims_since_levelling += 1
    if line == <uint32_t>NO_LINE:
        return False
    start_victim(f, line)
    return True


# --- collecting ---------------------------------------------------------------------------------------------------

cdef inline void count_line(ftl_t *f, uint32_t line) noexcept nogil:
    """Refresh what is known of an erased line: mean wear, state."""
    cdef uint32_t pu, good = 0
    cdef uint64_t cycles = 0
    for pu in range(f.n_pus):
        cycles += f.media.chunks[line_chunk(f, line, pu)].pe_cycles
        good += f.media.chunks[line_chunk(f, line, pu)].state != CHUNK_OFFLINE
    f.line_erases[line] = <uint32_t>(cycles // f.n_pus)
    f.line_failed[line] = 0
    f.line_state[line] = LINE_FREE if good else LINE_DEAD
    f.free_lines += good > 0


cdef inline void become_read_only(ftl_t *f) noexcept nogil:
    if not f.read_only and f.notify_fd >= 0:
        eventfd_signal(f.notify_fd)
    f.read_only = 1


cdef inline void settle_from_spare(ftl_t *f) noexcept nogil:
    """How long the user's lines are left alone, from what is spare besides the lines that GC works with."""
    cdef uint64_t needed = f.capacity_sectors + (f.reserve_lines + 1) * <uint64_t>f.n_pus * f.media.geometry.sectors
    f.settle_sectors = 0
    if f.usable_sectors > needed:
        f.settle_sectors = <uint64_t>(f.settle * <double>(f.usable_sectors - needed))


cdef inline void recount_spare(ftl_t *f) noexcept nogil:
    """After a chunk went OFFLINE: is there still room for the data and for GC to work?"""
    cdef uint32_t line, pu, good
    cdef uint64_t sectors = 0
    f.short_lines = 0
    for line in range(f.n_lines):
        good = 0
        for pu in range(f.n_pus):
            good += f.media.chunks[line_chunk(f, line, pu)].state != CHUNK_OFFLINE
        sectors += <uint64_t>good * f.media.geometry.sectors
        f.short_lines += good < f.n_pus
    f.usable_sectors = sectors
    settle_from_spare(f)
    if sectors < needed_sectors(f):
        become_read_only(f)


cdef inline uint32_t spare_lines(const ftl_t *f) noexcept nogil:
    """Lines that must exist besides the data: open frontiers and what GC needs to move a whole line."""
    return keep_lines(f) + (1 if f.moved == &f.user else 2)


cdef inline void note_refreshed(ftl_t *f, uint32_t line) noexcept nogil:
    """The data of *line* lies elsewhere now, freshly written: say so in the flash's notices."""
    cdef uint32_t pu
    if f.media.wear == NULL:
        return
    for pu in range(f.n_pus):
        wear_note(f.media.wear, line_chunk(f, line, pu), 0, NOTICE_REFRESHED)


cdef inline void erase_line(ftl_t *f, uint32_t line) noexcept nogil:
    cdef uint32_t pu, chunk
    cdef uint32_t lost = f.line_failed[line] == LINE_LOST_A_CHUNK
    cdef bint refreshed = f.line_failed[line] == LINE_TO_REFRESH
    for pu in range(f.n_pus):
        chunk = line_chunk(f, line, pu)
        if f.media.chunks[chunk].state & (CHUNK_FREE | CHUNK_OFFLINE):
            continue
        if f.media.chunks[chunk].flags & CHUNK_RETIRED:
            chunk_go_offline(f.media, chunk)
            f.retiring -= f.retiring > 0
            f.chunks_retired += 1
            lost += 1
            continue
        if f.media.timing != NULL:
            f.media.ready_ns = f.media.timing.moved_ns
        lost += media_erase(f.media, chunk) != MEDIA_OK
        f.chunks_erased += 1
    count_line(f, line)
    if refreshed:
        note_refreshed(f, line)
    if lost:
        recount_spare(f)


cdef inline void finish_victim(ftl_t *f) noexcept nogil:
    """Everything valid has left the victim. With durability host it is erased only after the copies are on the host's disk."""
    cdef uint32_t line = f.victim
    f.victim = NO_LINE
    if f.host_durable:
        f.line_state[line] = LINE_PENDING
        f.pending_lines += 1
    else:
        erase_line(f, line)


cdef inline void erase_pending(ftl_t *f) noexcept nogil:
    """After a host sync: the collected lines may be erased now."""
    cdef uint32_t line
    if f.pending_lines == 0:
        return
    for line in range(f.n_lines):
        if f.line_state[line] == LINE_PENDING:
            erase_line(f, line)
    f.pending_lines = 0


cdef inline uint32_t move_word(ftl_t *f, uint32_t budget) noexcept nogil:
    """Move the valid sectors under the cursor's word, at most *budget*. Returns how many; NO_PPA when no line is free."""
    cdef uint32_t chunk = line_chunk(f, f.victim, f.cursor % f.n_pus)
    cdef uint32_t row = f.cursor // f.n_pus
    cdef uint64_t *word = &f.valid[<uint64_t>chunk * f.words + row]
    cdef uint32_t base = <uint32_t>ppa_of(f.media, chunk, row << 6)
    cdef uint32_t moved = 0
    cdef uint32_t _i
    cdef uint64_t rest = word[0]
    for _i in range(MOVES_AHEAD):
        move_ahead(f, base, &rest)
    while word[0] and moved < budget:
        move_ahead(f, base, &rest)
        if not move_sector(f, f.moved, base + ctz64(word[0]), True):
            moved = NO_PPA
            break
        moved += 1
    copies_end()
    if moved == <uint32_t>NO_PPA:
        return NO_PPA
    if word[0] == 0:
        f.cursor += 1
    return moved


cdef inline bint word_is_done(const ftl_t *f) noexcept nogil:
    """Is there nothing (left) to move under the cursor?"""
    if f.cursor >= f.words * f.n_pus:
        return True
    return f.valid[<uint64_t>line_chunk(f, f.victim, f.cursor % f.n_pus) * f.words + f.cursor // f.n_pus] == 0


cdef inline bint gc_step(ftl_t *f, uint32_t budget, bint urgent) noexcept nogil:
    """Move up to *budget* sectors, starting and finishing victims on the way. Returns 0 when GC cannot go on."""
    cdef uint32_t moved
    if f.victim == <uint32_t>NO_LINE and not pick_victim(f, urgent):
        return False
    while f.cursor < f.words * f.n_pus:
        moved = move_word(f, budget)
        if moved == <uint32_t>NO_PPA:
            return False
        budget -= moved
        f.gc_sectors_moved += moved
        if budget == 0 and not word_is_done(f):
            return True
    if f.cursor >= f.words * f.n_pus:
        finish_victim(f)
    return True


# --- what the flash reports ---------------------------------------------------------------------------------------

cdef inline void frontier_retire(ftl_t *f, frontier_t *w) noexcept nogil:
    """Close the open line of *w* where it stands."""
    cdef uint32_t i, line = w.line
    frontier_flush(f, w)
    if w.line != line:
        return
    for i in range(w.n_chunks):
        if f.media.chunks[w.chunks[i]].state == CHUNK_OPEN:
            chunk_close_early(f.media, w.chunks[i])
    frontier_close(f, w)


cdef inline bint owns_chunk(const ftl_t *f, uint32_t chunk) noexcept nogil:
    cdef uint32_t i
    for i in range(f.n_pus):
        if f.pus[i] == chunk // f.media.geometry.chunks:
            return True
    return False


cdef inline void refresh_line_of(ftl_t *f, uint32_t chunk) noexcept nogil:
    """Have the chunk's line moved elsewhere; an open line is closed for that. Chunks of others are theirs to care for."""
    cdef uint32_t line = chunk % f.media.geometry.chunks
    if not owns_chunk(f, chunk):
        return
    if f.line_state[line] == LINE_OPEN:
        frontier_retire(f, &f.user if f.user.line == line else &f.gc)
    if f.line_state[line] == LINE_CLOSED and f.line_failed[line] == 0 and line != f.victim:
        f.line_failed[line] = LINE_TO_REFRESH
        f.refresh_lines += 1


cdef inline uint64_t needed_sectors(const ftl_t *f) noexcept nogil:
    """Flash that must be good for the data to have room and GC to work."""
    return f.capacity_sectors + <uint64_t>spare_lines(f) * f.n_pus * f.media.geometry.sectors


cdef inline void retire_chunk(ftl_t *f, uint32_t chunk) noexcept nogil:
    """Have the chunk taken offline when its line is collected, if that does not end the spare space.

    A margin of two lines stays for chunks that fail for good: retiring is a precaution, and must not make the disk read-only.
    """
    cdef uint64_t line_sectors = <uint64_t>f.n_pus * f.media.geometry.sectors
    if not f.retire or not owns_chunk(f, chunk) or f.media.chunks[chunk].flags & CHUNK_RETIRED:
        return
    if f.usable_sectors < needed_sectors(f) + (f.retiring + 1) * <uint64_t>f.media.geometry.sectors + 2 * line_sectors:
        return
    f.media.chunks[chunk].flags |= CHUNK_RETIRED
    f.retiring += 1


cdef inline void take_notices(ftl_t *f) noexcept nogil:
    """React to what the flash noted since the last time: lines that are hard to read are moved elsewhere, and a chunk that
    lost data is not used again while there is spare space for that.
    """
    cdef wear_t *w = f.media.wear
    cdef uint16_t state
    if w.noticed - w.taken > NOTICES:
        w.taken = w.noticed - NOTICES
    while w.taken < w.noticed:
        state = w.notices[w.taken % NOTICES].state
        if state & (NOTICE_MEDIUM_ERRORS | NOTICE_HIGH_ERRORS | NOTICE_UNRECOVERABLE):
            refresh_line_of(f, w.notices[w.taken % NOTICES].chunk)
        if state & NOTICE_UNRECOVERABLE:
            retire_chunk(f, w.notices[w.taken % NOTICES].chunk)
        w.taken += 1


cdef inline void line_lost_a_chunk(ftl_t *f, uint32_t line) noexcept nogil:
    """A read took a chunk of *line* offline. An open line learns it from its next program."""
    if f.line_state[line] == LINE_CLOSED and f.line_failed[line] == 0:
        f.line_failed[line] = LINE_LOST_A_CHUNK
        recount_spare(f)


cdef inline bint ftl_read_fails(ftl_t *f, uint32_t lba) noexcept nogil:
    """``ftl_unreadable``, and the work that the read leads to. Call it only when ``may_be_lost``."""
    cdef bint failed = ftl_unreadable(f, lba)
    if failed and f.media.chunks[ppa_chunk(f.media, l2p_get(f, lba))].state == CHUNK_OFFLINE:
        line_lost_a_chunk(f, line_of(f, l2p_get(f, lba)))
    if f.media.wear != NULL and f.media.wear.noticed != f.media.wear.taken:
        take_notices(f)
    if f.free_lines > keep_lines(f) and (f.refresh_lines or f.victim != <uint32_t>NO_LINE and f.line_failed[f.victim]):
        gc_step(f, f.unit, False)
    return failed


# --- pacing -------------------------------------------------------------------------------------------------------

cdef inline uint32_t keep_lines(const ftl_t *f) noexcept nogil:
    """Free lines the user may not open: one takes a whole victim; short lines hold less, so then two."""
    return 1 if f.short_lines == 0 else 2


cdef inline void gc_pace(ftl_t *f, uint32_t user_sectors) noexcept nogil:
    """Pay for *user_sectors* just written."""
    cdef uint32_t due
    if f.free_lines > f.reserve_lines and f.refresh_lines == 0:
        return
    if f.victim == <uint32_t>NO_LINE and not pick_victim(f, False):
        return
    f.credit += user_sectors * f.rate_moved
    due = f.credit // f.rate_user
    f.credit -= due * f.rate_user
    # Both frontiers may have opened a line during one victim: hurry, so that the user need not wait for its end.
    gc_step(f, 2 * due if f.free_lines <= keep_lines(f) else due, False)


cdef inline int host_sync(ftl_t *f) noexcept nogil:
    """Bring the image to the host's disk; lines that waited for it are erased. Returns 0 or an errno."""
    while f.media.store_fd >= 0 and fdatasync(f.media.store_fd) != 0:
        if errno != EINTR:
            return errno
    erase_pending(f)
    return 0


cdef inline bint collect_until(ftl_t *f, uint32_t wanted) noexcept nogil:
    """Collect until *wanted* lines are free. Returns 0 when that cannot be done."""
    cdef uint32_t tries = 0
    f.stalls += 1
    while f.free_lines < wanted:
        tries += 1
        if f.pending_lines:
            if host_sync(f) != 0:
                return False
        # Random stays random even now, or its write amplification would not be what its name says.
        elif tries > 4 * f.n_lines + 16 or not gc_step(f, NO_PPA, f.policy != VICTIM_RANDOM or tries > RANDOM_TRIES):
            return False
    return True


cdef inline bint make_room(ftl_t *f) noexcept nogil:
    """Give the user frontier a line. Returns 0 when no space can be made.

    With one frontier GC shares the user's line: once it has opened the last free line, the user waits until the victim
    is collected, or the line would be full before GC is through.
    """
    if f.user.line != <uint32_t>NO_LINE:
        return collect_until(f, keep_lines(f))
    if f.read_only:
        return False
    if f.free_lines <= keep_lines(f) and not collect_until(f, keep_lines(f) + 1):
        return False
    return f.user.line != <uint32_t>NO_LINE or frontier_open(f, &f.user)


cdef inline void out_of_space(ftl_t *f, uint64_t store_full) noexcept nogil:
    """No room could be made: unless the host's disk is what is full, that is for good."""
    if f.media.store_full == store_full:
        become_read_only(f)


cdef inline uint32_t ftl_slot(ftl_t *f) noexcept nogil:
    """Where the next user sector goes: copy its data there, then ``ftl_commit``. NO_PPA: no space can be made."""
    cdef uint64_t store_full = f.media.store_full
    if f.user.line == <uint32_t>NO_LINE or (f.free_lines < keep_lines(f) and f.moved == &f.user):
        if not make_room(f):
            out_of_space(f, store_full)
            return NO_PPA
    return f.user.ppa + f.user.fill


cdef inline void ftl_pay(ftl_t *f) noexcept nogil:
    """Pay GC for what was written since the last time, if that is a unit or more."""
    if f.unpaced >= f.unit:
        gc_pace(f, f.unpaced)
        f.unpaced = 0


cdef inline void ftl_commit(ftl_t *f, uint32_t lba) noexcept nogil:
    """The user's data is in place at ``ftl_slot``: make it *lba*, and pay GC for each full unit, or let a few add up."""
    commit_user(f, lba)
    f.unpaced += 1
    if f.unpaced >= (LATER_UNITS * f.unit if f.pays_later else f.unit):
        ftl_pay(f)
