"""Owns the loop that moves all data: poll the sources, sleep when idle, post completions when they are due.

One loop, one writer: every flash and FTL structure is touched only while ``reactor_t.lock`` is held. The loop holds it
for one turn at a time (well below 1 ms) and lets a waiting control-plane thread go first, so that configuration and
statistics never wait behind traffic. Times are CLOCK_MONOTONIC nanoseconds.

The reactor knows no protocol: a transport embeds ``source_t`` as the first member of its own struct.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from ocssd_daemon.native.sys cimport cpu_relax, eventfd_drain, eventfd_signal, full_fence, now_ns

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
    report_t reports[REACTOR_EVENTS]
    uint32_t reports_head
    uint32_t reports_tail
    uint64_t poll_max_ns        # longest time to poll before sleeping (setting reactor.poll_us)
    uint64_t poll_ns            # the adaptive value in force
    uint8_t sleeping
    uint64_t turns
    uint64_t sleeps
    uint64_t wakeups_by_fd
    uint64_t reports_dropped
    uint64_t late_count
    uint64_t late_max_ns
    uint64_t late_hist[64]      # log2 buckets of lateness in ns
