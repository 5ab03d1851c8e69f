"""Owns what a session agrees on: features, protocol features, ownership, status, reset, the back-end channel.

Spec: vhost-user protocol, "Front-end message types"; virtio 1.3, 2.1 for the status. Handlers raise
`Refusal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocssd_daemon.protocol.vhost_user.messages import U64, Message, Refusal
from ocssd_daemon.protocol.vhost_user.wire import DeviceStatus, Feature, ProtocolFeature, bit_names, without

if TYPE_CHECKING:
    from ocssd_daemon.protocol.vhost_user.session import Session

Fds = Sequence[int]
_F = ProtocolFeature


def get_features(session: Session, message: Message, fds: Fds) -> U64:
    return U64(_offered_features(session))


def set_features(session: Session, message: U64, fds: Fds) -> None:
    surplus = without(message.value, _offered_features(session))
    if surplus:
        raise Refusal(f"features were not offered: {bit_names(surplus, Feature)}")
    changed = without(message.value ^ session.features, Feature.LOG_ALL)
    if session.started and changed:
        raise Refusal(f"features cannot change while a ring is started: {bit_names(changed, Feature)}")
    session.backend.set_features(message.value)
    session.features = Feature(message.value)


def _offered_features(session: Session) -> int:
    return session.backend.device_features | Feature.PROTOCOL_FEATURES


def get_protocol_features(session: Session, message: Message, fds: Fds) -> U64:
    return U64(session.offered_protocol_features)


def set_protocol_features(session: Session, message: U64, fds: Fds) -> None:
    surplus = without(message.value, session.offered_protocol_features)
    if surplus:
        raise Refusal(f"protocol features were not offered: {bit_names(surplus, ProtocolFeature)}")
    changed = message.value ^ session.protocol_features
    # Regions were recorded under user or guest-physical addresses; they cannot change their meaning.
    if session.regions and changed & ProtocolFeature.GPA_ADDRESSES:
        raise Refusal("GPA_ADDRESSES cannot change while there are memory regions")
    if message.value & _F.GET_VRING_BASE_INFLIGHT and not message.value & _F.INFLIGHT_SHMFD:
        raise Refusal("GET_VRING_BASE_INFLIGHT needs INFLIGHT_SHMFD")
    session.protocol_features = ProtocolFeature(message.value)


def get_queue_num(session: Session, message: Message, fds: Fds) -> U64:
    return U64(session.num_queues)


def set_owner(session: Session, message: Message, fds: Fds) -> None:
    """A socket has one front end at a time, so the owner is whoever is connected."""


def reset_owner(session: Session, message: Message, fds: Fds) -> None:
    """Deprecated; the spec recommends to disable all rings and to do no more."""
    for index, ring in enumerate(session.rings):
        session.backend.vring_enable(index, False)
        ring.enabled = False


def set_backend_req_fd(session: Session, message: Message, fds: Fds) -> None:
    session.host.open_channel(fds[0])


def reset_device(session: Session, message: Message, fds: Fds) -> None:
    session.backend.reset_device()
    session.rings = [type(ring)() for ring in session.rings]
    session.features = Feature(0)
    session.status = 0


def set_status(session: Session, message: U64, fds: Fds) -> None:
    if message.value > 0xFF:
        raise Refusal(f"status {message.value:#x} is longer than 8 bits")
    # 0 is no reset here: QEMU up to 8 says it first when it stops a device, and asks for the ring bases after it.
    session.status = message.value


def get_status(session: Session, message: Message, fds: Fds) -> U64:
    broken = any(session.backend.broken(index) for index in range(session.num_queues))
    return U64(session.status | (DeviceStatus.DEVICE_NEEDS_RESET if broken else 0))
