"""Owns one wish to the scheduler: let this thread run soon and briefly, instead of late and long.

The reactor wakes up for some microseconds of work. On a host whose processors are all busy (the virtual CPUs of an
emulated guest are) a thread with the usual time slice waits for milliseconds until its turn comes. Since Linux 6.12 a
thread may ask for shorter slices (sched(7), sched_setattr(2): ``sched_runtime`` under SCHED_OTHER); it then runs earlier, and no
longer in sum. It needs no privilege; older kernels ignore it.
"""

cdef extern from *:
    """
    #include <sched.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/resource.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* glibc has no wrapper before 2.41; the struct is the kernel's first version of it. */
    struct ocssd_sched_attr {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime_ns, deadline_ns, period_ns;
    };
    static inline void ocssd_short_slices(uint64_t slice_ns) {
    #ifdef SYS_sched_setattr
        struct ocssd_sched_attr attr;
        memset(&attr, 0, sizeof attr);
        if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) || attr.policy != SCHED_OTHER) return;
        attr.size = sizeof attr;
        attr.flags = 0;
        attr.runtime_ns = slice_ns;
        syscall(SYS_sched_setattr, 0, &attr, 0);
    #endif
    }
    """
    # For the calling thread; one of another policy (a real-time one) is left as it is.
    void short_slices "ocssd_short_slices" (unsigned long long slice_ns) noexcept nogil
