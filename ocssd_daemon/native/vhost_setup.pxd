"""Owns what the front end says about the device: features, memory, addresses, fds, and the reset.

Each function that a front end can misuse returns NULL or the sentence that refuses it; nothing has changed then. The
order of the messages about a ring is free: they take effect when it starts (``vhost_rings``). Everything runs under the
reactor's lock; fds that come in stay the caller's.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ocssd_daemon.native.chain cimport FAULT_NONE
from ocssd_daemon.native.dirtylog cimport dirtylog_attach, dirtylog_detach
from ocssd_daemon.native.disk cimport disk_t
from ocssd_daemon.native.foreign cimport foreign_map, foreign_t, foreign_unmap
from ocssd_daemon.native.gmem cimport gmem_add, gmem_clear, gmem_remove
from ocssd_daemon.native.inflight cimport inflight_queue_bytes
from ocssd_daemon.native.inflight_recovery cimport inflight_stop
from ocssd_daemon.native.reactor cimport reactor_add, reactor_drain, reactor_remove, reactor_t, reactor_watch
from ocssd_daemon.native.vblk cimport vblk_init
from ocssd_daemon.native.vhost cimport (
    vhost_addr_t, vhost_arm, vhost_complete, vhost_disarm, vhost_poll, vhost_queue_t, vhost_ready, vhost_relist,
    vhost_t,
)
from ocssd_daemon.native.vhost_rings cimport (
    VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_RING_PACKED, VRING_F_LOG, vhost_break_unmapped,
    vhost_drain, vhost_forget, vhost_halt, vhost_has, vhost_map_ring, vhost_position, vhost_remap, vhost_set_fd,
    vhost_start_if_ready, vhost_stop,
)
from ocssd_daemon.native.vring cimport VRING_NUM_MAX, fd_may_block, vring_t

cdef extern from "fcntl.h" nogil:
    int fcntl(int, int, int)
    int F_DUPFD_CLOEXEC

cdef extern from "unistd.h" nogil:
    int close(int)

cdef extern from "sys/epoll.h" nogil:
    uint32_t EPOLLIN
    uint32_t EPOLLET

cdef extern from *:
    """
    #include <stdio.h>
    #include <string.h>
    #include <unistd.h>
    /* Anything else may block us, never become ready, or be ready for ever. Without /proc nobody can tell: accept. */
    static int ocssd_is_eventfd(int fd) {
        char path[32], target[32];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0) return access("/proc/self/fd", F_OK) != 0;
        target[n] = 0;
        return strcmp(target, "anon_inode:[eventfd]") == 0;
    }
    """
    bint is_eventfd "ocssd_is_eventfd" (int fd) noexcept nogil


cdef enum:
    MEMORY_REGIONS = 509        # GET_MAX_MEM_SLOTS; what the kernel's vhost offers by default


# ---- features and rings ----------------------------------------------------------------------------------------------

cdef inline bint vhost_any_started(const vhost_t *self) noexcept nogil:
    cdef uint32_t i
    for i in range(self.queue_count):
        if self.queues[i].started:
            return True
    return False


cdef inline const char *vhost_set_features(vhost_t *self, uint64_t features, uint64_t offered) noexcept nogil:
    cdef uint64_t protocol = 1ull << VHOST_USER_F_PROTOCOL_FEATURES
    cdef uint64_t log_all = 1ull << VHOST_F_LOG_ALL
    cdef uint64_t virtio = features & ~protocol
    if virtio & ~offered:
        return "a feature was acknowledged that was not offered"
    if vhost_any_started(self) and (virtio ^ self.blk.features) & ~log_all:
        return "only VHOST_F_LOG_ALL may change while a ring is started"
    self.blk.features = virtio
    self.log.active = (virtio & log_all) != 0
    self.enable_needed = (features & protocol) != 0
    self.features_set = True
    vhost_relist(self)
    return NULL


cdef inline const char *vhost_vring_num(vhost_t *self, vhost_queue_t *queue, uint64_t num) noexcept nogil:
    if queue.started:
        return "the ring is running"
    if num == 0 or num > VRING_NUM_MAX:
        return "the size is not in 1..32768"
    if num & (num - 1) and not vhost_has(self, VIRTIO_F_RING_PACKED):
        return "the size of a split ring must be a power of two"
    queue.num = <uint32_t>num
    return NULL


cdef inline bint vhost_misaligned(const vhost_t *self, uint64_t desc, uint64_t used, uint64_t avail) noexcept nogil:
    return desc & 15 or used & 3 or avail & (3 if vhost_has(self, VIRTIO_F_RING_PACKED) else 1)


cdef inline void vhost_readdress(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    """A running ring goes on at its new addresses (migration turns its log on and off so), a broken one begins anew."""
    if queue.fault:
        vhost_halt(self, queue)
        queue.fault = FAULT_NONE
    if queue.started:
        queue.ring.log_used = queue.addr.flags & VRING_F_LOG
        queue.ring.log_gpa = queue.addr.log
        vhost_map_ring(self, queue.num, &queue.addr, &queue.ring)
    vhost_start_if_ready(self, queue)


cdef inline const char *vhost_vring_addr(vhost_t *self, vhost_queue_t *queue, uint32_t flags, uint64_t desc,
                                         uint64_t used,
                                         uint64_t avail, uint64_t log) noexcept nogil:
    cdef vhost_addr_t addr
    cdef vring_t mapped
    if queue.num == 0:
        return "the addresses came before the size"
    if flags & ~<uint32_t>VRING_F_LOG:
        return "unknown flags"
    if vhost_misaligned(self, desc, used, avail):
        return "a ring address is misaligned"
    addr.flags = flags
    addr.desc = desc
    addr.used = used
    addr.avail = avail
    addr.log = log
    if not vhost_map_ring(self, queue.num, &addr, &mapped):
        return "a part of the ring is not inside one memory region"
    if queue.started:
        vhost_drain(self)
    queue.addr = addr
    queue.addressed = True
    vhost_readdress(self, queue)
    return NULL


cdef inline const char *vhost_vring_base(vhost_t *self, vhost_queue_t *queue, uint64_t value) noexcept nogil:
    cdef bint packed = vhost_has(self, VIRTIO_F_RING_PACKED)
    if queue.started:
        return "the ring is running"
    if value >> (32 if packed else 16):
        return "the index is too large"
    if packed and queue.num and ((value & 0x7fff) >= queue.num or (value >> 16 & 0x7fff) >= queue.num):
        return "the index is not below the ring size"
    queue.base = <uint32_t>value
    return NULL


# ---- fds -------------------------------------------------------------------------------------------------------------

cdef inline const char *vhost_adopt(int fd, int *own) noexcept nogil:
    """A duplicate of the front end's eventfd in *own*; -1 stays -1."""
    own[0] = -1
    if fd < 0:
        return NULL
    if not is_eventfd(fd):
        return "the file descriptor is not an eventfd"
    own[0] = fcntl(fd, F_DUPFD_CLOEXEC, 3)
    if own[0] < 0:
        return "no file descriptor is left for it"
    return NULL


cdef inline const char *vhost_vring_kick(vhost_t *self, vhost_queue_t *queue, int fd) noexcept nogil:
    cdef int own
    cdef const char *refusal = vhost_adopt(fd, &own)
    if refusal != NULL:
        return refusal
    # Edge-triggered: a kick that nobody reads is reported once, whatever the peer did to the counter.
    if own >= 0 and reactor_watch(self.reactor, &self.source, own, EPOLLIN | EPOLLET):
        close(own)
        return "the file descriptor cannot be polled"
    vhost_set_fd(self, &queue.kick_fd, own)
    queue.kicked = True
    vhost_start_if_ready(self, queue)
    return NULL


cdef inline const char *vhost_vring_call(vhost_t *self, vhost_queue_t *queue, int fd) noexcept nogil:
    cdef int own
    cdef const char *refusal = vhost_adopt(fd, &own)
    if refusal == NULL:
        vhost_set_fd(self, &queue.ring.call_fd, own)
        queue.ring.call_may_block = fd_may_block(own)
    return refusal


cdef inline const char *vhost_vring_err(vhost_t *self, vhost_queue_t *queue, int fd) noexcept nogil:
    cdef int own
    cdef const char *refusal = vhost_adopt(fd, &own)
    if refusal == NULL:
        vhost_set_fd(self, &queue.err_fd, own)
    return refusal


# ---- memory, log, in-flight region -----------------------------------------------------------------------------------

cdef inline const char *vhost_mem_add(vhost_t *self, uint64_t gpa, uint64_t size_bytes, uint64_t user_addr,
                                      uint64_t offset_bytes, int fd) noexcept nogil:
    cdef const char *refusal
    if self.memory.count == MEMORY_REGIONS:
        return "no memory slot is left"
    refusal = gmem_add(&self.memory, gpa, size_bytes, user_addr, offset_bytes, fd, True)
    if refusal == NULL:
        vhost_remap(self)
    return refusal


cdef inline const char *vhost_mem_remove(vhost_t *self, uint64_t gpa, uint64_t size_bytes,
                                         uint64_t user_addr) noexcept nogil:
    vhost_drain(self)
    if not gmem_remove(&self.memory, gpa, size_bytes, user_addr):
        return "there is no such memory region"
    vhost_remap(self)
    vhost_break_unmapped(self)
    return NULL


cdef inline void vhost_mem_reset(vhost_t *self) noexcept nogil:
    vhost_drain(self)
    gmem_clear(&self.memory)
    vhost_remap(self)


cdef inline const char *vhost_log_base(vhost_t *self, int fd, uint64_t size_bytes,
                                       uint64_t offset_bytes) noexcept nogil:
    return dirtylog_attach(&self.log, fd, size_bytes, offset_bytes, &self.memory.poisoned)


cdef inline const char *vhost_inflight_refusal(const vhost_t *self, uint64_t num_queues,
                                               uint64_t queue_size) noexcept nogil:
    if num_queues == 0 or num_queues > self.queue_count:
        return "the number of queues is not in the device's range"
    if queue_size == 0 or queue_size > VRING_NUM_MAX:
        return "the queue size is not in 1..32768"
    return NULL


cdef inline uint64_t vhost_inflight_bytes(const vhost_t *self, uint32_t num_queues, uint32_t queue_size) noexcept nogil:
    return num_queues * inflight_queue_bytes(queue_size, vhost_has(self, VIRTIO_F_RING_PACKED))


cdef inline const char *vhost_inflight_set(vhost_t *self, int fd, uint64_t size_bytes, uint64_t offset_bytes,
                                           uint64_t num_queues, uint64_t queue_size) noexcept nogil:
    cdef foreign_t map
    cdef const char *refusal = vhost_inflight_refusal(self, num_queues, queue_size)
    if refusal == NULL and vhost_any_started(self):
        refusal = "a ring is running"
    if refusal == NULL and size_bytes < vhost_inflight_bytes(self, <uint32_t>num_queues, <uint32_t>queue_size):
        refusal = "the region is too small for its queues"
    if refusal == NULL and offset_bytes & 7:
        refusal = "the offset is misaligned"
    if refusal == NULL:
        refusal = foreign_map(&map, fd, size_bytes, offset_bytes, True, &self.memory.poisoned)
    if refusal != NULL:
        return refusal
    foreign_unmap(&self.inflight_map)
    self.inflight_map = map
    self.inflight_queues = <uint32_t>num_queues
    self.inflight_queue_size = <uint32_t>queue_size
    return NULL


# ---- the whole device ------------------------------------------------------------------------------------------------

cdef inline void vhost_reset_queue(vhost_t *self, vhost_queue_t *queue) noexcept nogil:
    vhost_stop(self, queue)
    vhost_set_fd(self, &queue.ring.call_fd, -1)
    memset(&queue.addr, 0, sizeof(queue.addr))
    queue.fault = FAULT_NONE
    queue.num = 0
    queue.base = 0
    queue.addressed = False
    queue.enabled = False


cdef inline void vhost_reset(vhost_t *self) noexcept nogil:
    """RESET_DEVICE. Memory, error fds and the write cache mode stay: a front end does not send them again."""
    cdef uint32_t i
    for i in range(self.queue_count):
        vhost_reset_queue(self, &self.queues[i])
    foreign_unmap(&self.inflight_map)
    self.blk.features = 0
    self.log.active = False
    self.enable_needed = True
    vhost_relist(self)


cdef inline bint vhost_init(vhost_t *self, disk_t *disk, reactor_t *reactor, uint32_t queue_count,
                            uint64_t token) noexcept nogil:
    """On zeroed memory; false when out of memory (vhost_close still applies)."""
    cdef uint32_t i
    self.source.poll = vhost_poll
    self.source.arm = vhost_arm
    self.source.disarm = vhost_disarm
    self.source.ready = vhost_ready
    self.source.complete = vhost_complete
    self.source.token = token
    self.source.memory_polled = 1
    self.reactor = reactor
    self.enable_needed = True
    vblk_init(&self.blk, disk, &self.log)
    self.queues = <vhost_queue_t *>calloc(queue_count, sizeof(vhost_queue_t))
    self.live = <vhost_queue_t **>calloc(queue_count, sizeof(vhost_queue_t *))
    if self.queues == NULL or self.live == NULL:
        return False
    self.queue_count = queue_count
    for i in range(queue_count):
        self.queues[i].index = <uint16_t>i
        self.queues[i].kick_fd = self.queues[i].err_fd = self.queues[i].ring.call_fd = -1
        self.queues[i].ring.memory = &self.memory
        self.queues[i].ring.log = &self.log
    return True


cdef inline void vhost_leave_records(vhost_t *self) noexcept nogil:
    """Let go of the in-flight records as they are: they alone tell a successor where a packed ring stands."""
    cdef uint32_t i
    vhost_drain(self)
    for i in range(self.queue_count):
        inflight_stop(&self.queues[i].ring.inflight, False)


cdef inline void vhost_close(vhost_t *self) noexcept nogil:
    """Stop, leave the reactor, unmap and close everything. Who comes next goes on where the rings stand."""
    cdef uint32_t i
    vhost_leave_records(self)
    vhost_reset(self)
    reactor_remove(self.reactor, &self.source)
    for i in range(self.queue_count):
        vhost_set_fd(self, &self.queues[i].err_fd, -1)
    dirtylog_detach(&self.log)
    gmem_clear(&self.memory)
    free(self.queues)
    free(self.live)
    self.queues = NULL
    self.live = NULL
    self.queue_count = 0
