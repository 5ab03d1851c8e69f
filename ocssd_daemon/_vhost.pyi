"""What ``_vhost`` offers to ``transport/vhost_user.py``; the semantics are documented here, the code is in
``_vhost.pyx``.

Every method takes the reactor's lock itself: call them from the trio thread, outside ``reactor.paused()``. A method
that takes a file descriptor duplicates or maps it: the caller still owns, and closes, what it passed.

``ValueError`` carries one sentence about what the peer sent wrong; nothing has changed then. A ring that the *driver*
breaks is not an exception: the reactor reports ``(token, index << 8 | fault)`` and ``fault(index)`` has the sentence.
"""

from ocssd_daemon._fast import Disk, Reactor

MAX_MEMORY_REGIONS: int
VHOST_F_LOG_ALL: int
VHOST_USER_F_PROTOCOL_FEATURES: int
CONFIG_WCE_OFFSET: int
FAULT_MEMORY_LOST: int

class VhostDevice:
    def __init__(
        self, disk: Disk, reactor: Reactor, num_queues: int, serial: str, token: int, *, attach: bool = True
    ) -> None:
        """A virtio-blk device over *disk*; *token* marks its reports. ``attach=False``: only ``process`` serves it."""

    @property
    def num_queues(self) -> int: ...
    @property
    def device_features(self) -> int:
        """The feature bits that are implemented: virtio's and VHOST_F_LOG_ALL (not the protocol-features bit 30)."""

    def set_features(self, features: int) -> None:
        """Acknowledged features; bit 30 is accepted and, when absent, rings need no vring_enable."""

    def config(self) -> bytes:
        """virtio_blk_config as the driver reads it, 60 bytes."""

    def set_wce(self, wce: int) -> None: ...
    def set_read_only(self, read_only: bool) -> None: ...
    def set_gpa_addresses(self, gpa_addresses: bool) -> None:
        """Protocol feature 21: ring addresses are guest-physical, regions carry user address 0."""

    def mem_reset(self) -> None:
        """Drop the whole table (a SET_MEM_TABLE begins); running rings pause until their memory is back."""

    def mem_add(self, gpa: int, size: int, user_addr: int, mmap_offset: int, fd: int) -> None: ...
    def mem_remove(self, gpa: int, size: int, user_addr: int) -> None: ...
    def mem_commit(self) -> None:
        """The table is complete: a started ring whose memory did not come back is broken until addressed again."""

    def vring_num(self, index: int, num: int) -> None: ...
    def vring_addr(self, index: int, flags: int, desc: int, used: int, avail: int, log: int) -> None: ...
    def vring_base(self, index: int, value: int) -> None: ...
    def vring_get_base(self, index: int) -> int:
        """Complete what is in flight, stop the ring, and say where it stands."""

    def vring_kick(self, index: int, fd: int) -> None:
        """The event fd of the driver's notifications; -1: the driver sends none, poll."""

    def vring_call(self, index: int, fd: int) -> None: ...
    def vring_err(self, index: int, fd: int) -> None: ...
    def vring_enable(self, index: int, enable: bool) -> None: ...
    def log_base(self, fd: int, size: int, offset: int) -> None: ...
    def inflight_get(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """A fresh in-flight region ``(fd, mmap_size, offset)``; the caller owns the fd. In force only after
        inflight_set.
        """

    def inflight_set(
        self, fd: int, mmap_size: int, offset: int, num_queues: int, queue_size: int
    ) -> None: ...
    def reset_device(self) -> None:
        """RESET_DEVICE: rings, enables and features go; memory regions and error fds stay."""

    def process(self, budget: int) -> int:
        """Serve up to *budget* requests now, on the calling thread; returns how many were done."""

    def arm(self) -> bool:
        """Ask for notifications as before a sleep; true when there is work already."""

    def disarm(self) -> None:
        """Suppress notifications as after a sleep."""

    def broken(self, index: int) -> bool: ...
    def fault(self, index: int) -> str | None:
        """What the driver did to break the ring, one sentence."""

    @property
    def poisoned(self) -> bool:
        """A file behind a mapping was truncated: the session cannot go on."""

    def stats(self) -> dict[str, int]: ...
    def close(self) -> None:
        """Stop all rings, unmap everything, leave the reactor. Idempotent."""
