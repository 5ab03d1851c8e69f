# cython: cdivision=True
"""Owns the loop that moves all data: poll the sources, sleep when idle, post completions when they are due.

One loop, one writer: every flash and FTL structure is touched only while ``reactor_t.lock`` is held. The loop holds it
for one turn at a time (well below 1 ms) and lets a waiting control-plane thread go first, so that configuration and
statistics never wait behind traffic. Times are CLOCK_MONOTONIC nanoseconds.

A deadline that is the end of a program or an erase moves when a later read suspends that (``timing.pxd``): it is asked
again when it is due.

The reactor knows no protocol: a transport embeds ``source_t`` as the first member of its own struct.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from ocssd_daemon.native.sys cimport cpu_relax, eventfd_drain, eventfd_signal, full_fence, now_ns

from ocssd_daemon.native.timing cimport NO_PU, timing_revised, timing_t, wait_t

cdef extern from "errno.h" nogil:
    int errno
    int ENOMEM

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    int close(int)

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int, int)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        void *ptr
        int fd
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_MOD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT

cdef extern from *:
    """
    #include <time.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include <sys/epoll.h>
    /* epoll_pwait2 has nanosecond timeouts (Linux 5.11); older kernels get the millisecond rounded down, and the
       loop spins the rest, so a deadline is never met late because of the rounding. */
    static inline int ocssd_epoll_wait_ns(int epfd, struct epoll_event *ev, int n, int64_t ns) {
    #ifdef SYS_epoll_pwait2
        static int have_pwait2 = 1;
        if (have_pwait2 && ns > 0) {
            struct timespec t = { ns / 1000000000, ns % 1000000000 };
            long r = syscall(SYS_epoll_pwait2, epfd, ev, n, &t, (void *)0, 8);
            if (r >= 0 || errno != ENOSYS) return (int)r;
            have_pwait2 = 0;
        }
    #endif
        return epoll_wait(epfd, ev, n, ns < 0 ? -1 : (int)(ns / 1000000));
    }
    static inline uint32_t ocssd_atomic_add_u32(uint32_t *p, int v) { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
    static inline uint32_t ocssd_atomic_get_u32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    """
    int epoll_wait_ns "ocssd_epoll_wait_ns" (int epfd, epoll_event *ev, int n, long long ns) noexcept nogil
    uint32_t atomic_add_u32 "ocssd_atomic_add_u32" (uint32_t *p, int v) noexcept nogil
    uint32_t atomic_get_u32 "ocssd_atomic_get_u32" (const uint32_t *p) noexcept nogil


cdef enum:
    REACTOR_EVENTS = 1024       # reports that may wait for trio; when full, the newest is dropped and counted
    REACTOR_FDS = 64            # epoll events taken per turn
    REACTOR_BUDGET = 64         # requests a source may serve per turn, so that sources share the loop fairly


ctypedef struct source_t:
    int (*poll)(source_t *self, int budget) noexcept nogil
    int (*arm)(source_t *self) noexcept nogil
    void (*disarm)(source_t *self) noexcept nogil
    void (*ready)(source_t *self, int fd, uint32_t events) noexcept nogil
    void (*complete)(source_t *self, uint64_t a, uint64_t b) noexcept nogil
    uint64_t token
    uint8_t memory_polled       # 1: poll each turn (rings in shared memory); 0: poll after ready() or while `more`
    uint8_t more
    uint8_t attached
    uint8_t bulk                # its last work was so much that the next takes longer to come than waking up
    source_t *next

ctypedef struct watch_t:
    source_t *source
    int fd

ctypedef struct deferred_t:
    uint64_t deadline_ns
    uint64_t order              # ties complete in the order in which they were deferred
    source_t *source
    uint64_t a
    uint64_t b
    wait_t program              # what the deadline is the end of

ctypedef struct report_t:
    uint64_t token
    int code

ctypedef struct reactor_t:
    pthread_mutex_t lock
    uint32_t waiters            # control-plane threads that want the lock
    uint32_t stop
    int epfd
    int wake_fd                 # eventfd: leave the sleep
    int event_fd                # eventfd: reports are waiting for trio
    source_t *sources
    uint32_t fd_sources         # sources that are not memory-polled
    watch_t **watches           # indexed by fd
    int watches_len
    deferred_t *heap
    uint32_t heap_len
    uint32_t heap_cap
    uint64_t deferred_order
    timing_t **timing           # of the flash that is served; NULL, also behind it: deadlines do not move
    report_t reports[REACTOR_EVENTS]
    uint32_t reports_head
    uint32_t reports_tail
    uint64_t poll_max_ns        # longest time to poll before sleeping (setting reactor.poll_us)
    uint64_t poll_ns            # the adaptive value in force
    uint32_t fruitless          # times in a row that polling caught nothing
    uint32_t short_sleeps       # in a row
    uint32_t patience           # short sleeps until it polls for the full time again
    uint64_t early_ns           # how long before a deadline a sleep ends: as long as waking up takes here
    uint8_t sleeping
    uint8_t bulk                # that of the last source which had work: then nothing is gained by polling
    uint64_t turns
    uint64_t sleeps
    uint64_t wakeups_by_fd
    uint64_t reports_dropped
    uint64_t late_count
    uint64_t late_max_ns
    uint64_t late_hist[256]     # of lateness in ns: four steps per power of two


# --- life ---------------------------------------------------------------------------------------------------------

cdef inline int reactor_init(reactor_t *r, uint64_t poll_max_ns) noexcept nogil:
    """Open the loop's fds. Returns 0 or an errno; on failure nothing is left open."""
    memset(r, 0, sizeof(reactor_t))
    r.poll_max_ns = poll_max_ns
    r.poll_ns = poll_max_ns
    r.patience = 1
    r.early_ns = SLEEP_SLACK_NS
    pthread_mutex_init(&r.lock, NULL)
    r.epfd = epoll_create1(EPOLL_CLOEXEC)
    r.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    r.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    cdef int failed = errno
    if r.epfd < 0 or r.wake_fd < 0 or r.event_fd < 0:
        reactor_close(r)
        return failed
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.u64 = <uint64_t>-1
    if epoll_ctl(r.epfd, EPOLL_CTL_ADD, r.wake_fd, &event) < 0:
        failed = errno
        reactor_close(r)
        return failed
    return 0


cdef inline void reactor_close(reactor_t *r) noexcept nogil:
    cdef int fd
    if r.epfd >= 0:
        close(r.epfd)
    if r.wake_fd >= 0:
        close(r.wake_fd)
    if r.event_fd >= 0:
        close(r.event_fd)
    r.epfd = r.wake_fd = r.event_fd = -1
    for fd in range(r.watches_len):
        free(r.watches[fd])
    free(r.watches)
    free(r.heap)
    r.watches = NULL
    r.watches_len = 0
    r.heap = NULL
    r.heap_len = r.heap_cap = 0


# --- the control plane's side -------------------------------------------------------------------------------------

cdef inline void reactor_lock(reactor_t *r) noexcept nogil:
    """Take the loop's lock. The loop sees the waiter and steps aside after its current turn."""
    atomic_add_u32(&r.waiters, 1)
    pthread_mutex_lock(&r.lock)
    atomic_add_u32(&r.waiters, -1)


cdef inline void reactor_unlock(reactor_t *r) noexcept nogil:
    # A sleeping loop must look again: what was changed may have made work (a new ring, a shorter deadline).
    cdef bint sleeping = r.sleeping
    pthread_mutex_unlock(&r.lock)
    if sleeping:
        eventfd_signal(r.wake_fd)


cdef inline void reactor_stop(reactor_t *r) noexcept nogil:
    atomic_add_u32(&r.stop, 1)
    eventfd_signal(r.wake_fd)


cdef inline int reactor_add(reactor_t *r, source_t *source) noexcept nogil:
    """Put *source* into the loop; the lock must be held. Returns 0."""
    if source.attached:
        return 0
    source.next = r.sources
    r.sources = source
    source.attached = 1
    source.more = 1
    if not source.memory_polled:
        r.fd_sources += 1
    return 0


cdef inline int reactor_remove(reactor_t *r, source_t *source) noexcept nogil:
    """Take *source* out; the lock must be held. Its deferred completions are run at once. Returns 0."""
    cdef source_t **link = &r.sources
    cdef int fd
    if not source.attached:
        return 0
    reactor_drain(r, source)
    while link[0] != NULL:
        if link[0] == source:
            link[0] = source.next
            break
        link = &link[0].next
    for fd in range(r.watches_len):
        if r.watches[fd] != NULL and r.watches[fd].source == source:
            reactor_unwatch(r, fd)
    source.attached = 0
    source.next = NULL
    if not source.memory_polled:
        r.fd_sources -= 1
    return 0


# --- fds ----------------------------------------------------------------------------------------------------------

cdef inline int reactor_watch(reactor_t *r, source_t *source, int fd, uint32_t events) noexcept nogil:
    """Call ``source.ready`` when *fd* has one of *events* (level-triggered). Returns 0 or an errno."""
    cdef watch_t **grown
    cdef watch_t *watch
    cdef epoll_event event
    cdef int n
    if fd >= r.watches_len:
        n = (fd + 64) & ~63
        grown = <watch_t **>realloc(r.watches, n * sizeof(watch_t *))
        if grown == NULL:
            return ENOMEM
        memset(grown + r.watches_len, 0, (n - r.watches_len) * sizeof(watch_t *))
        r.watches = grown
        r.watches_len = n
    if r.watches[fd] != NULL:
        reactor_unwatch(r, fd)
    watch = <watch_t *>realloc(NULL, sizeof(watch_t))
    if watch == NULL:
        return ENOMEM
    watch.source = source
    watch.fd = fd
    event.events = events
    event.data.u64 = <uint64_t>fd
    if epoll_ctl(r.epfd, EPOLL_CTL_ADD, fd, &event) < 0:
        free(watch)
        return errno
    r.watches[fd] = watch
    return 0


cdef inline int reactor_rewatch(reactor_t *r, int fd, uint32_t events) noexcept nogil:
    """Change the events of a watched *fd*. Returns 0 or an errno."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = <uint64_t>fd
    return 0 if epoll_ctl(r.epfd, EPOLL_CTL_MOD, fd, &event) == 0 else errno


cdef inline void reactor_unwatch(reactor_t *r, int fd) noexcept nogil:
    """Forget *fd*; must be called before the fd is closed. Harmless for an fd that is not watched."""
    cdef epoll_event event
    if fd < 0 or fd >= r.watches_len or r.watches[fd] == NULL:
        return
    epoll_ctl(r.epfd, EPOLL_CTL_DEL, fd, &event)
    free(r.watches[fd])
    r.watches[fd] = NULL


cdef inline int reactor_take_fds(reactor_t *r, epoll_event *events, int n) noexcept nogil:
    """Tell the sources which of their fds are ready. Returns how many were theirs."""
    cdef int i, fd, told = 0
    for i in range(n):
        if events[i].data.u64 == <uint64_t>-1:
            eventfd_drain(r.wake_fd)
            continue
        fd = <int>events[i].data.u64
        # An earlier source of this batch may have unwatched this fd.
        if fd < r.watches_len and r.watches[fd] != NULL:
            r.watches[fd].source.ready(r.watches[fd].source, fd, events[i].events)
            told += 1
    return told


# --- reports for trio ---------------------------------------------------------------------------------------------

cdef inline void reactor_report(reactor_t *r, source_t *source, int code) noexcept nogil:
    """Queue (source.token, code) for the control plane and signal ``event_fd``."""
    if r.reports_head - r.reports_tail == REACTOR_EVENTS:
        r.reports_dropped += 1
        return
    r.reports[r.reports_head % REACTOR_EVENTS].token = source.token
    r.reports[r.reports_head % REACTOR_EVENTS].code = code
    r.reports_head += 1
    eventfd_signal(r.event_fd)


# --- deferred completions: a binary heap on (deadline, order) -----------------------------------------------------

cdef inline bint deferred_before(const deferred_t *a, const deferred_t *b) noexcept nogil:
    return a.deadline_ns < b.deadline_ns or (a.deadline_ns == b.deadline_ns and a.order < b.order)


cdef inline void heap_up(deferred_t *heap, uint32_t i) noexcept nogil:
    cdef deferred_t item = heap[i]
    while i > 0 and deferred_before(&item, &heap[(i - 1) >> 1]):
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = item


cdef inline void heap_down(deferred_t *heap, uint32_t n, uint32_t i) noexcept nogil:
    cdef deferred_t item = heap[i]
    cdef uint32_t child
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and deferred_before(&heap[child + 1], &heap[child]):
            child += 1
        if not deferred_before(&heap[child], &item):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = item


cdef inline void reactor_defer(reactor_t *r, source_t *source, uint64_t deadline_ns, uint64_t a, uint64_t b) noexcept nogil:
    """Run ``source.complete(a, b)`` at *deadline_ns*; at once if the heap cannot grow (a completion is never lost)."""
    cdef deferred_t *grown
    if r.heap_len == r.heap_cap:
        grown = <deferred_t *>realloc(r.heap, (2 * r.heap_cap + 64) * sizeof(deferred_t))
        if grown == NULL:
            source.complete(source, a, b)
            return
        r.heap = grown
        r.heap_cap = 2 * r.heap_cap + 64
    r.heap[r.heap_len].deadline_ns = deadline_ns
    r.heap[r.heap_len].order = r.deferred_order
    r.heap[r.heap_len].source = source
    r.heap[r.heap_len].a = a
    r.heap[r.heap_len].b = b
    r.heap[r.heap_len].program.pu = NO_PU
    if r.timing != NULL and r.timing[0] != NULL and r.timing[0].last.end_ns == deadline_ns:
        r.heap[r.heap_len].program = r.timing[0].last
    r.deferred_order += 1
    r.heap_len += 1
    heap_up(r.heap, r.heap_len - 1)


cdef inline deferred_t heap_pop(reactor_t *r) noexcept nogil:
    cdef deferred_t top = r.heap[0]
    r.heap_len -= 1
    if r.heap_len:
        r.heap[0] = r.heap[r.heap_len]
        heap_down(r.heap, r.heap_len, 0)
    return top


cdef inline void reactor_drain(reactor_t *r, source_t *source) noexcept nogil:
    """Complete everything that *source* has deferred, in deadline order, without waiting for the deadlines."""
    cdef deferred_t top
    cdef uint32_t i, kept = 0, mine = 0
    # Pop in order; what belongs to others is collected at the front of the array that the shrinking heap frees.
    cdef uint32_t total = r.heap_len
    cdef deferred_t *others
    for i in range(total):
        mine += r.heap[i].source == source
    if mine == 0:
        return
    others = <deferred_t *>realloc(NULL, total * sizeof(deferred_t))
    while r.heap_len:
        top = heap_pop(r)
        if top.source == source or others == NULL:
            top.source.complete(top.source, top.a, top.b)
        else:
            others[kept] = top
            kept += 1
    # Sorted ascending is a valid heap.
    for i in range(kept):
        r.heap[i] = others[i]
    r.heap_len = kept
    free(others)


cdef inline bint first_has_moved(reactor_t *r) noexcept nogil:
    """Was the program that the first completion waits for suspended meanwhile? Then it is put back to its new place."""
    cdef uint64_t end_ns
    if r.heap[0].program.pu == <uint32_t>NO_PU or r.timing == NULL or r.timing[0] == NULL:
        return False
    end_ns = timing_revised(r.timing[0], &r.heap[0].program)
    if end_ns <= r.heap[0].deadline_ns:
        return False
    r.heap[0].deadline_ns = end_ns
    heap_down(r.heap, r.heap_len, 0)
    return True


cdef inline uint32_t late_bucket(uint64_t late_ns) noexcept nogil:
    """The top three bits and where they stand: bucket b ends before ``late_bucket_end(b)``."""
    cdef uint32_t shift = 0
    if late_ns < 4:
        return <uint32_t>late_ns
    while late_ns >> shift >= 8:
        shift += 1
    return 4 * (shift + 1) + <uint32_t>(late_ns >> shift) - 4


cdef inline uint64_t late_bucket_end(uint32_t bucket) noexcept nogil:
    if bucket < 4:
        return bucket + 1
    return <uint64_t>(4 + bucket % 4 + 1) << (bucket // 4 - 1)


cdef inline void count_lateness(reactor_t *r, uint64_t late_ns) noexcept nogil:
    r.late_hist[late_bucket(late_ns)] += 1
    r.late_count += 1
    if late_ns > r.late_max_ns:
        r.late_max_ns = late_ns


cdef inline int reactor_complete_due(reactor_t *r) noexcept nogil:
    """Post every completion whose deadline has passed. Returns how many."""
    cdef deferred_t top
    cdef uint64_t now
    cdef int n = 0
    if r.heap_len == 0:
        return 0
    now = now_ns()
    while r.heap_len and r.heap[0].deadline_ns <= now and n < 4 * REACTOR_BUDGET:
        if first_has_moved(r):
            continue
        top = heap_pop(r)
        count_lateness(r, now_ns() - top.deadline_ns)       # not now: the completions before it took their time
        top.source.complete(top.source, top.a, top.b)
        n += 1
    return n


# --- the loop -----------------------------------------------------------------------------------------------------

cdef inline int reactor_turn(reactor_t *r) noexcept nogil:
    """One round over deadlines, fds and sources; the lock is held. Returns the amount of work done."""
    cdef epoll_event events[REACTOR_FDS]
    cdef source_t *source
    cdef source_t *following
    cdef int done = reactor_complete_due(r)
    cdef int n, worked
    r.turns += 1
    if r.fd_sources:
        n = epoll_wait(r.epfd, events, REACTOR_FDS, 0)
        if n > 0:
            reactor_take_fds(r, events, n)
    source = r.sources
    while source != NULL:
        following = source.next
        if source.memory_polled or source.more:
            worked = source.poll(source, REACTOR_BUDGET)
            if worked:
                done += worked
                r.bulk = source.bulk
        source = following
    return done


cdef inline bint reactor_arm(reactor_t *r) noexcept nogil:
    """Ask every source to notify us. Returns 1 when one has work already: do not sleep."""
    cdef source_t *source = r.sources
    cdef bint busy = False
    while source != NULL:
        if source.more or source.arm(source):
            busy = True
        source = source.next
    return busy


cdef inline void reactor_disarm(reactor_t *r) noexcept nogil:
    cdef source_t *source = r.sources
    while source != NULL:
        source.disarm(source)
        source = source.next


cdef inline void reactor_adapt(reactor_t *r, uint64_t slept_ns) noexcept nogil:
    """Poll longer when a sleep turned out short (polling would have caught the work), shorter when it was long.

    A sleep includes the time that waking up takes, so work that came at once still looks like a sleep of that length.
    Polling never pays for a wait that is longer than the limit, so one such sleep halves the time; so does polling that
    caught nothing some times in a row, as with a guest whose next request always comes a little too late: it would
    take that guest's CPU away for nothing. Short sleeps bring the full time back: one at first, twice as many after
    each time that this turned out wrong.
    """
    cdef uint64_t short_ns = r.poll_max_ns + SLEEP_SLACK_NS
    r.fruitless += 1
    if slept_ns > 4 * short_ns or r.fruitless > FRUITLESS_MAX:
        r.poll_ns >>= 1
    r.short_sleeps = r.short_sleeps + 1 if slept_ns <= short_ns else 0
    if r.poll_ns < r.poll_max_ns and r.short_sleeps >= r.patience:
        r.poll_ns = r.poll_max_ns
        r.fruitless = r.short_sleeps = 0
        r.patience = min(2 * r.patience, <uint32_t>PATIENCE_MAX)


cdef inline void reactor_learn_wakeup(reactor_t *r, uint64_t late_ns) noexcept nogil:
    """A timer fired *late_ns* after its time: sleep less at once if that was long, more little by little if it was short."""
    if late_ns >= r.early_ns:
        r.early_ns = min(late_ns + (late_ns >> 2), <uint64_t>EARLY_MAX_NS)
    else:
        r.early_ns -= (r.early_ns - max(late_ns, <uint64_t>EARLY_MIN_NS)) >> 6 if r.early_ns > EARLY_MIN_NS else 0


cdef inline void reactor_caught(reactor_t *r) noexcept nogil:
    """Work came while we polled: it pays."""
    r.fruitless = 0
    r.patience = 1


cdef inline void reactor_sleep(reactor_t *r) noexcept nogil:
    """Wait for an fd, a wake-up or the next deadline; the lock is held on entry and on return."""
    cdef epoll_event events[REACTOR_FDS]
    cdef long long timeout_ns = -1, late_ns
    cdef uint64_t start = now_ns()
    cdef int n
    if r.heap_len:
        # Timers fire late by what waking up takes: wake up early by that and spin the rest.
        timeout_ns = <long long>r.heap[0].deadline_ns - <long long>start - <long long>r.early_ns
        if timeout_ns <= 0:
            return
    r.sleeping = 1
    r.sleeps += 1
    pthread_mutex_unlock(&r.lock)
    n = epoll_wait_ns(r.epfd, events, REACTOR_FDS, timeout_ns)
    pthread_mutex_lock(&r.lock)
    r.sleeping = 0
    if n == 0 and timeout_ns > 0:
        late_ns = <long long>(now_ns() - start) - timeout_ns
        if late_ns >= 0:        # without epoll_pwait2 it is the millisecond before
            reactor_learn_wakeup(r, <uint64_t>late_ns)
    if n > 0:
        r.wakeups_by_fd += reactor_take_fds(r, events, n)
        reactor_adapt(r, now_ns() - start)


cdef enum:
    FRUITLESS_MAX = 8
    PATIENCE_MAX = 1024
    SLEEP_SLACK_NS = 60000      # measured wake-up latency of epoll_pwait2 on a virtual machine: 50-60 us at p50
    EARLY_MIN_NS = 20000
    EARLY_MAX_NS = 400000       # a machine that wakes up later than this is busy: spinning would not help


cdef inline void reactor_step_aside(reactor_t *r) noexcept nogil:
    """Let waiting control-plane threads have the lock: a mutex alone would let this thread take it back at once."""
    pthread_mutex_unlock(&r.lock)
    while atomic_get_u32(&r.waiters):
        sched_yield()
    pthread_mutex_lock(&r.lock)


cdef inline void reactor_run(reactor_t *r) noexcept nogil:
    """Serve until ``reactor_stop``. Spins for the poll time after the last work, then sleeps."""
    cdef uint64_t idle_since = 0
    cdef uint64_t now
    pthread_mutex_lock(&r.lock)
    while not atomic_get_u32(&r.stop):
        if atomic_get_u32(&r.waiters):
            reactor_step_aside(r)
        if reactor_turn(r):
            if idle_since:
                reactor_caught(r)
            idle_since = 0
            continue
        now = now_ns()
        if idle_since == 0:
            idle_since = now
        if now - idle_since < r.poll_ns and not r.bulk:
            cpu_relax()
            continue
        if not reactor_arm(r):
            reactor_sleep(r)
        reactor_disarm(r)
        idle_since = 0
    pthread_mutex_unlock(&r.lock)
