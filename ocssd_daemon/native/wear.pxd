"""Owns how flash ages: failing programs and erases, raw bit errors, ECC, read retries, and what is noted of it.

With x = P/E cycles / limit of the chunk (1 when it has no limit set and the model's own is reached):

    program, erase failure    fail_at_limit * x^4
    raw bit error rate        rber * (1 + cycles_factor * x^2) * (1 + retention_factor * x * days) + disturb * reads
    errors of one read        Poisson of rate * bits; each retry level multiplies the rate by retry_gain and costs a sense

At most ecc_bits per sector are corrected. Above the notice share of that, a read counts as one with high ECC effort; one
that needed retries, with very high effort. A chunk that deserves attention is noted, each state once per erase, for the
notification log and for the FTL.

Knows no media: it is handed the numbers of a chunk. Times are ns, rates are per bit.
"""

from libc.math cimport exp, log, sqrt
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.faults cimport fault_random

cdef enum:                      # outcome of a read
    READ_GOOD = 0
    READ_HIGH_ECC = 1
    READ_VERY_HIGH_ECC = 2      # not without retries
    READ_UNCORRECTABLE = 3

cdef enum:                      # notice_t.state: the bits of the chunk notification log (OCSSD 2.0, 5.8)
    NOTICE_LOW_ERRORS = 1
    NOTICE_MEDIUM_ERRORS = 2
    NOTICE_HIGH_ERRORS = 4
    NOTICE_UNRECOVERABLE = 8
    NOTICE_REFRESHED = 16
    NOTICE_WEAR = 256

cdef enum:
    NOTICES = 256               # the newest are kept
    SKETCH = 40                 # above this mean, Poisson is near enough to normal

ctypedef struct notice_t:
    uint64_t count              # from 1
    uint32_t chunk
    uint32_t sector
    uint16_t state

ctypedef struct wear_t:
    double fail_at_limit
    double rber
    double cycles_factor
    double retention_factor     # per day
    double disturb              # per read of the chunk since its erase
    double retry_gain
    double notice_share         # of ecc_bits
    double sector_bits
    uint32_t pe_limit           # for chunks that have none of their own
    uint32_t ecc_bits           # 0: no bit errors
    uint32_t retries
    uint32_t refresh            # 1: the device itself rewrites a chunk of raw flash that is hard to read
    uint32_t wear_delta         # wear-level index that is noted; 0: never
    uint64_t retry_ns
    uint64_t rng
    uint8_t *noted              # [total_chunks] what was noted since the erase
    notice_t notices[NOTICES]
    uint64_t noticed            # of them, so far
    uint64_t taken              # by the FTL
    # of the last read
    uint64_t extra_ns
    uint32_t levels
    # counters
    uint64_t bits_corrected
    uint64_t retried_reads
    uint64_t high_ecc_reads     # very high ones too
    uint64_t very_high_ecc_reads
    uint64_t uncorrectable_reads
    uint64_t program_failures
    uint64_t erase_failures
    uint64_t chunks_refreshed   # by the device itself


cdef inline double wear_uniform(wear_t *w) noexcept nogil:
    """In (0, 1]."""
    return (<double>(fault_random(&w.rng) >> 11) + 1) * 1.1102230246251565e-16


cdef inline double wear_share(const wear_t *w, uint32_t cycles, uint32_t limit) noexcept nogil:
    cdef uint32_t most = limit if limit else w.pe_limit
    return <double>cycles / most if most else 0.0


cdef inline bint wear_fails(wear_t *w, uint32_t cycles, uint32_t limit) noexcept nogil:
    """Does a program or an erase fail from wear?"""
    cdef double x
    if w.fail_at_limit == 0:
        return False
    x = wear_share(w, cycles, limit)
    return wear_uniform(w) < w.fail_at_limit * x * x * x * x


cdef inline double wear_error_mean(const wear_t *w, uint32_t cycles, uint32_t limit, uint32_t reads, double days) noexcept nogil:
    """Expected raw bit errors of one sector."""
    cdef double x = wear_share(w, cycles, limit)
    cdef double rate = w.rber * (1 + w.cycles_factor * x * x) * (1 + w.retention_factor * x * days)
    return (rate + w.disturb * reads) * w.sector_bits


cdef inline uint32_t wear_poisson(wear_t *w, double mean) noexcept nogil:
    cdef double product, floor_
    cdef uint32_t n = 0
    if mean > SKETCH:
        product = mean + sqrt(mean) * sqrt(-2 * log(wear_uniform(w))) * wear_cosine(wear_uniform(w))
        return <uint32_t>(product + 0.5) if product > 0 else 0
    floor_ = exp(-mean)
    product = wear_uniform(w)
    while product > floor_:
        product *= wear_uniform(w)
        n += 1
    return n


cdef extern from "math.h" nogil:
    double cos(double)

cdef inline double wear_cosine(double turn) noexcept nogil:
    return cos(6.283185307179586 * turn)


cdef inline int wear_read(wear_t *w, double mean) noexcept nogil:
    """One read with *mean* expected errors: retry until ECC can correct. Sets ``extra_ns`` and ``levels``."""
    cdef uint32_t errors = wear_poisson(w, mean)
    w.levels = 0
    while errors > w.ecc_bits and w.levels < w.retries:
        w.levels += 1
        mean *= w.retry_gain
        errors = wear_poisson(w, mean)
    w.extra_ns = w.levels * w.retry_ns
    w.retried_reads += w.levels > 0
    if errors > w.ecc_bits:
        w.uncorrectable_reads += 1
        return READ_UNCORRECTABLE
    w.bits_corrected += errors
    if w.levels:
        w.high_ecc_reads += 1
        w.very_high_ecc_reads += 1
        return READ_VERY_HIGH_ECC
    if errors > w.notice_share * w.ecc_bits:
        w.high_ecc_reads += 1
        return READ_HIGH_ECC
    return READ_GOOD


cdef inline void wear_note(wear_t *w, uint32_t chunk, uint32_t sector, uint16_t state) noexcept nogil:
    """Note *state* of a chunk, once until its next erase."""
    cdef notice_t *notice
    cdef uint8_t bit = 0x80 if state == NOTICE_WEAR else <uint8_t>state
    if w.noted[chunk] & bit:
        return
    w.noted[chunk] |= bit
    notice = &w.notices[w.noticed % NOTICES]
    w.noticed += 1
    notice.count = w.noticed
    notice.chunk = chunk
    notice.sector = sector
    notice.state = state
