"""Owns what a virtqueue is, apart from its layout in memory: positions, the completions not yet published, when to
signal.

virtio 1.3 section 2.6-2.8. ``vring_split`` and ``vring_packed`` own the two layouts and ``virtqueue`` chooses between
them; ``inflight`` records what a successor needs. A ring is one-writer: the reactor, under its lock.

Completions gather in ``batch`` and are published together, because each publication moves a cache line to the
driver's CPU and may cost a system call. The positions count ring slots: split indices run freely modulo 2^16, packed
ones stay below ``num`` and carry a wrap bit.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ocssd_daemon.native.dirtylog cimport dirtylog_mark, dirtylog_t
from ocssd_daemon.native.gmem cimport gmem_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <unistd.h>
    /* The peer chooses the flags of its eventfd and may have filled it. One that blocks is asked first; one that has become
       so since held the loop until device.py's guard interrupted it, which is what a return value of 1 says. */
    static inline int ocssd_signal_peer(int fd, int may_block) {
        uint64_t one = 1;
        struct pollfd writable = { fd, POLLOUT, 0 };
        if (fd < 0 || (may_block && poll(&writable, 1, 0) <= 0)) return 0;
        return write(fd, &one, sizeof one) < 0 && errno == EINTR;
    }
    static inline int ocssd_fd_may_block(int fd) {
        int flags = fcntl(fd, F_GETFL);
        return flags < 0 || !(flags & O_NONBLOCK);
    }
    """
    bint signal_peer "ocssd_signal_peer" (int fd, int may_block) noexcept nogil
    int fd_may_block "ocssd_fd_may_block" (int fd) noexcept nogil


cdef enum:
    VRING_NUM_MAX = 32768
    VRING_BATCH = 16            # completions published together at most

    DESC_BYTES = 16
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4

    TAKEN_PARKED = 1            # in `taken`: in flight until completed; larger values are batch numbers


ctypedef struct vring_desc_t:
    uint64_t gpa
    uint32_t length_bytes
    uint16_t flags
    uint16_t next

ctypedef struct packed_desc_t:
    uint64_t gpa
    uint32_t length_bytes
    uint16_t id
    uint16_t flags

ctypedef struct vring_used_t:
    uint16_t id
    uint16_t ring_slots
    uint32_t written_bytes

# One ring's queue region (protocols.md 1.7) and our own copy of its free list: the shared one is only written.
ctypedef struct inflight_t:
    char *region                # NULL: nothing is recorded
    uint64_t counter
    uint16_t *resubmit          # entries (split: heads) that a predecessor left unfinished, in the order it took them
    uint32_t resubmit_count
    uint32_t resubmit_done
    uint16_t last_batch         # split
    uint16_t free_head          # the rest is for packed rings
    uint16_t tail               # shadow entry of the last descriptor of the chain being taken
    uint16_t *next
    uint16_t *last              # by head entry
    uint16_t *entry_of_id

ctypedef struct vring_t:
    gmem_t *memory
    dirtylog_t *log
    char *desc                  # the three areas, translated; NULL while the ring is not mapped
    char *avail                 # packed: driver event suppression
    char *used                  # packed: device event suppression
    uint32_t num
    bint packed
    bint event_idx
    bint indirect
    bint log_used               # SET_VRING_ADDR bit 0
    uint64_t log_gpa            # where the used area is in the log
    uint64_t desc_gpa           # where the descriptors are (packed rings are written there)
    uint16_t next_avail
    uint16_t seen_avail         # split: the driver's index as last read
    uint16_t next_used
    uint8_t avail_wrap
    uint8_t used_wrap
    uint32_t in_flight_slots    # taken and not yet published
    uint32_t batch_count
    uint32_t unannounced        # slots published since we last asked whether the driver wants a signal
    uint64_t batch_number
    uint64_t *taken             # per id: the batch in which it was last taken, or TAKEN_PARKED
    int call_fd
    int call_may_block
    uint64_t signals
    inflight_t inflight
    vring_used_t batch[VRING_BATCH]


cdef inline bint vring_take(vring_t *self, uint16_t id) noexcept nogil:
    """Mark *id* as in the device's hands; false when it already is (the driver may not reuse it yet)."""
    if self.taken[id] == self.batch_number or self.taken[id] == TAKEN_PARKED:
        return False
    self.taken[id] = self.batch_number
    return True


cdef inline void vring_log_used(vring_t *self, uint64_t offset_bytes, uint64_t length_bytes) noexcept nogil:
    if self.log_used and self.log.active:
        dirtylog_mark(self.log, self.log_gpa + offset_bytes, length_bytes)


cdef inline bint vring_event_passed(uint16_t event, uint16_t position, uint32_t moved) noexcept nogil:
    """Has the position, in its last *moved* steps, gone past *event*? (virtio 1.3, 2.7.10)"""
    return moved > 0xffff or <uint16_t>(position - event - 1) < moved
