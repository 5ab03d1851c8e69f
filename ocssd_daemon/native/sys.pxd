"""Owns the few machine-level primitives that every hot loop needs: clock, fences, eventfds, the futex-free pause.

Units: nanoseconds of CLOCK_MONOTONIC. Knows nothing of flash, rings or sockets.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from *:
    """
    #include <errno.h>
    #include <malloc.h>
    #include <stdint.h>
    #include <sched.h>
    #include <time.h>
    #include <unistd.h>

    static inline uint64_t ocssd_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
    }
    static inline void ocssd_cpu_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    static inline uint16_t ocssd_load_acquire_u16(const void *p) { return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE); }
    static inline uint32_t ocssd_load_acquire_u32(const void *p) { return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
    static inline uint64_t ocssd_load_acquire_u64(const void *p) { return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE); }
    static inline void ocssd_store_release_u16(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
    static inline void ocssd_store_release_u32(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE); }
    static inline void ocssd_store_release_u64(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
    static inline void ocssd_keep_heap(void) {
    #ifdef __GLIBC__
        mallopt(M_MMAP_THRESHOLD, 4 << 20);
        mallopt(M_TRIM_THRESHOLD, 64 << 20);
    #endif
    }
    static inline void ocssd_prefetch(const void *p) { __builtin_prefetch(p); }
    static inline void ocssd_full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline void ocssd_release_fence(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    static inline void ocssd_eventfd_signal(int fd) {
        uint64_t one = 1;
        while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
    }
    static inline void ocssd_eventfd_drain(int fd) {
        uint64_t count;
        while (read(fd, &count, sizeof count) < 0 && errno == EINTR) {}
    }
    """
    uint64_t now_ns "ocssd_now_ns" () noexcept nogil
    void cpu_relax "ocssd_cpu_relax" () noexcept nogil
    uint16_t load_acquire_u16 "ocssd_load_acquire_u16" (const void *p) noexcept nogil
    uint32_t load_acquire_u32 "ocssd_load_acquire_u32" (const void *p) noexcept nogil
    uint64_t load_acquire_u64 "ocssd_load_acquire_u64" (const void *p) noexcept nogil
    void store_release_u16 "ocssd_store_release_u16" (void *p, uint16_t v) noexcept nogil
    void store_release_u32 "ocssd_store_release_u32" (void *p, uint32_t v) noexcept nogil
    void store_release_u64 "ocssd_store_release_u64" (void *p, uint64_t v) noexcept nogil
    # Buffers of some hundred KiB come and go with every large request: mapped anew, each costs a page fault per 4 KiB.
    void keep_heap "ocssd_keep_heap" () noexcept nogil
    void prefetch "ocssd_prefetch" (const void *p) noexcept nogil      # never faults, whatever the address
    void full_fence "ocssd_full_fence" () noexcept nogil
    void release_fence "ocssd_release_fence" () noexcept nogil
    # Both ignore every error but EINTR: a full counter is still a signal, and a peer may hand us any kind of fd.
    void eventfd_signal "ocssd_eventfd_signal" (int fd) noexcept nogil
    void eventfd_drain "ocssd_eventfd_drain" (int fd) noexcept nogil
