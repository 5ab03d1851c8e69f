# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The facade of what real flash adds to the rules: time, misfortune, age.

Each class is the state of one header of ``native/``. A Media without them completes everything at once, never fails and
never ages. Not thread-safe by themselves: while a Reactor runs, use them inside ``reactor.paused()``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

import numpy as np

from ocssd_daemon._fast cimport Media
from ocssd_daemon.native.faults cimport RULES_MAX, faults_t, rule_t
from ocssd_daemon.native.media cimport media_age_ns
from ocssd_daemon.native.sys cimport now_ns
from ocssd_daemon.native.timing cimport (
    NO_PU, held_t, pu_time_t, timeline_cut_in, timeline_forget, timeline_reserve, timeline_t,
    timing_begin, timing_erase, timing_program, timing_revised, timing_sense, timing_t, timing_told, wait_t,
)
from ocssd_daemon.native.wear cimport NOTICES, wear_error_mean, wear_read, wear_t


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
        t.flushed.pu = t.last.pu = NO_PU
        self.latency = latency
        self._copy_numbers()
        self.kinds = np.array(latency.kinds_of_rows(geometry.sectors), np.uint8)
        t.kind_of_row = <const uint8_t *><size_t>self.kinds.ctypes.data

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
        self._check(pu, sector, 1)
        return timing_sense(&self.t, pu, chunk, sector, ready_ns, extra_ns, background)

    def program(self, uint32_t pu, uint32_t sector, uint32_t n, uint64_t ready_ns=0):
        self._check(pu, sector, n)
        return timing_program(&self.t, pu, sector, n, ready_ns)

    def erase(self, uint32_t pu, uint64_t ready_ns=0):
        self._check(pu)
        return timing_erase(&self.t, pu, ready_ns)

    def revised(self, uint32_t pu, uint64_t end_ns, uint64_t shifted_ns):
        """When a program or erase of *pu* really ends that was told to end at *end_ns*, when ``shifted_ns`` was that."""
        self._check(pu)
        cdef wait_t w = timing_told(&self.t, pu, end_ns)
        w.shifted_ns = shifted_ns
        return timing_revised(&self.t, &w)

    def shifted_ns(self, uint32_t pu):
        """How far interruptions have moved things back on *pu*, all together."""
        self._check(pu)
        return self.t.pus[pu].shifted_ns

    def _check(self, uint32_t pu, uint64_t sector=0, uint64_t n=0):
        if pu >= self.total_pus:
            raise ValueError(f"pu {pu}: there are {self.total_pus}")
        if sector + n > len(self.kinds) * self.t.row_sectors:
            raise ValueError(f"sectors {sector} to {sector + n}: a chunk has {len(self.kinds) * self.t.row_sectors}")

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
        """By how much everything behind moved; 0 when nothing was in the way."""
        return timeline_cut_in(&self.line, start_ns, length_ns)

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


cdef class Faults:
    """The rules of misfortune (``native/faults.pxd``) of one *geometry*, in order. Rules are ``nand.faults.Rule``."""

    def __cinit__(self, geometry, uint64_t seed=0):
        memset(&self.f, 0, sizeof(faults_t))
        self.f.pus = geometry.pus
        self.f.chunks = geometry.chunks
        self.f.rng = (seed * 2 + 1) * 0x9e3779b97f4a7c15u | 1
        self.texts = {}
        self.triggers = {}
        self.last_id = 0

    def __dealloc__(self):
        free(self.f.rules)

    cdef rule_t *_place(self) except NULL:
        """Room for one more rule at the end."""
        cdef rule_t *grown
        if self.f.n == RULES_MAX:
            raise ValueError(f"at most {RULES_MAX} fault rules")
        if self.f.n & (self.f.n - 1) == 0:      # full at powers of two
            grown = <rule_t *>realloc(self.f.rules, max(1, 2 * self.f.n) * sizeof(rule_t))
            if grown == NULL:
                raise MemoryError
            self.f.rules = grown
        return &self.f.rules[self.f.n]

    def add(self, rule):
        """Append a rule. Returns its id. Raises ValueError when there are too many."""
        cdef rule_t *r = self._place()
        cdef bytes path = rule.trigger.encode()
        memset(r, 0, sizeof(rule_t))
        r.operations, r.action, r.amount = rule.operations, rule.action, rule.amount
        r.group.first, r.group.last = rule.group
        r.pu.first, r.pu.last = rule.pu
        r.chunk.first, r.chunk.last = rule.chunk
        r.sector.first, r.sector.last = rule.sector
        r.chance_of_2_32 = <uint64_t>(rule.chance * 4294967296.0)
        r.every, r.after, r.times = rule.every, rule.after, rule.times
        self.last_id += 1
        if path:
            self.triggers[self.last_id] = path      # keeps the bytes
            r.trigger = path
        r.id = self.last_id
        self.texts[r.id] = rule.text
        self.f.n += 1
        return r.id

    def remove(self, uint32_t rule_id):
        """Take a rule out. Raises KeyError when there is none of that id."""
        cdef uint32_t i, j
        del self.texts[rule_id]
        self.triggers.pop(rule_id, None)
        for i in range(self.f.n):
            if self.f.rules[i].id == rule_id:
                for j in range(i, self.f.n - 1):
                    self.f.rules[j] = self.f.rules[j + 1]
                self.f.n -= 1
                return

    def list(self):
        """Rules in order: id, rule, seen (times its place and operation came up), hits."""
        return [
            {
                "id": self.f.rules[i].id,
                "rule": self.texts[self.f.rules[i].id],
                "seen": self.f.rules[i].seen,
                "hits": self.f.rules[i].hits,
            }
            for i in range(self.f.n)
        ]


def attach_faults(Media media, Faults faults):
    """Let *media* meet *faults* (None: none)."""
    media.m.faults = NULL if faults is None else &faults.f
    media.attached["faults"] = faults


cdef class Wear:
    """How the flash of *geometry* ages (``native/wear.pxd``), with the numbers of *model* (``nand.wear.Model``)."""

    def __cinit__(self, geometry, model, uint64_t retry_ns=0, uint64_t seed=0):
        cdef wear_t *w = &self.w
        memset(w, 0, sizeof(wear_t))
        self.noted = np.zeros(geometry.total_chunks, np.uint8)
        w.noted = <uint8_t *><size_t>self.noted.ctypes.data
        w.fail_at_limit, w.rber, w.cycles_factor = model.fail_at_limit, model.rber, model.cycles_factor
        w.retention_factor, w.disturb = model.retention_factor, model.disturb
        w.retry_gain, w.notice_share = model.retry_gain, model.notice_share
        w.sector_bits = 8.0 * geometry.sector_bytes
        w.pe_limit, w.ecc_bits, w.retries = model.pe_limit, model.ecc_bits, model.retries
        w.wear_delta = model.wear_delta
        w.refresh = model.refresh
        w.retry_ns = retry_ns
        w.rng = (seed * 2 + 1) * 0x9e3779b97f4a7c15u | 1

    def stats(self):
        return {
            "bits_corrected": self.w.bits_corrected,
            "retried_reads": self.w.retried_reads,
            "high_ecc_reads": self.w.high_ecc_reads,
            "very_high_ecc_reads": self.w.very_high_ecc_reads,
            "uncorrectable_reads": self.w.uncorrectable_reads,
            "program_failures": self.w.program_failures,
            "erase_failures": self.w.erase_failures,
            "chunks_refreshed": self.w.chunks_refreshed,
            "notices": self.w.noticed,
        }

    def error_mean(self, uint32_t cycles, uint32_t limit=0, uint32_t reads=0, double days=0):
        """Expected raw bit errors of one sector."""
        return wear_error_mean(&self.w, cycles, limit, reads, days)

    def read(self, double mean):
        """One read with *mean* expected errors: (outcome, retry levels). 0 good, 1 high ECC effort, 2 very high, 3 uncorrectable."""
        return wear_read(&self.w, mean), self.w.levels

    def notices(self, uint64_t since=0):
        """What was noted after number *since*, as far as it is kept: (count, chunk, sector, state bits)."""
        first = max(since, self.w.noticed - NOTICES if self.w.noticed > NOTICES else 0)
        return [
            (
                self.w.notices[i % NOTICES].count,
                self.w.notices[i % NOTICES].chunk,
                self.w.notices[i % NOTICES].sector,
                self.w.notices[i % NOTICES].state,
            )
            for i in range(first, self.w.noticed)
        ]


def attach_wear(Media media, Wear wear, uint64_t age_ns=0, bint virtual=False):
    """Let the flash of *media* age (None: not); the drive is *age_ns* old now."""
    media.m.age_ns = age_ns
    if wear is None:
        media.m.wear = NULL
        media.attached.pop("wear", None)
    else:
        media.m.wear = &wear.w
        media.attached["wear"] = wear
    if virtual:
        media.m.clock = NULL
        media.m.born_ns = media.m.now_ns
    else:
        media.m.clock = monotonic_ns
        media.m.now_ns = media.m.born_ns = now_ns()


def age_of(Media media):
    """How old the drive is, in ns, as of its last command or now."""
    if media.m.clock != NULL:
        media.m.now_ns = media.m.clock()
    return media_age_ns(&media.m)
