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
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    #if defined(__x86_64__)
    #include <immintrin.h>
    #endif

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
    static inline void ocssd_trim_heap(void) {
    #ifdef __GLIBC__
        malloc_trim(0);
    #endif
    }
    static inline void ocssd_prefetch(const void *p) { __builtin_prefetch(p); }
    #if defined(__x86_64__)
    __attribute__((target("avx2"), noinline, unused))
    static void ocssd_copy_past_cache_avx2(char *to, const char *from, size_t n) {
        for (size_t i = 0; i < n; i += 128) {
            __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
            __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
            __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64));
            __m256i d = _mm256_loadu_si256((const __m256i *)(from + i + 96));
            _mm256_stream_si256((__m256i *)(to + i), a);
            _mm256_stream_si256((__m256i *)(to + i + 32), b);
            _mm256_stream_si256((__m256i *)(to + i + 64), c);
            _mm256_stream_si256((__m256i *)(to + i + 96), d);
        }
    }
    static inline void ocssd_copy_past_cache(char *to, const char *from, size_t n) {
        if (__builtin_cpu_supports("avx2") && !((uintptr_t)to & 31 || n & 127))
            ocssd_copy_past_cache_avx2(to, from, n);
        else memcpy(to, from, n);
    }
    static inline void ocssd_copies_end(void) { _mm_sfence(); }
    #else
    static inline void ocssd_copy_past_cache(char *to, const char *from, size_t n) { memcpy(to, from, n); }
    static inline void ocssd_copies_end(void) {}
    #endif
    static inline void ocssd_full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline void ocssd_release_fence(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    static inline int ocssd_eventfd_signal(int fd) {
        uint64_t one = 1;
        return write(fd, &one, sizeof one) < 0 && errno == EINTR;
    }
    static inline void ocssd_eventfd_drain(int fd) {
        uint64_t count;
        if (read(fd, &count, sizeof count) < 0) {}
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
    void trim_heap "ocssd_trim_heap" () noexcept nogil
    void prefetch "ocssd_prefetch" (const void *p) noexcept nogil      # never faults, whatever the address
    # For data that nobody will read soon: without fetching the target's lines first, a quarter less time per sector.
    # Ends with copies_end, before another thread or the kernel may look.
    void copy_past_cache "ocssd_copy_past_cache" (char *to, const char *source, size_t n) noexcept nogil
    void copies_end "ocssd_copies_end" () noexcept nogil
    void full_fence "ocssd_full_fence" () noexcept nogil
    void release_fence "ocssd_release_fence" () noexcept nogil
    # Both ignore every error: a full counter is still a signal, and a peer may hand us any kind of fd. EINTR comes only when
    # a peer has made its fd block, and device.py's guard has freed us from it: then the signal returns 1, and is not retried.
    bint eventfd_signal "ocssd_eventfd_signal" (int fd) noexcept nogil
    void eventfd_drain "ocssd_eventfd_drain" (int fd) noexcept nogil
