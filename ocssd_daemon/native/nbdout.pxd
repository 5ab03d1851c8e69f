"""Owns what an NBD connection still has to send: a queue of blocks, sent with one system call per batch.

Small replies are written one behind the other into a block that is used again and again, so that it stays in the
cache; a large reply, or one that waited for its deadline, comes as a block of its own and is linked in, not copied.
Blocks of the usual size are kept for the next reply: malloc would give such memory back to the kernel, and taking it
anew costs a page fault per 4 KiB, which is as much as filling it (measured: a third of the loop's time in nbdcopy).
Lengths in bytes. Knows no NBD.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from ocssd_daemon.native.sys cimport iovec

cdef extern from "errno.h" nogil:
    int errno
    int EAGAIN
    int EINTR

cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef enum:
    OUT_BLOCK_BYTES = 260 * 1024    # one reply of 256 KiB (nbdcopy), or 60 of 4 KiB; fits the second-level cache
    OUT_SPARES = 6                  # blocks kept for reuse: what the limit of unsent bytes lets through
    OUT_IOVS = 16                   # blocks per sendmsg

cdef enum:                          # results of out_send
    OUT_EMPTY = 0
    OUT_BLOCKED = 1                 # the peer does not read: wait for EPOLLOUT
    OUT_DEAD = -1


ctypedef struct block_t:
    block_t *next
    uint32_t head                   # first byte that is not sent
    uint32_t tail                   # end of what is written
    uint32_t size
    char *data

ctypedef struct out_t:
    block_t *first
    block_t *last
    uint64_t bytes                  # not sent yet
    block_t *spare                  # empty blocks of OUT_BLOCK_BYTES
    uint32_t spares


cdef inline block_t *block_new(uint32_t size) noexcept nogil:
    """A block with room for *size* bytes, or NULL."""
    cdef block_t *block = <block_t *>malloc(sizeof(block_t) + size)
    if block != NULL:
        block.next = NULL
        block.head = block.tail = 0
        block.size = size
        block.data = <char *>(block + 1)
    return block


cdef inline block_t *out_block(out_t *out, uint32_t size) noexcept nogil:
    """A block for a reply of *size* bytes, if possible one that was used before; NULL without memory."""
    cdef block_t *block = out.spare
    if size > OUT_BLOCK_BYTES:
        return block_new(size)
    if block == NULL:
        return block_new(OUT_BLOCK_BYTES)
    out.spare = block.next
    out.spares -= 1
    block.next = NULL
    block.head = block.tail = 0
    return block


cdef inline void out_recycle(out_t *out, block_t *block) noexcept nogil:
    if block.size != OUT_BLOCK_BYTES or out.spares == OUT_SPARES:
        free(block)
        return
    block.next = out.spare
    out.spare = block
    out.spares += 1


cdef inline void out_append(out_t *out, block_t *block) noexcept nogil:
    """Queue *block*, which then belongs to the queue."""
    if out.last == NULL:
        out.first = block
    else:
        out.last.next = block
    out.last = block
    out.bytes += block.tail - block.head


cdef inline char *out_room(out_t *out, uint32_t n) noexcept nogil:
    """*n* bytes of room behind what is queued, or NULL; ``out_commit`` says how many of them are used."""
    cdef block_t *block = out.last
    if block != NULL and block.size - block.tail >= n:
        return block.data + block.tail
    block = out_block(out, n)
    if block == NULL:
        return NULL
    out_append(out, block)
    return block.data


cdef inline void out_commit(out_t *out, uint32_t n) noexcept nogil:
    out.last.tail += n
    out.bytes += n


cdef inline void out_retire(out_t *out) noexcept nogil:
    """The first block is sent: write on at its start if it is the only one, else keep it for later."""
    cdef block_t *block = out.first
    if block == out.last and block.size == OUT_BLOCK_BYTES:
        block.head = block.tail = 0
        return
    out.first = block.next
    if out.first == NULL:
        out.last = NULL
    out_recycle(out, block)


cdef inline void out_sent(out_t *out, uint64_t n) noexcept nogil:
    cdef block_t *block
    out.bytes -= n
    while True:
        block = out.first
        if n < block.tail - block.head:
            block.head += <uint32_t>n
            return
        n -= block.tail - block.head
        out_retire(out)
        if n == 0:
            return


cdef inline int out_send(out_t *out, int fd) noexcept nogil:
    """Send as much as the socket takes. Returns OUT_EMPTY, OUT_BLOCKED or OUT_DEAD."""
    cdef iovec iov[OUT_IOVS]
    cdef msghdr message
    cdef block_t *block
    cdef ssize_t sent
    message.msg_name = NULL
    message.msg_namelen = 0
    message.msg_iov = iov
    while out.bytes:
        block = out.first
        message.msg_iovlen = 0
        while block != NULL and message.msg_iovlen < OUT_IOVS:
            iov[message.msg_iovlen].iov_base = block.data + block.head
            iov[message.msg_iovlen].iov_len = block.tail - block.head
            message.msg_iovlen += 1
            block = block.next
        sent = sendmsg_plain(fd, &message)
        if sent < 0:
            return OUT_BLOCKED if errno == EAGAIN else OUT_DEAD
        out_sent(out, <uint64_t>sent)
    return OUT_EMPTY


cdef inline void blocks_free(block_t *block) noexcept nogil:
    cdef block_t *following
    while block != NULL:
        following = block.next
        free(block)
        block = following


cdef inline void out_free(out_t *out) noexcept nogil:
    blocks_free(out.first)
    blocks_free(out.spare)
    out.first = out.last = out.spare = NULL
    out.bytes = out.spares = 0


cdef extern from *:
    """
    #include <errno.h>
    #include <string.h>
    #include <sys/socket.h>
    /* No control data and no SIGPIPE: a peer that went away is an errno, not a signal for the whole process. */
    static inline ssize_t ocssd_sendmsg_plain(int fd, struct msghdr *message) {
        ssize_t sent;
        message->msg_control = 0;
        message->msg_controllen = 0;
        message->msg_flags = 0;
        do sent = sendmsg(fd, message, MSG_NOSIGNAL | MSG_DONTWAIT); while (sent < 0 && errno == EINTR);
        return sent;
    }
    """
    ssize_t sendmsg_plain "ocssd_sendmsg_plain" (int fd, msghdr *message) noexcept nogil
