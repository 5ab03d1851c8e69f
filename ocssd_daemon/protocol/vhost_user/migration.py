"""Owns the transfer of device state for migration and snapshots (vhost-user protocol, "Migrating back-end
state").

Rings, features and memory are the front end's to move. What is left is the little that a driver set in us and
that nobody would set again: the write cache mode. So the state fits any pipe, and a transfer is over when its
message is answered; there is nothing to wait for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

from construct import Const, ConstructError, Int8ul, Int32ul, Padding, Struct, Terminated

from ocssd_daemon.protocol.vhost_user.messages import U64, DeviceState, Message, Refusal
from ocssd_daemon.protocol.vhost_user.wire import CONFIG_WCE_OFFSET

if TYPE_CHECKING:
    from ocssd_daemon.protocol.vhost_user.session import Session

Fds = Sequence[int]

SAVE, LOAD = 0, 1
STOPPED = 0  # the only phase there is
DONE, FAILED, NO_FD = 0, 1, 1 << 8  # NO_FD: the front end's descriptor is used, we send none

# Little-endian whatever the host: a migration may end on another machine.
State = Struct(
    "magic" / Const(b"OCSSDVHB"),
    "version" / Const(1, Int32ul),
    "wce" / Int8ul,
    Padding(3),
    Terminated,
)


class Transfer(enum.Enum):
    """How far the last transfer is."""

    NONE = enum.auto()
    SAVED = enum.auto()
    LOADING = enum.auto()
    BROKEN = enum.auto()


def set_device_state_fd(session: Session, message: DeviceState, fds: Fds) -> U64:
    try:
        session.transfer = _begin(session, message, fds[0])
    except ValueError:
        session.transfer = Transfer.BROKEN
        return U64(FAILED | NO_FD)
    return U64(NO_FD)


def _begin(session: Session, message: DeviceState, fd: int) -> Transfer:
    if message.phase != STOPPED or session.started:
        raise Refusal("state moves only while all rings are stopped")
    if message.direction == SAVE:
        session.host.save_state(fd, State.build({"wce": session.backend.config()[CONFIG_WCE_OFFSET]}))
        return Transfer.SAVED
    if message.direction == LOAD:
        session.host.hold_state(fd)
        return Transfer.LOADING
    raise Refusal(f"direction {message.direction} is neither save nor load")


def check_device_state(session: Session, message: Message, fds: Fds) -> U64:
    transfer, session.transfer = session.transfer, Transfer.NONE
    if transfer is Transfer.LOADING:
        return U64(_load(session))
    return U64(DONE if transfer is Transfer.SAVED else FAILED)


def _load(session: Session) -> int:
    try:
        session.choose_wce(State.parse(session.host.load_state()).wce)
    except (ValueError, ConstructError):
        return FAILED
    return DONE
