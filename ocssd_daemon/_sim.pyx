# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""Virtual time: a host of queue depth N in front of the same disk, flash and FTL that the daemon serves.

The host keeps N requests in flight. It issues the next one when the first of them ends, so simulated time never runs
backwards; a trace also waits for the time at which the request was recorded. Nothing moves data, and everything is
decided by the seed. Times are nanoseconds from the start of the simulation, sizes are sectors.
"""

from libc.math cimport exp, fabs, floor, log
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from math import gcd

import numpy as np

from ocssd_daemon._fast cimport Disk
from ocssd_daemon.native.disk cimport disk_harden, disk_t
from ocssd_daemon.native.ftl cimport NO_PPA, ftl_sense, ftl_t, ftl_trim, may_be_lost
from ocssd_daemon.native.gc cimport ftl_commit, ftl_read_fails, ftl_slot
from ocssd_daemon.native.media cimport media_begin, media_done_ns
from ocssd_daemon.native.timing cimport NO_PU, timing_revised, wait_t

cdef enum:
    OP_READ = 0
    OP_WRITE = 1
    OP_TRIM = 2
    OP_FLUSH = 3
    NOT_RECORDED = 4

cdef enum:
    PATTERN_UNIFORM = 0
    PATTERN_SEQUENTIAL = 1
    PATTERN_ZIPF = 2
    PATTERN_HOTCOLD = 3

cdef enum:
    HISTOGRAM_BITS = 8          # 256 steps per power of two: a percentile is within 0.2 %
    HISTOGRAM_LEN = (64 - HISTOGRAM_BITS + 1) << HISTOGRAM_BITS

OPS = {"read": OP_READ, "write": OP_WRITE, "trim": OP_TRIM, "flush": OP_FLUSH}
PATTERNS = {
    "uniform": PATTERN_UNIFORM,
    "sequential": PATTERN_SEQUENTIAL,
    "zipf": PATTERN_ZIPF,
    "hotcold": PATTERN_HOTCOLD,
}

cdef extern from *:
    """
    static inline int ocssd_log2(uint64_t v) { return 63 - __builtin_clzll(v); }
    """
    int log2_floor "ocssd_log2" (uint64_t v) noexcept nogil


# --- what to do next ----------------------------------------------------------------------------------------------

ctypedef struct workload_t:
    uint32_t pattern
    uint32_t span               # logical sectors [0, span)
    uint64_t reads_of_2_32      # share of reads
    uint32_t following          # sequential
    uint32_t hot                # hot/cold: the first so many sectors ...
    uint64_t hot_of_2_32        # ... get this share
    double skew                 # zipf
    double h_first
    double h_last
    double squeeze
    uint32_t scatter            # zipf: rank to address, coprime to span
    uint64_t rng


cdef inline uint64_t draw(workload_t *w) noexcept nogil:
    """xorshift64*"""
    w.rng ^= w.rng >> 12
    w.rng ^= w.rng << 25
    w.rng ^= w.rng >> 27
    return w.rng * 0x2545f4914f6cdd1dull


cdef inline uint32_t draw_below(workload_t *w, uint32_t n) noexcept nogil:
    return <uint32_t>(((draw(w) >> 32) * n) >> 32)


# Rejection-inversion (Hoermann and Derflinger 1996): Zipf ranks of any skew without a table.

cdef inline double zipf_integral(const workload_t *w, double x) noexcept nogil:
    cdef double ln_x = log(x)
    cdef double e = (1 - w.skew) * ln_x
    return ln_x * (1 + e / 2 * (1 + e / 3)) if fabs(e) < 1e-8 else (exp(e) - 1) / (1 - w.skew)


cdef inline double zipf_inverse(const workload_t *w, double x) noexcept nogil:
    cdef double e = x * (1 - w.skew)
    return exp(x * (1 - e / 2 * (1 - 2 * e / 3))) if fabs(e) < 1e-8 else exp(log(1 + e) / (1 - w.skew))


cdef inline double zipf_weight(const workload_t *w, double x) noexcept nogil:
    return exp(-w.skew * log(x))


cdef inline uint32_t draw_zipf(workload_t *w) noexcept nogil:
    """A rank from 1 to span."""
    cdef double u, x, k
    while True:
        u = w.h_last + <double>(draw(w) >> 11) * 1.1102230246251565e-16 * (w.h_first - w.h_last)
        x = zipf_inverse(w, u)
        k = min(max(floor(x + 0.5), 1.0), <double>w.span)
        if k - x <= w.squeeze or u >= zipf_integral(w, k + 0.5) - zipf_weight(w, k):
            return <uint32_t>k


cdef inline uint32_t draw_hotcold(workload_t *w) noexcept nogil:
    if (draw(w) >> 32) < w.hot_of_2_32:
        return draw_below(w, w.hot)
    return w.hot + draw_below(w, w.span - w.hot)


cdef inline uint32_t draw_lba(workload_t *w) noexcept nogil:
    cdef uint32_t lba
    if w.pattern == PATTERN_UNIFORM:
        return draw_below(w, w.span)
    if w.pattern == PATTERN_ZIPF:
        return <uint32_t>((<uint64_t>(draw_zipf(w) - 1) * w.scatter) % w.span)
    if w.pattern == PATTERN_HOTCOLD:
        return draw_hotcold(w)
    lba = w.following
    w.following = lba + 1 if lba + 1 < w.span else 0
    return lba


cdef inline uint32_t draw_op(workload_t *w) noexcept nogil:
    if w.reads_of_2_32 == 0:
        return OP_WRITE
    return OP_READ if (draw(w) >> 32) < w.reads_of_2_32 else OP_WRITE


# --- the host -----------------------------------------------------------------------------------------------------

ctypedef struct flight_t:       # a request in flight
    uint64_t end_ns
    uint64_t from_ns            # its latency counts from here
    wait_t program              # what it is the end of: a later read may suspend that
    uint32_t op                 # NOT_RECORDED, or to be recorded when it has ended

ctypedef struct host_t:
    disk_t *disk
    flight_t *flights           # heap on end_ns
    uint32_t depth
    uint64_t now_ns
    uint64_t ios
    uint64_t read_errors
    uint64_t refused            # writes that found no space: the disk has become read-only
    uint64_t *histogram[2]      # by OP_READ, OP_WRITE; NULL: do not record
    uint64_t max_ns[2]
    uint64_t sum_ns[2]


cdef inline void flights_replace(flight_t *heap, uint32_t n, const flight_t *item) noexcept nogil:
    """Put *item* in the place of the first."""
    cdef uint32_t i = 0, child = 1
    cdef flight_t kept = item[0]
    while child < n:
        if child + 1 < n and heap[child + 1].end_ns < heap[child].end_ns:
            child += 1
        if heap[child].end_ns >= kept.end_ns:
            break
        heap[i] = heap[child]
        i = child
        child = 2 * i + 1
    heap[i] = kept


cdef inline uint64_t flight_ends(host_t *h) noexcept nogil:
    """When the first request in flight ends, after what has suspended programs meanwhile."""
    cdef flight_t first
    while h.flights[0].program.pu != <uint32_t>NO_PU:
        first = h.flights[0]
        first.end_ns = timing_revised(h.disk.ftl.media.timing, &first.program)
        if first.end_ns <= h.flights[0].end_ns:
            break
        flights_replace(h.flights, h.depth, &first)
    return h.flights[0].end_ns


cdef inline uint32_t histogram_index(uint64_t v) noexcept nogil:
    cdef int shift
    if v < (1 << HISTOGRAM_BITS):
        return <uint32_t>v
    shift = log2_floor(v) - HISTOGRAM_BITS
    return <uint32_t>(((shift + 1) << HISTOGRAM_BITS) + (v >> shift) - (1 << HISTOGRAM_BITS))


cdef inline bint host_write(host_t *h, uint32_t lba, uint32_t n) noexcept nogil:
    cdef ftl_t *f = h.disk.ftl
    cdef uint32_t i
    for i in range(lba, lba + n):
        if ftl_slot(f) == <uint32_t>NO_PPA:
            h.refused += 1
            return False
        ftl_commit(f, i)
    return True


cdef inline void host_read(host_t *h, uint32_t lba, uint32_t n) noexcept nogil:
    cdef ftl_t *f = h.disk.ftl
    cdef uint32_t i
    f.user_sectors_read += n
    for i in range(lba, lba + n):
        if may_be_lost(f) and ftl_read_fails(f, i):
            h.read_errors += 1
        if f.media.timing != NULL:
            ftl_sense(f, i)


cdef inline bint host_do(host_t *h, uint32_t op, uint32_t lba, uint32_t n) noexcept nogil:
    if op == OP_READ:
        host_read(h, lba, n)
    elif op == OP_WRITE:
        return host_write(h, lba, n)
    elif op == OP_TRIM:
        ftl_trim(h.disk.ftl, lba, n)
    else:
        disk_harden(h.disk)
    return True


cdef inline void host_record(host_t *h, uint32_t op, uint64_t latency_ns) noexcept nogil:
    if op > OP_WRITE or h.histogram[op] == NULL:
        return
    h.histogram[op][histogram_index(latency_ns)] += 1
    h.max_ns[op] = max(h.max_ns[op], latency_ns)
    h.sum_ns[op] += latency_ns


cdef inline void flight_landed(host_t *h, flight_t *f) noexcept nogil:
    if f.op != NOT_RECORDED:
        host_record(h, f.op, f.end_ns - f.from_ns)
        f.op = NOT_RECORDED


cdef inline bint host_issue(host_t *h, uint64_t arrival_ns, uint32_t op, uint32_t lba, uint32_t n) noexcept nogil:
    """One request, not before *arrival_ns* (0: at any time) and not before there is room in the queue.

    Returns 0 when it was refused.
    """
    cdef uint64_t issued_ns
    cdef flight_t item
    cdef bint done
    h.ios += 1
    if h.disk.ftl.media.timing == NULL:
        h.now_ns = max(h.now_ns, arrival_ns)
        return host_do(h, op, lba, n)
    issued_ns = max(max(arrival_ns, flight_ends(h)), h.now_ns)
    flight_landed(h, &h.flights[0])
    h.now_ns = issued_ns
    h.disk.ftl.media.now_ns = issued_ns
    media_begin(h.disk.ftl.media)
    done = host_do(h, op, lba, n)
    item.end_ns = max(issued_ns, media_done_ns(h.disk.ftl.media))
    item.from_ns = arrival_ns if arrival_ns else issued_ns
    item.program = h.disk.ftl.media.timing.last
    item.op = NOT_RECORDED
    if item.program.pu == <uint32_t>NO_PU:
        host_record(h, op, item.end_ns - item.from_ns)
    else:
        item.op = op
    flights_replace(h.flights, h.depth, &item)
    return done


cdef class Workload:
    """A built-in workload over the first *span* sectors. *reads*: share of reads, 0 to 1.

    *pattern*: uniform, sequential, zipf (*skew* > 0) or hotcold (the first *hot* of the sectors get *heat* of the I/O).
    """

    cdef workload_t w

    def __cinit__(self, str pattern, uint32_t span, double reads=0.0, double skew=1.0, double hot=0.2, double heat=0.8,
                  uint64_t seed=1):
        cdef workload_t *w = &self.w
        if span == 0:
            raise ValueError("span: at least one sector")
        memset(w, 0, sizeof(workload_t))
        w.pattern = PATTERNS[pattern]
        w.span = span
        w.reads_of_2_32 = <uint64_t>(reads * 4294967296.0)
        w.hot = max(1, min(span - 1, round(hot * span)))
        w.hot_of_2_32 = <uint64_t>(heat * 4294967296.0)
        w.rng = (seed * 2 + 1) * 0x9e3779b97f4a7c15u | 1
        if w.pattern == PATTERN_ZIPF:
            self._prepare_zipf(skew)

    cdef _prepare_zipf(self, double skew):
        cdef workload_t *w = &self.w
        w.skew = skew
        w.h_first = zipf_integral(w, 1.5) - 1
        w.h_last = zipf_integral(w, w.span + 0.5)
        w.squeeze = 2 - zipf_inverse(w, zipf_integral(w, 2.5) - zipf_weight(w, 2))
        w.scatter = 2654435761 % w.span or 1
        while gcd(w.scatter, w.span) != 1:
            w.scatter += 1

    def sample(self, uint32_t n):
        """The next *n* requests as (ops, lbas)."""
        cdef uint32_t i
        ops = np.empty(n, np.uint8)
        lbas = np.empty(n, np.uint32)
        cdef uint8_t[::1] o = ops
        cdef uint32_t[::1] a = lbas
        for i in range(n):
            o[i] = draw_op(&self.w)
            a[i] = draw_lba(&self.w)
        return ops, lbas


cdef class Host:
    """Keeps *depth* requests in flight on *disk*. The disk's media takes its time from here."""

    cdef host_t h
    cdef readonly Disk disk
    cdef object _histograms
    cdef uint64_t origin_ns

    def __cinit__(self, Disk disk, uint32_t depth=32):
        if depth == 0:
            raise ValueError("depth: at least 1")
        memset(&self.h, 0, sizeof(host_t))
        self.disk = disk
        self.h.disk = &disk.d
        self.h.depth = depth
        self.origin_ns = 1
        self.h.flights = <flight_t *>calloc(depth, sizeof(flight_t))
        if self.h.flights == NULL:
            raise MemoryError
        self._forget_flights()

    def __dealloc__(self):
        free(self.h.flights)

    cdef _forget_flights(self):
        """Requests in flight end when they end, and are not recorded."""
        cdef uint32_t i
        for i in range(self.h.depth):
            self.h.flights[i].op = NOT_RECORDED
            if self.h.flights[i].end_ns == 0:
                self.h.flights[i].program.pu = NO_PU

    cdef _land(self):
        """Record what is in flight, as if nothing came after it."""
        cdef uint32_t i
        cdef flight_t *f
        for i in range(self.h.depth):
            f = &self.h.flights[i]
            if f.op != NOT_RECORDED:
                f.end_ns = timing_revised(self.h.disk.ftl.media.timing, &f.program)
                flight_landed(&self.h, f)

    def record(self):
        """Start (again) to record latencies."""
        self.origin_ns = self.h.now_ns + 1
        self._forget_flights()
        self._histograms = [np.zeros(HISTOGRAM_LEN, np.uint64) for _ in range(2)]
        for op in range(2):
            self.h.histogram[op] = <uint64_t *><size_t>self._histograms[op].ctypes.data
            self.h.max_ns[op] = self.h.sum_ns[op] = 0

    def run(self, Workload workload, uint64_t ios):
        """Issue *ios* requests of the workload. Returns how many; fewer when the disk became read-only."""
        cdef uint64_t done = 0
        cdef uint32_t op
        cdef workload_t *w = &workload.w
        if w.span > self.h.disk.ftl.capacity_sectors:
            raise ValueError(f"workload of {w.span} sectors is larger than the disk")
        with nogil:
            while done < ios:
                op = draw_op(w)
                if not host_issue(&self.h, 0, op, draw_lba(w), 1):
                    break
                done += 1
        return done

    def replay(self, const uint64_t[::1] at_ns, const uint8_t[::1] ops, const uint32_t[::1] lbas,
               const uint32_t[::1] sectors,
               bint open_loop=True):
        """Issue the requests of a trace. Returns how many; fewer when the disk became read-only.

        *open_loop*: each no earlier than its time, counted from ``record``; otherwise as fast as the depth allows.
        """
        cdef Py_ssize_t i = 0, n = ops.shape[0]
        if n == 0:
            return 0
        if not (at_ns.shape[0] == lbas.shape[0] == sectors.shape[0] == n):
            raise ValueError("arrays of different lengths")
        ends = np.asarray(lbas, np.uint64) + np.asarray(sectors, np.uint64)
        if int(ends.max()) > self.h.disk.ftl.capacity_sectors:
            raise ValueError(f"a request is beyond {self.h.disk.ftl.capacity_sectors} sectors")
        with nogil:
            while i < n:
                if not host_issue(&self.h, self.origin_ns + at_ns[i] if open_loop else 0, ops[i], lbas[i], sectors[i]):
                    break
                i += 1
        return i

    @property
    def now_ns(self):
        """When the last request was issued."""
        return self.h.now_ns

    @property
    def read_errors(self):
        """Sectors that could not be read."""
        return self.h.read_errors

    @property
    def ios(self):
        return self.h.ios

    def latency(self, str op):
        """Recorded latencies of *op* (read, write): count, mean_ns, p50, p90, p99, p999, max in ns, or None."""
        self._land()
        counts = self._histograms[OPS[op]]
        total = int(counts.sum())
        if total == 0:
            return None
        used = np.flatnonzero(counts)
        values = np.array([middle_of(int(i)) for i in used])
        shares = np.cumsum(counts[used]) / total
        most = int(self.h.max_ns[OPS[op]])
        at = {
            name: min(most, int(values[min(np.searchsorted(shares, share), len(values) - 1)]))
            for name, share in SHARES.items()
        }
        return {"count": total, "mean": self.h.sum_ns[OPS[op]] / total, **at, "max": most}


SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def middle_of(int index):
    """The middle of what a histogram bucket counts."""
    if index < (1 << HISTOGRAM_BITS):
        return index
    shift = (index >> HISTOGRAM_BITS) - 1
    first = ((index & ((1 << HISTOGRAM_BITS) - 1)) + (1 << HISTOGRAM_BITS)) << shift
    return first + ((1 << shift) >> 1)
