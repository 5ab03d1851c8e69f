"""The socket that trio and the reactor read in turn: order, handover at any byte, descriptors, slow readers."""

from __future__ import annotations

import errno
import os
import random
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ocssd_daemon._nvme import BAD_DOORBELL

from ocssd_daemon import _vfio
from ocssd_daemon.protocol.vfio_user import wire
from tests.kit.nvme_host import CSTS, DOORBELLS, VS
from tests.kit.nvme_target import attached, serving
from tests.kit.vfio_user_client import (
    BAR0,
    BAR4,
    CONFIG,
    GET_INFO,
    HEADER,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    WRITE_MULTI,
    VfioError,
)

VERSION_1_3 = 0x00010300


@pytest.fixture
def target(tmp_path):
    with serving(str(tmp_path / "s"), ("block",)) as running:
        yield running


@pytest.fixture
def host(target):
    with attached(target) as ready:
        ready.create_queue()
        yield ready


def socket_of(target):
    return target.server._live._socket


def message(number, command, payload, flags=0):
    return HEADER.pack(number, command, 16 + len(payload), flags, 0) + payload


def register_read(number, offset=VS, count=4, region=BAR0):
    return message(number, REGION_READ, struct.pack("<QII", offset, region, count))


def doorbell_write(number, offset, value, flags=0):
    return message(number, REGION_WRITE, struct.pack("<QIII", DOORBELLS + offset, BAR0, 4, value), flags)


def test_commands_and_register_reads_do_not_come_by_trio(target, host):
    host.read_blocks(0, 1)
    socket = socket_of(target)
    host.read32(CSTS)
    returns, served = socket.returns, socket.served
    for _ in range(50):
        assert host.read_blocks(0, 1)[0].status == 0
        assert host.read32(VS) == VERSION_1_3
    assert socket.returns == returns
    assert socket.served == served + 50 * 3                     # SQ tail, CQ head, register


def test_replies_keep_the_order_of_requests_that_the_reactor_and_trio_serve(host):
    """Known and unknown messages at random, all in one piece: each reply belongs to the next request."""
    chance = random.Random(1)
    kinds = {
        "register": lambda n: (register_read(n), struct.pack("<QIII", VS, BAR0, 4, VERSION_1_3)),
        "config": lambda n: (register_read(n, 0, 4, CONFIG), struct.pack("<QIII", 0, CONFIG, 4, 0x1F1F1D1D)),
        "doorbell": lambda n: (doorbell_write(n, 8, 0), struct.pack("<QII", DOORBELLS + 8, BAR0, 4)),
        "info": lambda n: (message(n, GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)), struct.pack("<IIII", 16, 3, 9, 5)),
        "posted": lambda n: (doorbell_write(n, 12, 0, NO_REPLY), None),
    }
    sent = [(number, *kinds[chance.choice(list(kinds))](number)) for number in range(1000, 1300)]
    host.client.sock.sendall(b"".join(raw for _, raw, _ in sent))
    for number, _, expected in sent:
        if expected is not None:
            got, _, flags, error, payload = host.client.receive()
            assert (got, flags, error, payload) == (number, 1, 0, expected)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31, 35])
def test_a_message_in_two_pieces_is_one_message(target, host, cut):
    raw = doorbell_write(77, 8, 0)
    host.client.sock.sendall(register_read(76) + raw[:cut])
    assert host.client.receive()[0] == 76
    while socket_of(target).lent:                            # until trio has the rest to wait for
        pass
    host.client.sock.sendall(raw[cut:] + register_read(78))
    assert [host.client.receive()[0] for _ in range(2)] == [77, 78]


def test_half_a_message_does_not_keep_the_reactor_awake(target, host):
    host.client.sock.sendall(register_read(5)[:20])
    before, began = time.process_time(), time.monotonic()
    while time.monotonic() - began < 0.5:
        time.sleep(0.1)
    assert time.process_time() - before < 0.25
    host.client.sock.sendall(register_read(5)[20:])
    assert host.client.receive()[0] == 5


def test_descriptors_on_a_doorbell_write_are_refused_as_on_any_other_message(host):
    reader, writer = os.pipe()
    with pytest.raises(VfioError) as caught:
        host.client.call(REGION_WRITE, struct.pack("<QIII", DOORBELLS + 8, BAR0, 4, 0), fds=(reader,))
    assert caught.value.errno == errno.EINVAL
    for fd in (reader, writer):
        os.close(fd)
    assert host.read_blocks(0, 1)[0].status == 0


def test_a_client_that_does_not_read_gets_every_reply_later(host):
    """More replies than its socket takes: the rest waits for it, in order, and nothing of ours waits."""
    count = 20_000
    host.client.sock.setblocking(False)
    numbers = iter(range(count))
    pending = b""
    try:
        for number in numbers:
            pending = register_read(number & 0xFFFF)
            while pending:
                pending = pending[host.client.sock.send(pending):]
    except BlockingIOError:
        pass                                                    # both directions are full
    else:
        pytest.fail("the server took everything though nobody read its replies")
    host.client.sock.settimeout(10)
    for expected in range(number):
        assert host.client.receive()[0] == expected
    host.client.sock.sendall(pending)
    assert host.client.receive()[0] == number


def test_several_doorbells_in_one_message(target, host):
    entries = b"".join(struct.pack("<QIIII", DOORBELLS + at, BAR0, 4, 0, 0) for at in (8, 12))
    served = socket_of(target).served
    assert host.client.call(WRITE_MULTI, struct.pack("<Q", 2) + entries) == struct.pack("<Q", 2)
    assert socket_of(target).served == served + 1


@pytest.mark.parametrize(("case", "payload", "error"), [
    ("the admin queue's", struct.pack("<QIII", DOORBELLS + 4, BAR0, 4, 0), 0),
    ("of no queue", struct.pack("<QIII", DOORBELLS + 0x40, BAR0, 4, 0), 0),
    ("eight bytes", struct.pack("<QIIQ", DOORBELLS + 8, BAR0, 8, 0), 0),
    ("another region", struct.pack("<QIII", 8, BAR4, 4, 0), 0),
    ("two bytes", struct.pack("<QIIH", DOORBELLS + 8, BAR0, 2, 0), errno.EINVAL),
    ("beyond the region", struct.pack("<QIII", (1 << 64) - 4, BAR0, 4, 0), errno.EINVAL),
])
def test_what_is_no_doorbell_of_a_live_queue_is_left_to_trio(target, host, case, payload, error):
    host.read32(CSTS)
    served = socket_of(target).served
    try:
        host.client.call(REGION_WRITE, payload)
        answered = 0
    except VfioError as refused:
        answered = refused.errno
    assert (answered, socket_of(target).served - served) == (error, 0), case


def test_a_storm_of_bad_doorbells_is_one_report_until_trio_has_seen_it(target, host):
    seen = []
    target.tokens[max(target.tokens)] = seen.append
    for _ in range(20):
        host.client.sock.sendall(doorbell_write(1, 8, 9999, NO_REPLY))
        host.read32(CSTS)
    host.client.call(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))   # trio has had its turn
    assert seen == [BAD_DOORBELL]
    assert host.read_blocks(0, 1)[0].status == 0


def test_a_client_that_leaves_while_the_reactor_has_its_socket_ends_its_session(target):
    for _ in range(3):
        with attached(target) as host:
            host.create_queue()
            assert host.read_blocks(0, 1)[0].status == 0


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), *[st.integers(0, 0xFFFF_FFFF)] * 3)
def test_the_header_is_the_same_for_construct_and_c(number, command, size, flags, error):
    fields = {"id": number, "command": command, "size": size, "flags": flags}
    seen = _vfio.decode_header(wire.Header.build({**fields, "errno": error}))
    assert seen == {**fields, "error": error}


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF))
def test_a_register_access_is_the_same_for_construct_and_c(offset, region, count):
    fields = {"offset": offset, "region": region, "count": count}
    assert _vfio.decode_access(wire.RegionAccess.build({**fields, "data": b""})) == fields


def test_sizes_are_the_same_for_construct_and_c():
    assert _vfio.LAYOUT_BYTES == {"header": wire.HEADER_BYTES, "access": 16,
                                  "multi_entry": wire.WRITE_MULTI_ENTRY_BYTES}


CYCLE = """
import gc, socket, time
from ocssd_daemon._fast import Reactor
from ocssd_daemon._nvme import GuestMemory, NvmeQueues
from ocssd_daemon._vfio import SharedSocket
reactor = Reactor(0)
class Session: pass
def fail():
    ours, theirs = socket.socketpair()
    queues = NvmeQueues(reactor, GuestMemory(reactor), bytearray(64), 2, stride=0, token=1)
    shared, session = SharedSocket(queues, ours.fileno()), Session()
    session.all = queues, shared, ours, theirs, session
fail()
gc.collect()
reactor.start()
while not reactor.stats()["turns"]:
    time.sleep(0.001)
reactor.stop()
print("well")
"""


def test_a_session_that_fails_while_it_is_made_leaves_the_reactor_also_out_of_a_cycle():
    """The collector empties the objects of a cycle before it ends them: their reactor must not be gone by then."""
    done = subprocess.run([sys.executable, "-c", CYCLE], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "MALLOC_PERTURB_": "165"})       # freed memory is no memory
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
