"""Owns misfortune by rule: where, what and when something goes wrong on the flash.

A rule names operations, a box of places (group, PU, chunk, sector ranges), an action, and a condition: a probability, every
Nth time, after so many, at most so many times, while a file exists. Rules are asked in order; the first that strikes with
an action that ends the operation decides, delays of earlier ones add up. Randomness comes from a seed. Times are ns.

Knows nothing of media and FTL: ``media.pxd`` asks before each operation and does what the answer says.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "unistd.h" nogil:
    int access(const char *path, int mode)
    int F_OK

cdef enum:                      # rule_t.operations
    FAULT_READ = 1
    FAULT_WRITE = 2
    FAULT_RESET = 4

cdef enum:                      # rule_t.action
    FAULT_NONE = 0
    FAULT_FAIL = 1
    FAULT_OFFLINE = 2           # fail, and take the chunk offline
    FAULT_SLOW = 3              # amount: ns
    FAULT_HANG = 4              # amount: ns; the whole PU stands still
    FAULT_CORRUPT = 5           # amount: bits
    FAULT_TORN = 6              # the last sector of a write keeps only its first half
    FAULT_POWER_CUT = 7         # the process dies at once

cdef enum:
    RULES_MAX = 4096

ctypedef struct span_t:         # [first, last]
    uint32_t first
    uint32_t last

ctypedef struct rule_t:
    uint32_t id
    uint32_t operations
    uint32_t action
    uint64_t amount
    span_t group
    span_t pu
    span_t chunk
    span_t sector
    uint64_t chance_of_2_32     # 2^32: always
    uint64_t every              # 0, 1: each time
    uint64_t after              # let so many pass
    uint64_t times              # strike at most so often; 0: no limit
    uint64_t seen
    uint64_t hits
    const char *trigger         # a path: only while it exists; NULL: always

ctypedef struct faults_t:
    uint32_t pus                # per group
    uint32_t chunks             # per PU
    uint32_t n
    uint64_t rng
    uint64_t delay_ns           # of the operation that was asked for last
    uint64_t hang_ns
    rule_t *rules               # [n]


cdef inline bint in_span(const span_t *s, uint32_t value) noexcept nogil:
    return s.first <= value <= s.last


cdef inline uint64_t fault_random(uint64_t *state) noexcept nogil:
    """xorshift64*"""
    state[0] ^= state[0] >> 12
    state[0] ^= state[0] << 25
    state[0] ^= state[0] >> 27
    return state[0] * 0x2545f4914f6cdd1dull


cdef inline bint rule_covers(const faults_t *f, const rule_t *r, uint32_t operation, uint32_t chunk, uint32_t sector,
                             uint32_t n) noexcept nogil:
    cdef uint32_t pu = chunk // f.chunks
    return (r.operations & operation
            and in_span(&r.group, pu // f.pus) and in_span(&r.pu, pu % f.pus) and in_span(&r.chunk, chunk % f.chunks)
            and sector <= r.sector.last and sector + n > r.sector.first)


cdef inline bint rule_strikes(faults_t *f, rule_t *r) noexcept nogil:
    """Is it the rule's turn? Counts this time."""
    if r.trigger != NULL and access(r.trigger, F_OK) != 0:
        return False
    r.seen += 1
    if r.seen <= r.after or (r.times and r.hits >= r.times):
        return False
    if r.every > 1 and (r.seen - r.after) % r.every:
        return False
    if (fault_random(&f.rng) >> 32) >= r.chance_of_2_32:
        return False
    r.hits += 1
    return True


cdef inline rule_t *faults_ask(faults_t *f, uint32_t operation, uint32_t chunk, uint32_t sector, uint32_t n) noexcept nogil:
    """The rule that decides the operation, or NULL; ``delay_ns`` and ``hang_ns`` say how much longer it takes."""
    cdef uint32_t i
    cdef rule_t *r
    f.delay_ns = f.hang_ns = 0
    for i in range(f.n):
        r = &f.rules[i]
        if not rule_covers(f, r, operation, chunk, sector, n) or not rule_strikes(f, r):
            continue
        if r.action == FAULT_SLOW:
            f.delay_ns += r.amount
        elif r.action == FAULT_HANG:
            f.hang_ns += r.amount
        else:
            return r
    return NULL
