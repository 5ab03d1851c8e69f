"""Owns the messages about one ring: size, place, position, descriptors, enable.

Spec: vhost-user protocol, "Ring states", "Vring state description". That a ring index exists is checked
before a handler runs; that a ring's addresses lie in guest memory is checked by the backend, which knows the
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocssd_daemon.protocol.vhost_user.messages import Refusal, VringAddr, VringFd, VringState
from ocssd_daemon.protocol.vhost_user.wire import VIRTQUEUE_SIZE_MAX, VRING_FLAG_LOG, Feature

if TYPE_CHECKING:
    from ocssd_daemon.protocol.vhost_user.session import Session

Fds = Sequence[int]


def set_vring_num(session: Session, message: VringState, fds: Fds) -> None:
    _check_stopped(session, message.index)
    num = message.num
    if not 1 <= num <= VIRTQUEUE_SIZE_MAX:
        raise Refusal(f"ring of {num} descriptors, must be 1 to {VIRTQUEUE_SIZE_MAX}")
    if not _is_packed(session) and num & (num - 1):
        raise Refusal(f"split ring of {num} descriptors, must be a power of two")
    session.backend.vring_num(message.index, num)
    session.rings[message.index].num = num


def set_vring_addr(session: Session, message: VringAddr, fds: Fds) -> None:
    # Allowed while the ring runs: this is how a front end switches the logging of the used ring.
    if message.flags & ~VRING_FLAG_LOG:
        raise Refusal(f"unknown flags {message.flags:#x}")
    session.backend.vring_addr(message.index, message.flags, message.desc, message.used, message.avail, message.log)


def set_vring_base(session: Session, message: VringState, fds: Fds) -> None:
    _check_stopped(session, message.index)
    check = _check_packed_base if _is_packed(session) else _check_split_base
    check(message.num, session.rings[message.index].num)
    session.backend.vring_base(message.index, message.num)


def _check_split_base(base: int, num: int) -> None:
    if base > 0xFFFF:
        raise Refusal(f"base {base:#x}, an index has 16 bits")


def _check_packed_base(base: int, num: int) -> None:
    avail, used = base & 0x7FFF, base >> 16 & 0x7FFF
    if avail >= num or used >= num:
        raise Refusal(f"base {base:#x} has an index that is not below the ring size {num}")


def get_vring_base(session: Session, message: VringState, fds: Fds) -> VringState:
    base = session.backend.vring_get_base(message.index)
    session.rings[message.index].started = False
    return VringState(message.index, base)


def set_vring_kick(session: Session, message: VringFd, fds: Fds) -> None:
    session.continue_configuration()
    session.backend.vring_kick(message.index, _fd(message, fds))
    session.rings[message.index].started = True


def set_vring_call(session: Session, message: VringFd, fds: Fds) -> None:
    session.backend.vring_call(message.index, _fd(message, fds))


def set_vring_err(session: Session, message: VringFd, fds: Fds) -> None:
    session.backend.vring_err(message.index, _fd(message, fds))


def set_vring_enable(session: Session, message: VringState, fds: Fds) -> None:
    if message.num not in (0, 1):
        raise Refusal(f"enable is {message.num}, must be 0 or 1")
    enable = bool(message.num)
    session.backend.vring_enable(message.index, enable)
    session.rings[message.index].enabled = enable


def _fd(message: VringFd, fds: Fds) -> int:
    return fds[0] if message.has_fd else -1


def _is_packed(session: Session) -> bool:
    return Feature.RING_PACKED in session.features


def _check_stopped(session: Session, index: int) -> None:
    if session.rings[index].started:
        raise Refusal(f"ring {index} is started")
