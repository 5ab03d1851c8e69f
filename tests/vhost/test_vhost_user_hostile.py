"""Front ends that lie: every message that must be refused, and what a refusal leaves untouched.

Each case has the id of the malformed-input table (VU-nn). After each, the server has lost no descriptor, and another
front end, which runs its rings on the same flash all the while, is served as if nothing had happened.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest
import trio

from ocssd_daemon.device import Device
from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.memory import MEM_SLOTS
from ocssd_daemon.protocol.vhost_user.wire import Feature, ProtocolFeature, Request
from ocssd_daemon.transport.fdsocket import PeerGone
from ocssd_daemon.transport.vhost_user import VhostUserServer, rings_of
from tests.kit.guest_memory import USER_OFFSET
from tests.kit.vhost_disk import read, write
from tests.kit.vhost_frontend import Frontend, Refused, eventfd
from tests.kit.vhost_rings import dispatching, small_device
from tests.kit.vhost_server import no_session, open_fds, serving

MIB = 1 << 20
REACTION_S = 3.0  # 1 s is the rule; the rest is for a machine that runs other tests, too
GUEST = 16 * MIB  # what Frontend has, at guest-physical 0
NO_PAYLOAD = m.Empty()
BY_USER = ~int(ProtocolFeature.GPA_ADDRESSES) & 0x7F_FFFF  # negotiate everything but GPA_ADDRESSES
NO_NEED = 1  # header flags: version 1
NEED = 1 | 8  # and need_reply


class Props:
    """Descriptors of the kinds that a liar may send; closed at the end of the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def own(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def memory(self, size_bytes: int = MIB) -> int:
        fd = self.own(os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(fd, size_bytes)
        return fd

    def read_only_memory(self) -> int:
        return self.own(os.open(f"/proc/self/fd/{self.memory()}", os.O_RDONLY | os.O_CLOEXEC))

    def sealed_memory(self) -> int:
        fd = self.memory()
        fcntl_add_seals(fd)
        return fd

    def event(self) -> int:
        return self.own(eventfd())

    def socket(self) -> int:
        pair = socket.socketpair()
        self.own(pair[1].detach())
        return self.own(pair[0].detach())

    def directory(self) -> int:
        return self.own(os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def regular_file(self) -> int:
        file = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        file.truncate(MIB)
        return file.fileno()


def fcntl_add_seals(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@dataclass
class Arena:
    """An attacker that has negotiated, the server that it attacks, and a bystander on the same flash."""

    server: VhostUserServer
    attacker: Frontend
    bystander: Frontend
    props: Props
    path: str

    async def all_is_well(self) -> None:
        assert await self.bystander.ask_number(Request.GET_FEATURES)
        data = os.urandom(4096)
        await write(self.bystander, 8, data)
        assert await read(self.bystander, 8, 4096) == data


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with small_device() as device:
        yield device


@pytest.fixture
async def arena(tmp_path, device) -> AsyncIterator[Arena]:
    before = open_fds()
    attacked, quiet = tmp_path / "attacked.sock", tmp_path / "quiet.sock"
    with ExitStack() as stack:
        async with (
            dispatching(device),
            serving(attacked, rings_of(device)) as server,
            serving(quiet, rings_of(device)),
        ):
            with Frontend(num_rings=2) as attacker, Frontend(num_rings=2) as bystander:
                await bystander.connect(str(quiet))
                await bystander.start()
                sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                await sock.connect(str(attacked))
                attacker.attach(sock)
                await attacker.negotiate(want=BY_USER)
                arena = Arena(server, attacker, bystander, Props(stack), str(attacked))
                yield arena
                await arena.all_is_well()
    assert open_fds() <= before


# Messages that are refused: with need_reply they are answered with 1 and the session goes on, without it ends.


@dataclass(frozen=True)
class Lie:
    """One message that must be refused. *payload* is a message or raw bytes; *fds* makes its descriptors."""

    case: str
    request: int
    payload: m.Message | bytes = NO_PAYLOAD
    fds: Callable[[Props], list[int]] = lambda props: []
    before: Callable[[Frontend], Awaitable[None]] | None = None

    def message(self, flags: int) -> bytes:
        raw = self.payload if isinstance(self.payload, bytes) else m.encode_payload(self.payload)
        return m.encode(self.request, flags, raw)


def one(kind: str) -> Callable[[Props], list[int]]:
    return lambda props: [getattr(props, kind)()]


def region(gpa: int = 1 << 32, size: int = MIB, user: int = 1 << 40, offset: int = 0) -> m.MemRegion:
    """A region that lies next to nothing else, unless told otherwise."""
    return m.MemRegion(m.Region(gpa, size, user, offset))


def table(nregions: int, there: int) -> bytes:
    """A memory table that says *nregions* and carries *there*."""
    regions = b"".join(
        wire.Region.build({"gpa": i << 32, "size_bytes": MIB, "user_addr": i << 40, "mmap_offset": 0})
        for i in range(there)
    )
    return struct.pack("=II", nregions, 0) + regions


def address(desc: int = 0x10000, used: int = 0x12000, avail: int = 0x11000, *, index: int = 0, flags: int = 0):
    """Ring addresses in the attacker's memory, which starts at USER_OFFSET."""
    return m.VringAddr(index, flags, USER_OFFSET + desc, USER_OFFSET + used, USER_OFFSET + avail, 0)


async def share_memory(frontend: Frontend) -> None:
    await frontend.share_memory()


async def sized_ring(frontend: Frontend) -> None:
    await frontend.share_memory()
    await frontend.do(Request.SET_VRING_NUM, m.VringState(0, 128))


async def two_regions(frontend: Frontend) -> None:
    await sized_ring(frontend)
    fd = os.memfd_create("next", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, MIB)
        await frontend.do(Request.ADD_MEM_REG, region(gpa=GUEST, user=USER_OFFSET + GUEST), [fd])
    finally:
        os.close(fd)


async def started(frontend: Frontend) -> None:
    await frontend.start()


async def packed(frontend: Frontend) -> None:
    features = Feature.VERSION_1 | Feature.RING_PACKED | Feature.PROTOCOL_FEATURES
    await frontend.do(Request.SET_FEATURES, m.U64(features))
    await sized_ring(frontend)


ADD, KICK, ADDR = Request.ADD_MEM_REG, Request.SET_VRING_KICK, Request.SET_VRING_ADDR
NUM, BASE, ENABLE = Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE
INFLIGHT, CONFIG = Request.SET_INFLIGHT_FD, Request.SET_CONFIG
GOOD_KICK = m.VringFd(0, has_fd=True)

LIES = [
    *(Lie(f"VU-02-unknown-request-{id:#x}", id) for id in (0, 35, 45, 200, 0xFFFF_FFFF)),
    Lie("VU-13-add-region-without-fd", ADD, region()),
    Lie("VU-13-kick-without-fd", KICK, GOOD_KICK),
    Lie("VU-14-socket-as-memory", ADD, region(), one("socket")),
    Lie("VU-14-directory-as-memory", ADD, region(), one("directory")),
    Lie("VU-14-eventfd-as-memory", ADD, region(), one("event")),
    Lie("VU-14-read-only-memory", ADD, region(), one("read_only_memory")),
    Lie("VU-14-sealed-memory", ADD, region(), one("sealed_memory")),
    Lie("VU-14-file-as-kick", KICK, GOOD_KICK, one("regular_file"), before=sized_ring),
    Lie("VU-16-feature-63", Request.SET_FEATURES, m.U64(1 << 63)),
    Lie("VU-16-protocol-feature-40", Request.SET_PROTOCOL_FEATURES, m.U64(1 << 40 | 0xFF)),
    Lie("VU-17-inband-without-deps", Request.SET_PROTOCOL_FEATURES, m.U64(1 << 14)),
    Lie("VU-18-base-inflight-without-inflight", Request.SET_PROTOCOL_FEATURES, m.U64(1 << 20)),
    Lie("VU-19-feature-change-while-running", Request.SET_FEATURES, m.U64(Feature.VERSION_1), before=started),
    Lie("VU-20-nregions-0", Request.SET_MEM_TABLE, table(0, 0)),
    Lie("VU-20-nregions-9", Request.SET_MEM_TABLE, table(9, 8), lambda p: [p.memory() for _ in range(8)]),
    Lie("VU-20-nregions-ffffffff", Request.SET_MEM_TABLE, table(0xFFFF_FFFF, 1), one("memory")),
    Lie("VU-21-2-regions-1-fd", Request.SET_MEM_TABLE, table(2, 2), one("memory")),
    Lie("VU-21-1-region-2-fds", Request.SET_MEM_TABLE, table(1, 1), lambda p: [p.memory(), p.memory()]),
    Lie("VU-22-overlap-gpa", ADD, region(gpa=GUEST - 4096), one("memory"), before=share_memory),
    Lie("VU-23-overlap-user", ADD, region(user=USER_OFFSET + GUEST - 4096), one("memory"), before=share_memory),
    Lie("VU-24-gpa-wraps", ADD, region(gpa=(1 << 64) - 4096), one("memory")),
    Lie("VU-24-user-wraps", ADD, region(user=(1 << 64) - 4096), one("memory")),
    Lie("VU-25-size-0", ADD, region(size=0), one("memory")),
    Lie("VU-26-larger-than-file", ADD, region(size=1 << 30), one("memory")),
    Lie("VU-28-offset-huge", ADD, region(offset=1 << 50), one("memory")),
    Lie("VU-28-offset-unaligned-end", ADD, region(offset=1), one("memory")),
    Lie("VU-28-offset-wraps", ADD, region(offset=(1 << 64) - 4096, size=8192), one("memory")),
    Lie("VU-30-remove-unknown-region", Request.REM_MEM_REG, region()),
    *(Lie(f"VU-32-index-{i:#x}", NUM, m.VringState(i, 128)) for i in (2, 200, 0xFFFF_FFFF)),
    Lie("VU-32-kick-index-255", KICK, m.VringFd(255, has_fd=True), one("event")),
    *(Lie(f"VU-33-num-{num}", NUM, m.VringState(0, num)) for num in (0, 100, 32769, 65535)),
    Lie("VU-34-desc-unmapped", ADDR, address(desc=1 << 40), before=sized_ring),
    Lie("VU-34-used-unmapped", ADDR, address(used=GUEST), before=sized_ring),
    Lie("VU-34-avail-unmapped", ADDR, address(avail=-4096), before=sized_ring),
    Lie("VU-34-desc-misaligned", ADDR, address(desc=0x10008), before=sized_ring),
    Lie("VU-34-avail-misaligned", ADDR, address(avail=0x11001), before=sized_ring),
    Lie("VU-34-used-misaligned", ADDR, address(used=0x12002), before=sized_ring),
    Lie("VU-34-last-byte-of-desc-outside", ADDR, address(desc=GUEST - 128 * 16 + 16), before=sized_ring),
    Lie("VU-34-last-byte-of-used-outside", ADDR, address(used=GUEST - 128 * 8), before=sized_ring),
    Lie("VU-34-straddles-two-regions", ADDR, address(used=GUEST - 64), before=two_regions),
    Lie("VU-34-no-memory-at-all", ADDR, address()),
    Lie("VU-35-address-flags", ADDR, address(flags=0x80), before=sized_ring),
    Lie("VU-36-split-base", BASE, m.VringState(0, 0x10000), before=sized_ring),
    Lie("VU-36-packed-base", BASE, m.VringState(0, 0x8000_8080), before=packed),
    Lie("VU-37-enable-2", ENABLE, m.VringState(0, 2)),
    Lie("VU-41-capacity", CONFIG, m.Config(0, 8, 0, bytes(8))),
    Lie("VU-41-capacity-as-migration", CONFIG, m.Config(0, 8, 1, bytes(8))),
    Lie("VU-40-size-field-is-not-the-payload", CONFIG, struct.pack("=III", 32, 2, 0) + b"\0"),
    Lie("VU-42-wce-2", CONFIG, m.Config(32, 1, 0, b"\2")),
    Lie("VU-43-no-queues", INFLIGHT, m.Inflight(4096, 0, 0, 128), one("memory")),
    Lie("VU-43-65535-queues", INFLIGHT, m.Inflight(4096, 0, 65535, 128), one("memory")),
    Lie("VU-43-ring-size-0", INFLIGHT, m.Inflight(4096, 0, 2, 0), one("memory")),
    Lie("VU-43-ring-size-65535", INFLIGHT, m.Inflight(4096, 0, 2, 65535), one("memory")),
    Lie("VU-44-region-too-small", INFLIGHT, m.Inflight(64, 0, 2, 128), one("memory")),
    Lie("VU-44-offset-huge", INFLIGHT, m.Inflight(65536, 1 << 62, 2, 128), one("memory")),
    Lie("VU-44-file-too-short", INFLIGHT, m.Inflight(64 * MIB, 0, 2, 128), one("memory")),
    Lie("VU-44-socket", INFLIGHT, m.Inflight(65536, 0, 2, 128), one("socket")),
    Lie("VU-48-channel-is-a-file", Request.SET_BACKEND_REQ_FD, fds=one("regular_file")),
]


async def tell(arena: Arena, lie: Lie, flags: int) -> None:
    if lie.before is not None:
        await lie.before(arena.attacker)
    await arena.attacker.send_raw(lie.message(flags), lie.fds(arena.props))


@pytest.mark.parametrize("lie", [pytest.param(lie, id=lie.case) for lie in LIES])
async def test_a_lie_is_answered_with_1_and_the_session_goes_on(arena, lie):
    await tell(arena, lie, NEED)
    request, flags, payload = await arena.attacker.reply()
    assert (request, flags, payload) == (lie.request, 5, struct.pack("=Q", 1))
    assert await arena.attacker.ask_number(Request.GET_FEATURES)


@pytest.mark.parametrize("lie", [pytest.param(lie, id=lie.case) for lie in LIES])
async def test_a_lie_that_wants_no_answer_ends_the_session(arena, lie):
    await tell(arena, lie, NO_NEED)
    assert await arena.attacker.is_closed(within_s=REACTION_S)


# Messages after which the byte stream means nothing: the session ends whatever they ask for.


def header(request: int, flags: int, size_bytes: int) -> bytes:
    return wire.Header.build({"request": request, "flags": flags, "size_bytes": size_bytes})


SET, GET = Request.SET_FEATURES, Request.GET_FEATURES
BROKEN = {
    "VU-01-version-0": header(GET, 0, 0),
    "VU-01-version-2": header(GET, 2, 0),
    "VU-01-version-3": header(GET, 3, 0),
    "VU-02-unknown-request-of-4-GiB": header(200, 1, 0xFFFF_FFFF),
    "VU-03-size-huge": header(SET, 1, 0xFFFF_FFFF),
    "VU-04-size-over-payload": header(SET, 1, 4096) + bytes(4096),
    "VU-05-size-short": header(SET, 1, 4) + bytes(4),
    "VU-06-size-long-by-4": header(SET, 1, 12) + bytes(12),
    "VU-09-reply-bit-set": header(GET, 1 | 4, 0),
    "VU-20-nine-regions": header(Request.SET_MEM_TABLE, NEED, 8 + 9 * 32) + table(9, 9),
    "VU-40-config-of-300": m.encode(Request.GET_CONFIG, 1, struct.pack("=III", 0, 300, 0) + bytes(300)),
    "VU-43-inflight-for-65535-queues": m.encode_request(Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 65535, 128)),
    "VU-32-base-of-ring-200": m.encode_request(Request.GET_VRING_BASE, m.VringState(200, 0)),
    "VU-45-log-of-0-bytes": m.encode_request(Request.SET_LOG_BASE, m.Log(0, 0)),
    "VU-45-log-without-fd": m.encode_request(Request.SET_LOG_BASE, m.Log(4096, 0)),
}


@pytest.mark.parametrize("data", [pytest.param(data, id=case) for case, data in BROKEN.items()])
async def test_what_breaks_framing_or_cannot_be_refused_ends_the_session(arena, data):
    await arena.attacker.send_raw(data)
    assert await arena.attacker.is_closed(within_s=REACTION_S)


@pytest.mark.parametrize("length", range(1, 12), ids="VU-07-{}-bytes".format)
async def test_a_header_cut_short_ends_the_session(arena, length):
    await arena.attacker.send_raw(header(GET, 1, 0)[:length])
    arena.attacker.disconnect()
    await no_session(arena.server)


@pytest.mark.parametrize("message", [header(GET, 1, 0), header(SET, 1, 8) + bytes(8)], ids=["header", "payload"])
async def test_vu_08_a_message_that_never_gets_complete_is_given_up(arena, message):
    await arena.attacker.send_raw(message[:-1])
    assert await arena.attacker.is_closed(within_s=REACTION_S)


async def test_vu_10_surplus_descriptors_are_closed_and_ignored(arena):
    await arena.attacker.send(GET, fds=[arena.props.event() for _ in range(8)])
    assert (await arena.attacker.reply())[0] == GET


async def test_vu_11_more_descriptors_than_fit_end_the_session(arena):
    await arena.attacker.send(GET, fds=[arena.props.event() for _ in range(253)])
    assert await arena.attacker.is_closed(within_s=REACTION_S)


async def test_vu_12_descriptors_in_the_middle_of_a_message_end_the_session(arena):
    message = m.encode_request(KICK, GOOD_KICK)
    await arena.attacker.send_raw(message[:12])
    await arena.attacker.send_raw(message[12:], [arena.props.event()])
    assert await arena.attacker.is_closed(within_s=REACTION_S)


FIRST_MESSAGES = {
    "VU-15-ring-address": m.encode_request(ADDR, m.VringAddr(0, 0, 0x1000, 0x3000, 0x2000, 0)),
    "VU-15-base": m.encode_request(BASE, m.VringState(0, 7)),
    "VU-15-get-base": m.encode_request(Request.GET_VRING_BASE, m.VringState(0, 0)),
    "VU-15-enable": m.encode_request(ENABLE, m.VringState(0, 1)),
    "VU-15-reset": m.encode_request(Request.RESET_DEVICE, m.Empty()),
    "VU-15-inflight": m.encode_request(Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 1, 128)),
    "VU-15-memory-table": m.encode(Request.SET_MEM_TABLE, NO_NEED, table(1, 1)),
}


@pytest.mark.parametrize("data", [pytest.param(data, id=case) for case, data in FIRST_MESSAGES.items()])
async def test_a_message_before_any_negotiation_is_carried_out_or_ends_the_session(arena, data):
    arena.attacker.disconnect()
    await no_session(arena.server)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(arena.path)
    arena.attacker.attach(sock)
    with suppress(PeerGone):
        await arena.attacker.send_raw(data, [arena.props.memory()])
        await arena.attacker.send(GET)
        while (await arena.attacker.reply())[0] != GET:
            pass
    arena.attacker.disconnect()
    await no_session(arena.server)


# Memory that changes under a running ring.


async def test_vu_27_memory_that_is_cut_off_ends_the_session_and_not_the_daemon(arena):
    await arena.attacker.start()
    os.ftruncate(arena.attacker.memory_fd, 0)
    arena.attacker.kick(0)
    assert await arena.attacker.is_closed(within_s=REACTION_S)


async def test_vu_29_there_are_as_many_slots_as_promised(arena):
    fd = arena.props.memory()
    for i in range(MEM_SLOTS):
        await arena.attacker.do(ADD, region(gpa=i << 32, user=i << 32), [fd])
    with pytest.raises(Refused):
        await arena.attacker.do(ADD, region(gpa=MEM_SLOTS << 32, user=MEM_SLOTS << 32), [fd])


async def test_vu_30_a_region_that_rings_use_may_go_and_stops_them(arena):
    attacker = arena.attacker
    await attacker.start()
    await attacker.status_of(Request.REM_MEM_REG, m.MemRegion(attacker.region()))
    attacker.kick(0)
    assert await attacker.ask_number(GET)


async def test_vu_31_a_table_without_the_rings_stops_them(arena):
    attacker = arena.attacker
    await attacker.start()
    elsewhere = m.MemTable((region().region,))
    await attacker.do(Request.SET_MEM_TABLE, elsewhere, [arena.props.memory()])
    attacker.kick(0)
    assert await attacker.ask_number(GET)
    await attacker.do(Request.SET_MEM_TABLE, m.MemTable((attacker.region(),)), [attacker.memory_fd])


# Rings and descriptors.


async def test_vu_38_rings_that_were_never_set_up_may_be_enabled_and_stopped(arena):
    for index in (0, 1):
        await arena.attacker.do(ENABLE, m.VringState(index, 1))
        assert len(await arena.attacker.ask(Request.GET_VRING_BASE, m.VringState(index, 0))) == 8


async def test_vu_39_a_ring_may_get_the_same_descriptor_as_kick_and_call_again_and_again(arena):
    attacker = arena.attacker
    await attacker.start()
    event = arena.props.event()
    for _ in range(100):
        await attacker.do(KICK, GOOD_KICK, [event])
        await attacker.do(Request.SET_VRING_CALL, GOOD_KICK, [event])
    assert await attacker.ask_number(GET)


async def test_vu_40_a_window_beyond_the_configuration_is_answered_with_no_data(arena):
    for window in (m.Config(200, 57, 0, bytes(57)), m.Config(0xFFFF_FFFF, 4, 0, bytes(4))):
        assert await arena.attacker.ask(Request.GET_CONFIG, window) == b""


REGION_LIES = {
    "VU-44-version-7": (8, struct.pack("=H", 7)),
    "VU-44-desc-num": (10, struct.pack("=H", 64)),
    "VU-44-last-batch-head": (12, struct.pack("=H", 0xFFFF)),
    "VU-44-used-idx": (14, struct.pack("=H", 0x1234)),
    "VU-44-inflight-flags-ff": (16, b"\xff" * 16 * 128),
    "VU-44-everything": (0, b"\xff" * (16 + 16 * 128)),
}


@pytest.mark.parametrize("lie", [pytest.param(lie, id=case) for case, lie in REGION_LIES.items()])
async def test_an_inflight_region_with_nonsense_in_it_hurts_nobody(arena, lie):
    attacker = arena.attacker
    await attacker.start()
    await attacker.stop()
    assert attacker.inflight is not None
    described, fd = attacker.inflight
    offset, nonsense = lie
    os.pwrite(fd, struct.pack("=QHH", 0, 1, 128), described.mmap_offset_bytes)
    os.pwrite(fd, nonsense, described.mmap_offset_bytes + offset)
    await attacker.send(Request.SET_FEATURES, m.U64(attacker.features))
    if await attacker.status_of(INFLIGHT, described, [fd]) == 0:
        for index in range(2):
            await attacker.start_ring(index)
            await attacker.do(ENABLE, m.VringState(index, 1))
        attacker.kick(0)
        assert await attacker.ask_number(GET)


# The dirty log.


@pytest.mark.parametrize(
    ("log", "size_bytes"),
    [
        pytest.param(m.Log(4096, (1 << 64) - 4096), 8192, id="VU-45-offset-wraps"),
        pytest.param(m.Log(1 << 40, 0), 4096, id="VU-45-larger-than-file"),
    ],
)
async def test_a_log_that_is_not_in_its_file_ends_the_session(arena, log, size_bytes):
    await arena.attacker.send(Request.SET_LOG_BASE, log, [arena.props.memory(size_bytes)])
    assert await arena.attacker.is_closed(within_s=REACTION_S)


@pytest.mark.parametrize("log_address", [0x12000, 1 << 63, (1 << 64) - 1], ids="VU-46-{:#x}".format)
async def test_writes_beyond_the_log_are_dropped(arena, log_address):
    attacker = arena.attacker
    await attacker.start()
    await attacker.start_logging(arena.props.memory(4096), 8)  # 64 pages of 4096
    addresses = attacker.ring_address(0, wire.VRING_FLAG_LOG)
    lie = m.VringAddr(0, wire.VRING_FLAG_LOG, addresses.desc, addresses.used, addresses.avail, log_address)
    await attacker.status_of(ADDR, lie)
    attacker.kick(0)
    assert await attacker.ask_number(GET)


# What is not offered cannot be asked for.


@pytest.mark.parametrize(
    ("request_id", "payload"),
    [
        pytest.param(Request.IOTLB_MSG, bytes(32), id="VU-47-iotlb"),
        pytest.param(Request.POSTCOPY_ADVISE, b"", id="VU-47-postcopy"),
    ],
)
async def test_a_message_of_a_feature_that_is_not_offered_is_refused(arena, request_id, payload):
    await arena.attacker.send_raw(m.encode(request_id, NEED, payload))
    assert (await arena.attacker.reply())[2] == struct.pack("=Q", 1)


# Many at once.


async def test_vu_50_a_second_front_end_is_refused_while_the_first_is_served(arena):
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(arena.path)
    with Frontend() as second:
        second.attach(sock)
        await second.send(GET)
        assert await second.is_closed(within_s=REACTION_S)
    assert await arena.attacker.ask_number(GET)


async def test_vu_52_answers_that_nobody_reads_stop_the_reading(arena):
    with trio.move_on_after(0.3):
        while True:
            await arena.attacker.send(ENABLE, m.VringState(0, 1), need_reply=True)
    await arena.all_is_well()
    arena.attacker.disconnect()
    await no_session(arena.server)


async def test_vu_53_a_storm_of_resets_and_restarts_leaves_no_stale_ring(arena):
    attacker = arena.attacker
    for _ in range(20):
        await attacker.start()
        attacker.kick(0)
        await attacker.reset()
    await attacker.start()
    assert await attacker.ask_number(GET)
