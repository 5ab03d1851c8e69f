# cython: cdivision=True
"""Owns time: when each PU and each channel is busy, and so when a flash operation ends.

The flash itself works synchronously; this is an overlay that answers one question per operation: when would it have
ended? Times are nanoseconds of the clock that the caller gives; nothing here reads one.

    sense     PU: array to page register, then channel: register to controller; the next sense overlaps the transfer.
    program   channel: controller to register, then PU: register to array. The next transfer may overlap the program.
    erase     PU only.

A *row* is what one operation of a PU covers: the pages of all its planes. Sectors of one row that one command asks for
cost one sense. A table says of which kind (lower, middle, upper, top) the pages of a row are.

A resource is a *timeline*: sorted, disjoint busy slots. An operation takes the first gap that holds it, so a transfer
far in the future does not block the channel now. Programs and erases of one PU keep their order. With *suspend* a sense
does not wait for a program or an erase: it cuts in, and everything behind moves back. Ends that were told before
move too: whoever waits for one keeps a ``wait_t`` and asks ``timing_revised`` when it is due.

User writes end when the write buffer has taken them; it gives a place back when the program ends.
Knows no FTL and no media.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memmove

cdef enum:
    SLOTS = 64                  # per timeline; when full, the first gap is given up, which only delays
    CUTS = 32                   # interruptions that a PU remembers one by one
    PAGE_KINDS = 4
    NO_PU = 0xffffffff


ctypedef struct slot_t:
    uint64_t start_ns
    uint64_t end_ns

ctypedef struct timeline_t:
    uint32_t n
    uint32_t gaps_given_up
    slot_t slots[SLOTS]

ctypedef struct cut_t:          # an interruption
    uint64_t at_ns
    uint64_t before_ns          # how far the ones before it have moved things back, all together

ctypedef struct wait_t:         # the end of a program or an erase that later interruptions may move
    uint64_t end_ns
    uint64_t shifted_ns         # pu_time_t.shifted_ns when it was told
    uint32_t pu                 # NO_PU: it does not move

ctypedef struct pu_time_t:
    timeline_t line
    uint64_t shifted_ns         # sum over all interruptions
    uint64_t n_cuts
    cut_t cuts[CUTS]            # the newest, at n_cuts % CUTS
    uint64_t senses_until_ns    # with suspend: senses keep their order among themselves
    uint64_t programs_until_ns  # programs and erases keep theirs
    uint64_t read_register_ns   # the register's data has left the PU
    uint64_t write_register_ns  # the register's data has gone to the array
    uint64_t sensed_row         # in the register, for the command that sensed it
    uint64_t sensed_command
    uint64_t sensed_ns

ctypedef struct held_t:         # sectors that leave the write buffer together, when their program has ended
    wait_t program
    uint32_t sectors

ctypedef struct timing_t:
    # what it costs, in ns
    uint64_t sense_ns[PAGE_KINDS]
    uint64_t program_ns[PAGE_KINDS]
    uint64_t erase_ns
    uint64_t transfer_ns_per_sector
    uint64_t controller_ns
    uint64_t buffer_ns          # to take a sector into the write buffer
    uint64_t suspend_ns
    uint32_t kinds
    uint32_t suspend
    uint32_t row_sectors
    const uint8_t *kind_of_row  # [rows of a chunk]
    uint32_t buffer_sectors     # 0: a write ends when it is programmed
    uint32_t pus_per_channel
    # who is busy until when
    pu_time_t *pus
    timeline_t *channels
    held_t *held                # heap on program.end_ns
    uint32_t held_len
    uint32_t held_cap
    uint64_t buffered           # sectors in the write buffer
    uint64_t admitted_ns        # writes are taken in order
    uint64_t moved_ns           # when what GC has moved so far is programmed
    wait_t flushed              # when all user data that was programmed so far is in the array
    # the command in hand
    uint64_t now_ns
    uint64_t command
    uint64_t done_ns
    wait_t last                 # the program or erase that it waits for, if that is what ends last
    # counters
    uint64_t senses
    uint64_t programs
    uint64_t erases
    uint64_t sense_busy_ns
    uint64_t program_busy_ns
    uint64_t erase_busy_ns
    uint64_t channel_busy_ns
    uint64_t suspensions
    uint64_t buffer_waits


# --- a timeline ---------------------------------------------------------------------------------------------------

cdef inline void timeline_forget(timeline_t *t, uint64_t now_ns) noexcept nogil:
    """Drop what has ended: nothing can be reserved before *now_ns* any more."""
    cdef uint32_t ended = 0
    while ended < t.n and t.slots[ended].end_ns <= now_ns:
        ended += 1
    if ended:
        t.n -= ended
        memmove(t.slots, t.slots + ended, t.n * sizeof(slot_t))


cdef inline void timeline_give_up_gap(timeline_t *t) noexcept nogil:
    t.slots[1].start_ns = t.slots[0].start_ns
    t.n -= 1
    t.gaps_given_up += 1
    memmove(t.slots, t.slots + 1, t.n * sizeof(slot_t))


cdef inline void timeline_insert(timeline_t *t, uint32_t i, uint64_t start_ns, uint64_t end_ns) noexcept nogil:
    """Put a slot before slot *i*, joining it with neighbours that it touches."""
    cdef bint joins_previous = i > 0 and t.slots[i - 1].end_ns == start_ns
    cdef bint joins_next = i < t.n and t.slots[i].start_ns == end_ns
    if joins_previous and joins_next:
        t.slots[i - 1].end_ns = t.slots[i].end_ns
        t.n -= 1
        memmove(t.slots + i, t.slots + i + 1, (t.n - i) * sizeof(slot_t))
    elif joins_previous:
        t.slots[i - 1].end_ns = end_ns
    elif joins_next:
        t.slots[i].start_ns = start_ns
    else:
        memmove(t.slots + i + 1, t.slots + i, (t.n - i) * sizeof(slot_t))
        t.slots[i].start_ns = start_ns
        t.slots[i].end_ns = end_ns
        t.n += 1
        if t.n == SLOTS:
            timeline_give_up_gap(t)


cdef inline uint64_t timeline_reserve(timeline_t *t, uint64_t earliest_ns, uint64_t length_ns) noexcept nogil:
    """Take the first gap of *length_ns* from *earliest_ns* on. Returns its start."""
    cdef uint32_t i = t.n
    if length_ns == 0:
        return earliest_ns
    if i and earliest_ns < t.slots[i - 1].end_ns:
        i = 0
        while i < t.n and earliest_ns + length_ns > t.slots[i].start_ns:
            earliest_ns = max(earliest_ns, t.slots[i].end_ns)
            i += 1
    timeline_insert(t, i, earliest_ns, earliest_ns + length_ns)
    return earliest_ns


cdef inline uint64_t timeline_cut_in(timeline_t *t, uint64_t start_ns, uint64_t length_ns) noexcept nogil:
    """Take [start, start + length) now; what is in the way moves back. Returns by how much, 0 when nothing was."""
    cdef uint32_t i = 0, j
    cdef uint64_t shift
    while i < t.n and t.slots[i].end_ns <= start_ns:
        i += 1
    if i == t.n or start_ns + length_ns <= t.slots[i].start_ns:
        timeline_insert(t, i, start_ns, start_ns + length_ns)
        return 0
    if t.slots[i].start_ns <= start_ns:
        shift = length_ns
        t.slots[i].end_ns += shift
    else:
        shift = start_ns + length_ns - t.slots[i].start_ns
        t.slots[i].start_ns = start_ns
        t.slots[i].end_ns += shift
    for j in range(i + 1, t.n):
        t.slots[j].start_ns += shift
        t.slots[j].end_ns += shift
    return shift


# --- a command ----------------------------------------------------------------------------------------------------

cdef inline void timing_begin(timing_t *t, uint64_t now_ns) noexcept nogil:
    t.now_ns = max(t.now_ns, now_ns)
    t.command += 1
    t.done_ns = t.now_ns + t.controller_ns
    t.last.pu = NO_PU


cdef inline void timing_wait(timing_t *t, uint64_t until_ns) noexcept nogil:
    """The command does not end before *until_ns*."""
    if until_ns > t.done_ns:
        t.done_ns = until_ns
        t.last.pu = NO_PU


cdef inline uint64_t timing_revised(const timing_t *t, const wait_t *w) noexcept nogil:
    """When what *w* waits for really ends: interruptions since, as far as they began before that end, have moved it.

    They begin in order, so those that count are all but the newest few. Only when more than CUTS of them lie behind the
    end are the oldest of those counted too.
    """
    cdef const pu_time_t *p
    cdef uint64_t end_ns = w.end_ns, total_ns, i, revised_ns
    if w.pu == <uint32_t>NO_PU:
        return end_ns
    p = &t.pus[w.pu]
    while p.shifted_ns != w.shifted_ns:
        total_ns = p.shifted_ns
        i = p.n_cuts
        while i and p.n_cuts - i < CUTS and p.cuts[(i - 1) % CUTS].at_ns >= end_ns:
            i -= 1
            total_ns = p.cuts[i % CUTS].before_ns
        revised_ns = w.end_ns + (total_ns - w.shifted_ns if total_ns > w.shifted_ns else 0)
        if revised_ns <= end_ns:
            break
        end_ns = revised_ns
    return end_ns


cdef inline wait_t timing_told(const timing_t *t, uint32_t pu, uint64_t end_ns) noexcept nogil:
    """What to keep of a program or an erase of *pu* that ends at *end_ns* as things stand."""
    cdef wait_t w
    w.end_ns = end_ns
    w.shifted_ns = t.pus[pu].shifted_ns
    w.pu = pu if t.suspend else NO_PU
    return w


cdef inline void timing_wait_for(timing_t *t, const wait_t *w) noexcept nogil:
    """The command lasts until *w*, wherever that moves. Of several, the one that ends last as things stand is followed."""
    cdef uint64_t end_ns = timing_revised(t, w)
    if end_ns >= t.done_ns:
        t.done_ns = end_ns
        t.last.pu = w.pu
        t.last.end_ns = end_ns
        t.last.shifted_ns = t.pus[w.pu].shifted_ns if w.pu != <uint32_t>NO_PU else 0


cdef inline uint64_t timing_earliest(const timing_t *t, uint64_t ready_ns) noexcept nogil:
    return max(t.now_ns + t.controller_ns, ready_ns)


cdef inline uint64_t timing_transfer(timing_t *t, uint32_t pu, uint64_t earliest_ns, uint32_t sectors) noexcept nogil:
    """Move *sectors* over the PU's channel. Returns when that begins."""
    cdef timeline_t *channel = &t.channels[pu // t.pus_per_channel]
    cdef uint64_t length_ns = sectors * t.transfer_ns_per_sector
    t.channel_busy_ns += length_ns
    timeline_forget(channel, t.now_ns)
    return timeline_reserve(channel, earliest_ns, length_ns)


cdef inline void timing_interrupt(timing_t *t, pu_time_t *p, uint64_t start_ns, uint64_t length_ns) noexcept nogil:
    """Cut in at *start_ns*, and remember what that moved."""
    cdef uint64_t shift_ns = timeline_cut_in(&p.line, start_ns, length_ns)
    if shift_ns == 0:
        return
    t.suspensions += 1
    p.cuts[p.n_cuts % CUTS].at_ns = start_ns
    p.cuts[p.n_cuts % CUTS].before_ns = p.shifted_ns
    p.n_cuts += 1
    p.shifted_ns += shift_ns
    if p.programs_until_ns > start_ns:
        p.programs_until_ns += shift_ns
    if p.write_register_ns > start_ns:
        p.write_register_ns += shift_ns


cdef inline uint64_t timing_sense_row(timing_t *t, pu_time_t *p, uint64_t earliest_ns, uint64_t cost_ns,
                                      bint background) noexcept nogil:
    """Sense one row. Returns when it is in the register."""
    cdef uint64_t start_ns
    timeline_forget(&p.line, t.now_ns)
    # The register must be empty by the end of the sense. Background senses lie anywhere in the future: not held to it.
    if not background and p.read_register_ns > earliest_ns + cost_ns:
        earliest_ns = p.read_register_ns - cost_ns
    if background or not t.suspend:
        start_ns = timeline_reserve(&p.line, earliest_ns, cost_ns)
    else:
        start_ns = max(earliest_ns, p.senses_until_ns)
        timing_interrupt(t, p, start_ns, t.suspend_ns + cost_ns)
        start_ns += t.suspend_ns
        p.senses_until_ns = start_ns + cost_ns
    t.senses += 1
    t.sense_busy_ns += cost_ns
    return start_ns + cost_ns


cdef inline uint64_t timing_sense(timing_t *t, uint32_t pu, uint32_t chunk, uint32_t sector, uint64_t ready_ns,
                                  uint64_t extra_ns, bint background) noexcept nogil:
    """Read one sector, not before *ready_ns*; *extra_ns*: read retries. Returns when it is in the controller.

    *background*: garbage collection, which never interrupts anything.
    """
    cdef pu_time_t *p = &t.pus[pu]
    cdef uint32_t row = sector // t.row_sectors
    cdef uint64_t name = (<uint64_t>chunk << 32) | row
    cdef uint64_t earliest_ns = timing_earliest(t, ready_ns)
    cdef uint64_t start_ns
    if p.sensed_command != t.command or p.sensed_row != name or extra_ns:
        p.sensed_ns = timing_sense_row(
            t, p, earliest_ns, t.sense_ns[t.kind_of_row[row]] + extra_ns, background)
        p.sensed_row = name
        p.sensed_command = t.command
    start_ns = timing_transfer(t, pu, max(earliest_ns, p.sensed_ns), 1)
    if not background:
        p.read_register_ns = max(p.read_register_ns, start_ns + t.transfer_ns_per_sector)
    return start_ns + t.transfer_ns_per_sector


cdef inline uint64_t timing_program_row(timing_t *t, uint32_t pu, uint32_t row, uint32_t sectors,
                                        uint64_t ready_ns) noexcept nogil:
    cdef pu_time_t *p = &t.pus[pu]
    cdef uint64_t cost_ns = t.program_ns[t.kind_of_row[row]]
    cdef uint64_t loaded_ns, start_ns
    loaded_ns = timing_transfer(t, pu, max(timing_earliest(t, ready_ns), p.write_register_ns), sectors)
    loaded_ns += sectors * t.transfer_ns_per_sector
    timeline_forget(&p.line, t.now_ns)
    start_ns = timeline_reserve(&p.line, max(loaded_ns, p.programs_until_ns), cost_ns)
    p.write_register_ns = start_ns
    p.programs_until_ns = start_ns + cost_ns
    t.programs += 1
    t.program_busy_ns += cost_ns
    return p.programs_until_ns


cdef inline uint64_t timing_program(timing_t *t, uint32_t pu, uint32_t sector, uint32_t n,
                                    uint64_t ready_ns) noexcept nogil:
    """Program *n* sectors, not before *ready_ns*. Returns when the last row is in the array."""
    cdef uint64_t end_ns = 0
    cdef uint32_t part
    while n:
        part = min(n, t.row_sectors - sector % t.row_sectors)
        end_ns = timing_program_row(t, pu, sector // t.row_sectors, part, ready_ns)
        sector += part
        n -= part
    return end_ns


cdef inline void timing_occupy(timing_t *t, uint32_t pu, uint64_t length_ns, uint64_t ready_ns) noexcept nogil:
    """The PU is busy for *length_ns*, in the order of its programs and erases, and not before *ready_ns*."""
    cdef pu_time_t *p = &t.pus[pu]
    cdef uint64_t earliest_ns = max(timing_earliest(t, ready_ns), p.programs_until_ns)
    timeline_forget(&p.line, t.now_ns)
    p.programs_until_ns = timeline_reserve(&p.line, earliest_ns, length_ns) + length_ns


cdef inline void timing_delay(timing_t *t, uint32_t pu, uint64_t slow_ns, uint64_t hang_ns) noexcept nogil:
    """The PU stands still for *hang_ns* before its next operation, and is busy for *slow_ns* with nothing useful."""
    timing_occupy(t, pu, slow_ns + hang_ns, 0)
    timing_wait(t, t.pus[pu].programs_until_ns)


cdef inline uint64_t timing_rewrite_ns(const timing_t *t, uint32_t sectors) noexcept nogil:
    """How long a PU takes to read, erase and program again the first *sectors* of a chunk, without its channel."""
    cdef uint64_t length_ns = t.erase_ns
    cdef uint32_t row
    for row in range((sectors + t.row_sectors - 1) // t.row_sectors):
        length_ns += t.sense_ns[t.kind_of_row[row]] + t.program_ns[t.kind_of_row[row]]
    return length_ns


cdef inline uint64_t timing_erase(timing_t *t, uint32_t pu, uint64_t ready_ns) noexcept nogil:
    cdef pu_time_t *p = &t.pus[pu]
    timing_occupy(t, pu, t.erase_ns, ready_ns)
    t.erases += 1
    t.erase_busy_ns += t.erase_ns
    return p.programs_until_ns


# --- the write buffer ---------------------------------------------------------------------------------------------

cdef inline void held_up(held_t *heap, uint32_t i) noexcept nogil:
    cdef held_t item = heap[i]
    while i > 0 and item.program.end_ns < heap[(i - 1) >> 1].program.end_ns:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = item


cdef inline void held_down(held_t *heap, uint32_t n) noexcept nogil:
    cdef held_t item = heap[0]
    cdef uint32_t i = 0, child = 1
    while child < n:
        if child + 1 < n and heap[child + 1].program.end_ns < heap[child].program.end_ns:
            child += 1
        if heap[child].program.end_ns >= item.program.end_ns:
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = item


cdef inline uint64_t buffer_next(timing_t *t) noexcept nogil:
    """When the buffer gives its next place back, after what has interrupted programs meanwhile. It holds something."""
    cdef uint64_t end_ns
    while True:
        end_ns = timing_revised(t, &t.held[0].program)
        if end_ns == t.held[0].program.end_ns:
            return end_ns
        t.held[0].program = timing_told(t, t.held[0].program.pu, end_ns)
        held_down(t.held, t.held_len)


cdef inline uint64_t buffer_release(timing_t *t) noexcept nogil:
    """Take out what leaves the buffer first. Returns when that is."""
    cdef uint64_t at_ns = buffer_next(t)
    t.buffered -= t.held[0].sectors
    t.held_len -= 1
    if t.held_len:
        t.held[0] = t.held[t.held_len]
        held_down(t.held, t.held_len)
    return at_ns


cdef inline uint64_t timing_admit(timing_t *t) noexcept nogil:
    """A user sector arrives. Returns when it is in the buffer; waits, in order, while there is no place."""
    cdef uint64_t at_ns = max(t.now_ns + t.controller_ns, t.admitted_ns), free_ns
    if t.buffer_sectors == 0:
        return t.now_ns + t.controller_ns
    t.buffered += 1
    while t.held_len:
        free_ns = buffer_next(t)
        if t.buffered <= t.buffer_sectors and free_ns > t.now_ns:
            break
        if t.buffered > t.buffer_sectors and free_ns > at_ns:
            t.buffer_waits += 1
            at_ns = free_ns
        buffer_release(t)
    t.admitted_ns = at_ns
    timing_wait(t, at_ns + t.buffer_ns)
    return at_ns + t.buffer_ns


cdef inline void timing_hold(timing_t *t, const wait_t *program, uint32_t sectors) noexcept nogil:
    """User sectors that were admitted are in the array when *program* has ended."""
    if sectors == 0:
        return
    if t.buffer_sectors == 0:
        timing_wait_for(t, program)
        return
    # There is room: the buffer cannot hold more groups than sectors, and the heap has a place for each.
    if t.held_len == t.held_cap:
        buffer_release(t)
    t.held[t.held_len].program = program[0]
    t.held[t.held_len].sectors = sectors
    t.held_len += 1
    held_up(t.held, t.held_len - 1)
