"""Owns the messages about shared memory: guest regions, the dirty log, the inflight region.

Spec: vhost-user protocol, "Multiple queue support" for counts, "Migration", "Inflight I/O tracking". What can
be known only from a descriptor (its kind, its size) is checked by the backend when it maps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocssd_daemon.protocol.vhost_user.messages import (
    U64,
    Enclosing,
    Inflight,
    Log,
    MemRegion,
    MemTable,
    Message,
    Refusal,
    Region,
)
from ocssd_daemon.protocol.vhost_user.wire import VIRTQUEUE_SIZE_MAX, ProtocolFeature

if TYPE_CHECKING:
    from ocssd_daemon.protocol.vhost_user.session import Session

Fds = Sequence[int]

# QEMU uses at most 512 and refuses a back end whose number shrank since it last connected: never lower this.
MEM_SLOTS = 509


def get_max_mem_slots(session: Session, message: Message, fds: Fds) -> U64:
    return U64(MEM_SLOTS)


def set_mem_table(session: Session, message: MemTable, fds: Fds) -> None:
    _forget_all(session)
    try:
        for region, fd in zip(message.regions, fds, strict=True):
            _add(session, region, fd)
        session.backend.mem_commit()
    except ValueError:
        _forget_all(session)
        raise


def add_mem_reg(session: Session, message: MemRegion, fds: Fds) -> None:
    if len(session.regions) >= MEM_SLOTS:
        raise Refusal(f"all {MEM_SLOTS} memory slots are in use")
    _add(session, message.region, fds[0])


def rem_mem_reg(session: Session, message: MemRegion, fds: Fds) -> None:
    key = _key(session, message.region)
    if key not in session.regions:
        gpa, size_bytes, user_addr = key
        raise Refusal(f"no region of {size_bytes:#x} bytes at {gpa:#x} (user address {user_addr:#x})")
    session.backend.mem_remove(*key)
    session.regions.remove(key)


def _forget_all(session: Session) -> None:
    session.backend.mem_reset()
    session.regions.clear()


def _add(session: Session, region: Region, fd: int) -> None:
    gpa, size_bytes, user_addr = _key(session, region)
    session.backend.mem_add(gpa, size_bytes, user_addr, region.mmap_offset, fd)
    session.regions.append((gpa, size_bytes, user_addr))


def _key(session: Session, region: Region) -> tuple[int, int, int]:
    # With GPA_ADDRESSES rings are addressed guest-physically: the same as if user addresses equalled them.
    by_gpa = ProtocolFeature.GPA_ADDRESSES in session.protocol_features
    return region.gpa, region.size_bytes, region.gpa if by_gpa else region.user_addr


def set_log_base(session: Session, message: Log, fds: Fds) -> U64:
    if message.size_bytes == 0:
        raise Refusal("the dirty log has no bytes")
    if message.offset_bytes + message.size_bytes >= 1 << 63:
        raise Refusal(f"the dirty log ends beyond any file: {message.offset_bytes} + {message.size_bytes}")
    session.backend.log_base(fds[0], message.size_bytes, message.offset_bytes)
    return U64(0)


def get_inflight_fd(session: Session, message: Inflight, fds: Fds) -> Enclosing:
    _check_queues(session, message)
    fd, size_bytes, offset_bytes = session.backend.inflight_get(message.num_queues, message.queue_size)
    return Enclosing(Inflight(size_bytes, offset_bytes, message.num_queues, message.queue_size), fd)


def set_inflight_fd(session: Session, message: Inflight, fds: Fds) -> None:
    _check_queues(session, message)
    session.backend.inflight_set(
        fds[0], message.mmap_size_bytes, message.mmap_offset_bytes, message.num_queues, message.queue_size
    )


def _check_queues(session: Session, message: Inflight) -> None:
    if not 1 <= message.num_queues <= session.num_queues:
        raise Refusal(f"inflight region for {message.num_queues} queues, must be 1 to {session.num_queues}")
    if not 1 <= message.queue_size <= VIRTQUEUE_SIZE_MAX:
        raise Refusal(f"inflight region for rings of {message.queue_size}, must be 1 to {VIRTQUEUE_SIZE_MAX}")
