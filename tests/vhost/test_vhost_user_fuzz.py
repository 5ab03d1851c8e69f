"""Any sequence of well-framed messages, with any descriptors, is carried out or refused; nothing else happens.

Structure-aware: values are drawn from those that mean something (ring numbers that exist, addresses in and near guest
memory, feature bits that are offered), so that sequences get deep into the rings before they go wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ocssd_daemon._fast import Reactor

from ocssd_daemon._vhost import VhostDevice
from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user.session import OFFERED_PROTOCOL_FEATURES, RULES, Session
from ocssd_daemon.protocol.vhost_user.wire import Feature, Request
from tests.kit.blk_driver import make_target
from tests.kit.guest_memory import PAGE, USER_OFFSET
from tests.kit.vhost_frontend import eventfd

GUEST = 64 * PAGE
NUM_QUEUES = 2

index = st.sampled_from([0, 0, 0, 1, 2, 255, 0xFFFF_FFFF])
number = st.sampled_from([0, 1, 2, 3, 4, 16, 128, 32768, 65535, 0x8000_8000, 0xFFFF_FFFF])
size = st.sampled_from([0, 1, PAGE - 1, PAGE, 2 * PAGE, GUEST, 2 * GUEST, 1 << 40, (1 << 64) - 1])
gpa = st.sampled_from([0, PAGE, 2 * PAGE, 3 * PAGE, GUEST - 16, GUEST - PAGE, GUEST, 1 << 32, (1 << 64) - PAGE])
user = gpa.map(lambda address: (address + USER_OFFSET) & ((1 << 64) - 1)) | gpa
offered = (1 << 28 | 1 << 29 | 1 << 32 | 1 << 34 | 1 << 26 | 1 << 30) | 0
bits = st.sampled_from([0, offered, offered & ~(1 << 34), 1 << 32 | 1 << 30, 1 << 63])
regions = st.builds(m.Region, gpa, size, user, st.sampled_from([0, PAGE, 1, 1 << 63])) | st.just(
    m.Region(0, GUEST, USER_OFFSET, 0)
)
state = st.builds(m.VringState, index, number)
fd_message = st.builds(m.VringFd, index.map(lambda i: i & 0xFF), st.booleans())
inflight = st.builds(m.Inflight, size, size, number.map(lambda n: n & 0xFFFF), number.map(lambda n: n & 0xFFFF))
window = st.sampled_from([m.Config(0, 57, 0, bytes(57)), m.Config(32, 1, 0, b"\0"), m.Config(250, 9, 1, bytes(9))])

PAYLOADS: dict[int, st.SearchStrategy[m.Message]] = {
    Request.SET_FEATURES: st.builds(m.U64, bits),
    Request.SET_PROTOCOL_FEATURES: st.builds(m.U64, st.sampled_from([int(OFFERED_PROTOCOL_FEATURES), 0, 8, 1 << 40])),
    Request.SET_STATUS: st.builds(m.U64, st.sampled_from([0, 0xF, 0x100])),
    Request.SET_MEM_TABLE: st.lists(regions, min_size=1, max_size=3).map(lambda found: m.MemTable(tuple(found))),
    Request.ADD_MEM_REG: st.builds(m.MemRegion, regions),
    Request.REM_MEM_REG: st.builds(m.MemRegion, regions),
    Request.SET_LOG_BASE: st.builds(m.Log, size, size),
    Request.GET_INFLIGHT_FD: inflight,
    Request.SET_INFLIGHT_FD: inflight,
    Request.SET_VRING_NUM: state,
    Request.SET_VRING_BASE: state,
    Request.GET_VRING_BASE: state,
    Request.SET_VRING_ENABLE: state,
    Request.SET_VRING_ADDR: st.builds(m.VringAddr, index, st.sampled_from([0, 0, 1, 2]), user, user, user, gpa),
    Request.SET_VRING_KICK: fd_message,
    Request.SET_VRING_CALL: fd_message,
    Request.SET_VRING_ERR: fd_message,
    Request.GET_CONFIG: window,
    Request.SET_CONFIG: window,
    Request.SET_DEVICE_STATE_FD: st.builds(m.DeviceState, number, number),
}
message = st.sampled_from(sorted(RULES)).flatmap(
    lambda request: st.tuples(st.just(request), PAYLOADS.get(request, st.just(m.Empty())))
)
kinds = st.lists(st.sampled_from(["memory", "memory", "event", "event", "file", "socket"]), max_size=3)


def ring_address(by_gpa: bool) -> m.VringAddr:
    base = 0 if by_gpa else USER_OFFSET
    return m.VringAddr(0, 0, desc=base, used=base + 2 * PAGE, avail=base + PAGE, log=0)


class NoHost:
    """A transport that refuses everything."""

    def open_channel(self, fd: int) -> None:
        raise ValueError("no channel here")

    def keep_wce(self, wce: int) -> None:
        """Forget it."""

    def save_state(self, fd: int, data: bytes) -> None:
        raise ValueError("no state here")

    def hold_state(self, fd: int) -> None:
        """Take it; `load_state` will have nothing."""

    def load_state(self) -> bytes:
        return b""


@pytest.fixture(scope="module")
def descriptors() -> Iterator[dict[str, int]]:
    with ExitStack() as stack:
        memory = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(memory, GUEST)
        found = {
            "memory": memory,
            "event": eventfd(),
            "file": os.open("/proc/self/stat", os.O_RDONLY),
            "socket": os.dup(0),
        }
        for fd in found.values():
            stack.callback(os.close, fd)
        yield found


@pytest.fixture(scope="module")
def target():
    return make_target()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(message, kinds, st.booleans()), max_size=60), st.booleans(), st.binary(max_size=256))
def test_any_sequence_of_messages_is_carried_out_or_refused(target, descriptors, sequence, by_gpa, scribble):
    os.pwrite(descriptors["memory"], scribble * (GUEST // max(1, len(scribble))), 0)
    device = VhostDevice(target.disk, Reactor(0), NUM_QUEUES, "fuzz", 1, attach=False)
    session = Session(device, NUM_QUEUES, NoHost())
    start = int(OFFERED_PROTOCOL_FEATURES) & ~(0 if by_gpa else 1 << 21)
    opening = [
        ((Request.SET_PROTOCOL_FEATURES, m.U64(start)), [], True),
        ((Request.SET_FEATURES, m.U64(offered & ~Feature.RING_PACKED)), [], True),
        ((Request.ADD_MEM_REG, m.MemRegion(m.Region(0, GUEST, USER_OFFSET, 0))), ["memory"], True),
        ((Request.SET_VRING_NUM, m.VringState(0, 16)), [], True),
        ((Request.SET_VRING_ADDR, ring_address(by_gpa)), [], True),
        ((Request.SET_VRING_KICK, m.VringFd(0, True)), ["event"], True),
        ((Request.SET_VRING_ENABLE, m.VringState(0, 1)), [], True),
    ]
    try:
        for (request, what), needed, need_reply in opening + sequence:
            payload = m.encode_payload(what)
            header = m.Header(request, 1 | 8 * need_reply, len(payload))
            answer = session.receive(header, payload, [descriptors[kind] for kind in needed])
            for fd in answer.fds:
                os.close(fd)
            device.process(64)
    finally:
        device.close()
