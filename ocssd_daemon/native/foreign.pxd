"""Owns the mapping of a file that a peer passed to us: check it, map it, guard it against truncation.

Guest memory, the dirty log and the in-flight region all come this way. Offsets and sizes in bytes. A refusal is a
sentence (a static C string), success is NULL. Knows nothing of guest addresses.
"""

from libc.stdint cimport uint32_t, uint64_t

from ocssd_daemon.native.sigbus cimport sigbus_guard, sigbus_unguard

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/vfs.h>
    #include <unistd.h>

    #define OCSSD_HUGETLBFS_MAGIC 0x958458f6

    /* The unit in which the kernel maps this file; 0 when it is not a regular file. */
    static inline uint64_t ocssd_map_unit(int fd, uint64_t *file_bytes) {
        struct stat st;
        struct statfs fs;
        if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) return 0;
        *file_bytes = (uint64_t)st.st_size;
        if (fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == OCSSD_HUGETLBFS_MAGIC) return (uint64_t)fs.f_bsize;
        return (uint64_t)sysconf(_SC_PAGESIZE);
    }
    static inline char *ocssd_map_shared(int fd, uint64_t bytes, uint64_t offset, int writable) {
        int protection = PROT_READ | (writable ? PROT_WRITE : 0);
        void *base = mmap(NULL, bytes, protection, MAP_SHARED | MAP_NORESERVE, fd, (off_t)offset);
        if (base == MAP_FAILED) return NULL;
        madvise(base, bytes, MADV_DONTDUMP);        /* a core dump of the daemon does not contain the guest */
        return (char *)base;
    }
    """
    uint64_t map_unit "ocssd_map_unit" (int fd, uint64_t *file_bytes) noexcept nogil
    char *map_shared "ocssd_map_shared" (int fd, uint64_t bytes, uint64_t offset, int writable) noexcept nogil

cdef extern from "sys/mman.h" nogil:
    int munmap(void *, size_t)


ctypedef struct foreign_t:
    char *at                    # the first byte that was asked for
    uint64_t size_bytes
    char *base                  # what is mapped around it, in whole map units
    uint64_t mapped_bytes


cdef inline const char *foreign_map(foreign_t *self, int fd, uint64_t size_bytes, uint64_t offset_bytes, bint writable,
                                    uint32_t *poisoned) noexcept nogil:
    cdef uint64_t file_bytes = 0
    cdef uint64_t unit = map_unit(fd, &file_bytes)
    cdef uint64_t lead
    if unit == 0:
        return "the file descriptor is not a regular file or memfd"
    if size_bytes == 0:
        return "the size is 0"
    if offset_bytes > file_bytes or size_bytes > file_bytes - offset_bytes:
        return "offset and size reach beyond the end of the file"
    lead = offset_bytes & (unit - 1)
    self.mapped_bytes = (lead + size_bytes + unit - 1) & ~(unit - 1)
    self.base = map_shared(fd, self.mapped_bytes, offset_bytes - lead, writable)
    if self.base == NULL:
        return "the file cannot be mapped (not open for this access, sealed, or out of address space)"
    if sigbus_guard(self.base, self.mapped_bytes, poisoned) != 0:
        munmap(self.base, self.mapped_bytes)
        self.base = NULL
        return "too many mappings"
    self.at = self.base + lead
    self.size_bytes = size_bytes
    return NULL


cdef inline void foreign_unmap(foreign_t *self) noexcept nogil:
    if self.base == NULL:
        return
    sigbus_unguard(self.base)
    munmap(self.base, self.mapped_bytes)
    self.base = NULL
    self.at = NULL
    self.size_bytes = 0
