# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of what real flash adds to the rules: time.

``Timing`` is the state of ``native/timing.pxd``. A Media without one completes everything at once. Not thread-safe by
itself: while a Reactor runs, use it inside ``reactor.paused()``.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ocssd_daemon._fast cimport Media
from ocssd_daemon.native.sys cimport now_ns
from ocssd_daemon.native.timing cimport (
    held_t, pu_time_t, timeline_cut_in, timeline_forget, timeline_reserve, timeline_t,
    timing_begin, timing_erase, timing_program, timing_sense, timing_t,
)


cdef uint64_t monotonic_ns() noexcept nogil:
    return now_ns()


cdef class Timing:
    """Timelines of *geometry*'s PUs and channels with the numbers of *latency* (``nand.latency.resolve``)."""

    def __cinit__(self, geometry, latency):
        cdef timing_t *t = &self.t
        memset(t, 0, sizeof(timing_t))
        t.pus_per_channel = geometry.pus
        self.total_pus = geometry.total_pus
        t.pus = <pu_time_t *>calloc(geometry.total_pus, sizeof(pu_time_t))
        t.channels = <timeline_t *>calloc(geometry.groups, sizeof(timeline_t))
        t.held_cap = (latency.buffer_sectors or 0) + 2 * geometry.ws_opt + 16
        t.held = <held_t *>calloc(t.held_cap, sizeof(held_t))
        if t.pus == NULL or t.channels == NULL or t.held == NULL:
            raise MemoryError
        self.latency = latency
        self._copy_numbers()

    def __dealloc__(self):
        free(self.t.pus)
        free(self.t.channels)
        free(self.t.held)

    cdef _copy_numbers(self):
        cdef timing_t *t = &self.t
        cdef uint32_t kind
        latency = self.latency
        t.kinds = max(len(latency.sense_ns), len(latency.program_ns))
        for kind in range(t.kinds):
            t.sense_ns[kind] = latency.sense_ns[min(kind, len(latency.sense_ns) - 1)]
            t.program_ns[kind] = latency.program_ns[min(kind, len(latency.program_ns) - 1)]
        t.erase_ns = latency.erase_ns
        t.transfer_ns_per_sector = latency.transfer_ns_per_sector
        t.controller_ns = latency.controller_ns
        t.buffer_ns = latency.buffer_ns
        t.buffer_sectors = latency.buffer_sectors or 0
        t.row_sectors = (latency.page_sectors or 1) * (latency.planes or 1)
        t.suspend = latency.suspend
        t.suspend_ns = latency.suspend_ns

    def stats(self):
        """Operations and busy time since the start, and how full the write buffer is."""
        return {
            "senses": self.t.senses,
            "programs": self.t.programs,
            "erases": self.t.erases,
            "sense_busy_ns": self.t.sense_busy_ns,
            "program_busy_ns": self.t.program_busy_ns,
            "erase_busy_ns": self.t.erase_busy_ns,
            "channel_busy_ns": self.t.channel_busy_ns,
            "suspensions": self.t.suspensions,
            "buffer_waits": self.t.buffer_waits,
            "buffered_sectors": self.t.buffered,
        }

    # -- single operations, for tests and for models above

    def begin(self, uint64_t now):
        """A command arrives at *now*."""
        timing_begin(&self.t, now)

    def sense(self, uint32_t pu, uint32_t chunk, uint32_t sector, uint64_t ready_ns=0, uint64_t extra_ns=0,
              bint background=False):
        self._check(pu)
        return timing_sense(&self.t, pu, chunk, sector, ready_ns, extra_ns, background)

    def program(self, uint32_t pu, uint32_t sector, uint32_t n, uint64_t ready_ns=0):
        self._check(pu)
        return timing_program(&self.t, pu, sector, n, ready_ns)

    def erase(self, uint32_t pu, uint64_t ready_ns=0):
        self._check(pu)
        return timing_erase(&self.t, pu, ready_ns)

    def _check(self, uint32_t pu):
        if pu >= self.total_pus:
            raise ValueError(f"pu {pu}: there are {self.total_pus}")

    def busy(self, uint32_t pu):
        """What is still known of the PU's busy slots: a list of (start, end)."""
        self._check(pu)
        return slots_of(&self.t.pus[pu].line)

    def channel_busy(self, uint32_t channel):
        self._check(channel * self.t.pus_per_channel)
        return slots_of(&self.t.channels[channel])


cdef list slots_of(const timeline_t *line):
    return [(line.slots[i].start_ns, line.slots[i].end_ns) for i in range(line.n)]


cdef class Timeline:
    """One resource's busy slots, for tests."""

    cdef timeline_t line

    def __cinit__(self):
        memset(&self.line, 0, sizeof(timeline_t))

    def forget(self, uint64_t now):
        timeline_forget(&self.line, now)

    def reserve(self, uint64_t earliest_ns, uint64_t length_ns):
        """Start of the first gap from *earliest_ns* on."""
        return timeline_reserve(&self.line, earliest_ns, length_ns)

    def cut_in(self, uint64_t start_ns, uint64_t length_ns):
        return bool(timeline_cut_in(&self.line, start_ns, length_ns))

    def slots(self):
        return slots_of(&self.line)

    @property
    def gaps_given_up(self):
        return self.line.gaps_given_up


def attach_timing(Media media, Timing timing, bint virtual=False):
    """Let *media* take *timing* (None: no latency). *virtual*: the clock is what the caller of each command says."""
    if timing is None:
        media.m.timing = NULL
        media.attached.pop("timing", None)
        return
    if virtual:
        media.m.clock = NULL
    else:
        media.m.clock = monotonic_ns
    media.m.timing = &timing.t
    media.attached["timing"] = timing
