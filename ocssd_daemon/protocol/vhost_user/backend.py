"""Owns the contracts between a session and what it drives: `Backend`, the rings (`_vhost.VhostDevice` is
one), and `Host`, the descriptors that are no rings' business.

Conventions of every method:
- A descriptor argument is borrowed: the callee maps or duplicates what it keeps, the caller closes its own.
- A refusal is a ValueError whose text is one sentence for the log; nothing has changed then.
- Ring indices, enable values, ring sizes and bases were checked by the session, everything about memory was
  not.
"""

from __future__ import annotations

from typing import Protocol


class Backend(Protocol):
    """Rings, guest memory, dirty log and inflight region of one session."""

    @property
    def device_features(self) -> int:
        """virtio and vhost feature bits that are implemented, without VHOST_USER_F_PROTOCOL_FEATURES."""

    def set_features(self, features: int) -> None:
        """Without VHOST_USER_F_PROTOCOL_FEATURES rings run from their start on, with it once they are enabled."""

    def config(self) -> bytes:
        """struct virtio_blk_config as it is now."""

    def set_wce(self, wce: int) -> None: ...

    def mem_reset(self) -> None:
        """Forget all regions. Rings pause; they go on if `mem_add` brings their memory back."""

    def mem_add(self, gpa: int, size: int, user_addr: int, mmap_offset: int, fd: int) -> None: ...

    def mem_commit(self) -> None:
        """The table is complete: a started ring whose memory did not come back is broken."""

    def mem_remove(self, gpa: int, size: int, user_addr: int) -> None: ...

    def vring_num(self, index: int, num: int) -> None: ...

    def vring_addr(self, index: int, flags: int, desc: int, used: int, avail: int, log: int) -> None: ...

    def vring_base(self, index: int, value: int) -> None: ...

    def vring_get_base(self, index: int) -> int:
        """Drain and stop the ring; where it stands."""

    def vring_kick(self, index: int, fd: int) -> None:
        """Start the ring; -1: there is no kick, poll."""

    def vring_call(self, index: int, fd: int) -> None: ...

    def vring_err(self, index: int, fd: int) -> None: ...

    def vring_enable(self, index: int, enable: bool) -> None: ...

    def log_base(self, fd: int, size: int, offset: int) -> None: ...

    def inflight_get(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """(descriptor, size, offset) of a fresh region; the descriptor belongs to the caller."""

    def inflight_set(self, fd: int, mmap_size: int, offset: int, num_queues: int, queue_size: int) -> None: ...

    def reset_device(self) -> None:
        """Drop rings, features and inflight region; keep memory and error descriptors."""

    def broken(self, index: int) -> bool: ...

    def fault(self, index: int) -> str | None:
        """Why the ring is broken, if it is; one sentence."""

    def stats(self) -> dict[str, int]: ...

    def close(self) -> None:
        """Drain all rings and release every descriptor and mapping."""


class Host(Protocol):
    """What a session asks of its transport."""

    def open_channel(self, fd: int) -> None:
        """Use *fd* to talk to the front end of our own accord."""

    def keep_wce(self, wce: int) -> None:
        """Remember the write cache mode beyond this session and this process."""

    def save_state(self, fd: int, data: bytes) -> None:
        """Write all of *data* now."""

    def hold_state(self, fd: int) -> None:
        """Keep *fd* for `load_state`."""

    def load_state(self) -> bytes:
        """All that the front end wrote to the descriptor kept by `hold_state`, which it has closed by now."""
