"""Owns the process's SIGBUS handler: a truncated file behind a mapping must not end the daemon.

A peer that hands us a file can shrink it at any time; touching the lost pages raises SIGBUS in whichever thread does
it. The handler replaces the *whole* mapping by zero pages (one fault per mapping, whatever the peer does, and right
for huge pages too), sets the owner's flag and lets the instruction run again. The owner notices the flag and ends the
session.

Each extension module has its own table and handler; a fault at an address it does not know goes to the handler that was
there before, so the modules chain, and a SIGBUS of any other cause still ends the process.
"""

from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>

    #define OCSSD_GUARDS 8192

    typedef struct { uintptr_t base; size_t bytes; uint32_t *poisoned; } ocssd_guard_t;

    static ocssd_guard_t ocssd_guards[OCSSD_GUARDS];
    static uint32_t ocssd_guards_used;              /* the table's high-water mark */
    static pthread_mutex_t ocssd_guards_lock = PTHREAD_MUTEX_INITIALIZER;
    static struct sigaction ocssd_sigbus_before;
    static int ocssd_sigbus_installed;

    static int ocssd_guard_catch(uintptr_t at) {
        uint32_t used = __atomic_load_n(&ocssd_guards_used, __ATOMIC_ACQUIRE);
        for (uint32_t i = 0; i < used; i++) {
            ocssd_guard_t *guard = &ocssd_guards[i];
            size_t bytes = __atomic_load_n(&guard->bytes, __ATOMIC_ACQUIRE);
            if (at - guard->base >= bytes) continue;
            if (mmap((void *)guard->base, bytes, PROT_READ | PROT_WRITE,
                     MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED) return 0;
            __atomic_store_n(guard->poisoned, 1, __ATOMIC_RELEASE);
            return 1;
        }
        return 0;
    }

    static void ocssd_sigbus_pass_on(int signo, siginfo_t *info, void *context) {
        struct sigaction *before = &ocssd_sigbus_before;
        if (before->sa_flags & SA_SIGINFO) before->sa_sigaction(signo, info, context);
        else if (before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN) signal(signo, SIG_DFL);
        else before->sa_handler(signo);
    }

    static void ocssd_on_sigbus(int signo, siginfo_t *info, void *context) {
        int saved = errno;
        int from_kernel = info->si_code > 0;        /* kill() and raise() carry no address */
        if (!from_kernel || !ocssd_guard_catch((uintptr_t)info->si_addr)) ocssd_sigbus_pass_on(signo, info, context);
        errno = saved;
    }

    static void ocssd_sigbus_install(void) {
        struct sigaction action;
        if (ocssd_sigbus_installed) return;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = ocssd_on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        ocssd_sigbus_installed = sigaction(SIGBUS, &action, &ocssd_sigbus_before) == 0;
    }

    /* 0, or -1 when the table is full. `bytes` is stored last: it is what makes the entry live. */
    static int ocssd_sigbus_guard(void *base, size_t bytes, uint32_t *poisoned) {
        int result = -1;
        pthread_mutex_lock(&ocssd_guards_lock);
        ocssd_sigbus_install();
        for (uint32_t i = 0; i < OCSSD_GUARDS && result; i++) {
            if (ocssd_guards[i].bytes) continue;
            ocssd_guards[i].base = (uintptr_t)base;
            ocssd_guards[i].poisoned = poisoned;
            __atomic_store_n(&ocssd_guards[i].bytes, bytes, __ATOMIC_RELEASE);
            if (i >= ocssd_guards_used) __atomic_store_n(&ocssd_guards_used, i + 1, __ATOMIC_RELEASE);
            result = 0;
        }
        pthread_mutex_unlock(&ocssd_guards_lock);
        return result;
    }

    static void ocssd_sigbus_unguard(void *base) {
        pthread_mutex_lock(&ocssd_guards_lock);
        for (uint32_t i = 0; i < ocssd_guards_used; i++)
            if (ocssd_guards[i].base == (uintptr_t)base && ocssd_guards[i].bytes) {
                __atomic_store_n(&ocssd_guards[i].bytes, 0, __ATOMIC_RELEASE);
                break;
            }
        pthread_mutex_unlock(&ocssd_guards_lock);
    }
    """
    # 0, or -1 when too many mappings are guarded; *poisoned becomes 1 when the mapping was lost.
    int sigbus_guard "ocssd_sigbus_guard" (void *base, size_t bytes, uint32_t *poisoned) noexcept nogil
    void sigbus_unguard "ocssd_sigbus_unguard" (void *base) noexcept nogil
