"""Owns foreign memory: which guest-physical ranges exist, where they are mapped, and the translation of an address.

A translation succeeds only when the whole range lies inside one region (``gmem_at``) or inside regions that adjoin
without a hole (``gmem_iov``); no sum is formed that could wrap. Addresses and sizes in bytes; ``gpa`` is
guest-physical (or a DMA address), ``user_addr`` is the front end's own virtual address of the same bytes. Knows no
ring and no command.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from ocssd_daemon.native.foreign cimport foreign_map, foreign_t, foreign_unmap
from ocssd_daemon.native.sys cimport iovec, load_acquire_u32


cdef enum:
    GMEM_ALIGN = 4096           # smallest page of any guest or host we serve
    GMEM_NONE = -1


ctypedef struct gmem_region_t:
    uint64_t gpa
    uint64_t size_bytes
    uint64_t user_addr
    foreign_t map
    bint writable

ctypedef struct gmem_t:
    gmem_region_t *regions      # sorted by gpa, disjoint
    uint32_t count
    uint32_t capacity
    uint32_t hit                # index of the region found last: the next address is mostly in the same one
    uint32_t poisoned           # set by the SIGBUS guard: a file was truncated under us


cdef inline bint gmem_poisoned(gmem_t *self) noexcept nogil:
    return load_acquire_u32(&self.poisoned) != 0


cdef inline gmem_region_t *gmem_search(gmem_t *self, uint64_t gpa) noexcept nogil:
    cdef uint32_t low = 0, high = self.count, middle
    while low < high:
        middle = (low + high) >> 1
        if gpa - self.regions[middle].gpa < self.regions[middle].size_bytes:
            self.hit = middle
            return &self.regions[middle]
        if gpa < self.regions[middle].gpa:
            high = middle
        else:
            low = middle + 1
    return NULL


cdef inline gmem_region_t *gmem_find(gmem_t *self, uint64_t gpa) noexcept nogil:
    """The region that holds *gpa*, or NULL. The subtraction wraps for a lower gpa and then exceeds every size."""
    cdef gmem_region_t *region
    if self.hit < self.count:
        region = &self.regions[self.hit]
        if gpa - region.gpa < region.size_bytes:
            return region
    return gmem_search(self, gpa)


cdef inline char *gmem_at(gmem_t *self, uint64_t gpa, uint64_t length_bytes) noexcept nogil:
    """Where [gpa, gpa + length) may be read, or NULL unless all of it is in one region."""
    cdef gmem_region_t *region = gmem_find(self, gpa)
    if region == NULL or length_bytes > region.size_bytes - (gpa - region.gpa):
        return NULL
    return region.map.at + (gpa - region.gpa)


cdef inline char *gmem_at_write(gmem_t *self, uint64_t gpa, uint64_t length_bytes) noexcept nogil:
    """As gmem_at, and the region may be written."""
    cdef gmem_region_t *region = gmem_find(self, gpa)
    if region == NULL or not region.writable or length_bytes > region.size_bytes - (gpa - region.gpa):
        return NULL
    return region.map.at + (gpa - region.gpa)


cdef inline int gmem_iov(gmem_t *self, uint64_t gpa, uint64_t length_bytes, bint write, iovec *iov,
                         int iov_max) noexcept nogil:
    """Split [gpa, gpa + length) over adjoining regions; the number of pieces, or GMEM_NONE (hole, read-only,
    too many).
    """
    cdef gmem_region_t *region
    cdef uint64_t inside
    cdef int pieces = 0
    while length_bytes != 0:
        region = gmem_find(self, gpa)
        if region == NULL or pieces == iov_max or (write and not region.writable):
            return GMEM_NONE
        inside = region.size_bytes - (gpa - region.gpa)
        if inside > length_bytes:
            inside = length_bytes
        iov[pieces].iov_base = region.map.at + (gpa - region.gpa)
        iov[pieces].iov_len = inside
        pieces += 1
        gpa += inside
        length_bytes -= inside
    return pieces


cdef inline bint gmem_user_to_gpa(gmem_t *self, uint64_t user_addr, uint64_t length_bytes,
                                  uint64_t *gpa) noexcept nogil:
    """Translate the front end's own address (ring addresses come so); false unless the range is in one region."""
    cdef uint32_t i
    cdef uint64_t inside
    for i in range(self.count):
        inside = user_addr - self.regions[i].user_addr
        if inside < self.regions[i].size_bytes and length_bytes <= self.regions[i].size_bytes - inside:
            gpa[0] = self.regions[i].gpa + inside
            return True
    return False


cdef inline bint gmem_overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) noexcept nogil:
    return a - b < b_bytes or b - a < a_bytes


cdef inline const char *gmem_refusal(gmem_t *self, uint64_t gpa, uint64_t size_bytes, uint64_t user_addr,
                                     uint64_t offset_bytes) noexcept nogil:
    """Why this region cannot join the table, or NULL."""
    cdef uint32_t i
    cdef gmem_region_t *other
    if size_bytes == 0:
        return "the size is 0"
    # The size need not be aligned: libblkio registers rings of 15,120 bytes. What is mapped is whole pages.
    if (gpa | user_addr | offset_bytes) & (GMEM_ALIGN - 1):
        return "address and offset must be multiples of 4096"
    if gpa + size_bytes - 1 < gpa or user_addr + size_bytes - 1 < user_addr:
        return "address and size wrap around"
    for i in range(self.count):
        other = &self.regions[i]
        if gmem_overlap(gpa, size_bytes, other.gpa, other.size_bytes):
            return "the guest addresses overlap another region"
        # User address 0 is no address: front ends with GPA_ADDRESSES send it for every region.
        if user_addr and other.user_addr and gmem_overlap(user_addr, size_bytes, other.user_addr, other.size_bytes):
            return "the user addresses overlap another region"
    return NULL


cdef inline bint gmem_reserve(gmem_t *self) noexcept nogil:
    cdef uint32_t capacity = self.capacity * 2 if self.capacity else 8
    cdef gmem_region_t *grown
    if self.count < self.capacity:
        return True
    grown = <gmem_region_t *>realloc(self.regions, capacity * sizeof(gmem_region_t))
    if grown == NULL:
        return False
    self.regions = grown
    self.capacity = capacity
    return True


cdef inline const char *gmem_add(gmem_t *self, uint64_t gpa, uint64_t size_bytes, uint64_t user_addr,
                                 uint64_t offset_bytes, int fd, bint writable) noexcept nogil:
    """Map a region of the peer's file; NULL, or the sentence that says why not. The fd stays the caller's."""
    cdef gmem_region_t region
    cdef uint32_t place = 0
    cdef const char *refusal = gmem_refusal(self, gpa, size_bytes, user_addr, offset_bytes)
    if refusal != NULL:
        return refusal
    if not gmem_reserve(self):
        return "out of memory"
    refusal = foreign_map(&region.map, fd, size_bytes, offset_bytes, writable, &self.poisoned)
    if refusal != NULL:
        return refusal
    region.gpa = gpa
    region.size_bytes = size_bytes
    region.user_addr = user_addr
    region.writable = writable
    while place < self.count and self.regions[place].gpa < gpa:
        place += 1
    memmove(&self.regions[place + 1], &self.regions[place], (self.count - place) * sizeof(gmem_region_t))
    self.regions[place] = region
    self.count += 1
    return NULL


cdef inline bint gmem_remove(gmem_t *self, uint64_t gpa, uint64_t size_bytes, uint64_t user_addr) noexcept nogil:
    """Unmap exactly this region; false when there is none such."""
    cdef uint32_t i
    cdef gmem_region_t *region
    for i in range(self.count):
        region = &self.regions[i]
        if region.gpa == gpa and region.size_bytes == size_bytes and region.user_addr == user_addr:
            foreign_unmap(&region.map)
            self.count -= 1
            memmove(region, region + 1, (self.count - i) * sizeof(gmem_region_t))
            return True
    return False


cdef inline void gmem_clear(gmem_t *self) noexcept nogil:
    """Unmap all regions; the table can be used again."""
    cdef uint32_t i
    for i in range(self.count):
        foreign_unmap(&self.regions[i].map)
    free(self.regions)
    self.regions = NULL
    self.count = 0
    self.capacity = 0
    self.poisoned = 0
