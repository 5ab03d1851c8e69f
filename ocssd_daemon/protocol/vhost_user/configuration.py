"""Owns the window on the device configuration space: GET_CONFIG and the one byte that SET_CONFIG may write.

Spec: vhost-user protocol, "Virtio device config space"; virtio 1.3, 5.2.4 for virtio_blk_config. Offsets are
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocssd_daemon.protocol.vhost_user.messages import Config, Refusal
from ocssd_daemon.protocol.vhost_user.wire import CONFIG_DATA_MAX_BYTES, CONFIG_WCE_OFFSET, Feature

if TYPE_CHECKING:
    from ocssd_daemon.protocol.vhost_user.session import Session

Fds = Sequence[int]


def get_config(session: Session, message: Config, fds: Fds) -> Config:
    if message.offset + message.size_bytes > CONFIG_DATA_MAX_BYTES:
        raise Refusal(
            f"{message.size_bytes} bytes at {message.offset} end beyond the {CONFIG_DATA_MAX_BYTES} there are"
        )
    session.known_config = session.backend.config()
    session.wce_is_known(session.known_config[CONFIG_WCE_OFFSET])
    # The space beyond the structure reads as zeroes: a newer driver asks for fields that we do not have.
    space = session.known_config.ljust(CONFIG_DATA_MAX_BYTES, b"\0")
    data = space[message.offset : message.offset + message.size_bytes]
    return Config(message.offset, message.size_bytes, message.flags, data)


def set_config(session: Session, message: Config, fds: Fds) -> None:
    if (message.offset, message.size_bytes) != (CONFIG_WCE_OFFSET, 1):
        raise Refusal(
            f"{message.size_bytes} bytes at {message.offset}: only wce, 1 at {CONFIG_WCE_OFFSET}, is writable"
        )
    if not session.backend.device_features & Feature.CONFIG_WCE:
        raise Refusal("wce is not writable, CONFIG_WCE was not offered")
    wce = message.data[0]
    if wce > 1:
        raise Refusal(f"wce is {wce}, must be 0 or 1")
    session.choose_wce(wce)
    session.known_config = session.backend.config()
