"""The vhost-user server over real sockets and fake rings: who gets the device, what a bad peer can do."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest
import trio

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user.wire import BackendRequest, ProtocolFeature, Request
from ocssd_daemon.transport.fdsocket import FdBag, FdSocket, PeerGone
from ocssd_daemon.transport.vhost_user import VhostUserServer
from ocssd_daemon.transport.vhost_user_channel import BackendChannel
from ocssd_daemon.transport.vhost_user_live import Limits
from tests.kit.vhost_frontend import Frontend, Refused, eventfd
from tests.kit.vhost_server import FakeRings, no_session, open_fds, serving


@pytest.fixture
def rings():
    return FakeRings()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vhost.sock"


@pytest.fixture(autouse=True)
def _no_descriptor_stays():
    before = open_fds()
    yield
    assert open_fds() <= before


async def raw_connection(path) -> FdSocket:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(str(path))
    return FdSocket(sock)


async def test_the_sequences_of_qemu_reach_the_rings_in_their_order(rings, path):
    async with serving(path, rings.open) as server:
        with Frontend(num_rings=2) as frontend:
            await frontend.connect(str(path))
            assert len(await frontend.config()) == 57
            await frontend.reset()
            await frontend.reset()
            await frontend.start()
            await frontend.stop()
            await frontend.start()
        await no_session(server)
    (backend,) = rings.opened
    assert backend.called("reset_device") == [(), ()]  # the machine resets; status 0 at the stop is none
    assert [args[:2] for args in backend.called("mem_add")] == [(0, 16 << 20)]  # once: a reset keeps memory
    assert len(backend.called("inflight_get")) == 1
    assert len(backend.called("inflight_set")) == 2
    assert backend.closed


async def test_every_part_works_without_the_features_of_newer_front_ends(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await sock.connect(str(path))
            frontend.attach(sock)
            await frontend.negotiate(want=int(ProtocolFeature.CONFIG))
            await frontend.start()
            assert len(rings.opened[0].called("mem_add")) == 1
            await frontend.stop()


async def test_a_front_end_that_reconnects_at_once_gets_the_device(rings, path):
    async with serving(path, rings.open, limits=Limits()):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            await frontend.start()
            await frontend.reconnect(str(path))
            assert [backend.closed for backend in rings.opened] == [True, False]


async def test_a_second_front_end_is_refused_while_the_first_has_the_device(rings, path):
    async with serving(path, rings.open):
        with Frontend() as first, Frontend() as second:
            await first.connect(str(path))
            with pytest.raises(PeerGone):
                await second.connect(str(path))
            assert await first.ask_number(Request.GET_FEATURES)


async def test_a_connection_that_says_nothing_does_not_hold_the_device(rings, path):
    async with serving(path, rings.open):
        with await raw_connection(path), Frontend() as frontend:
            await frontend.connect(str(path))
            assert len(rings.opened) == 1


async def test_of_too_many_silent_connections_the_oldest_goes(rings, path):
    async with serving(path, rings.open, limits=Limits(waiting_max=2)):
        with (
            FdBag() as bag,
            await raw_connection(path) as oldest,
            await raw_connection(path),
            await raw_connection(path),
        ):
            assert await oldest.receive_some(1, bag) == b""


async def test_a_connection_that_leaves_without_a_word_costs_no_session(rings, path):
    async with serving(path, rings.open) as server:
        (await raw_connection(path)).close()
        with Frontend() as frontend:
            await frontend.connect(str(path))
        assert server.stats()["connections"] == 1


async def test_half_a_message_is_waited_for_and_then_given_up(rings, path):
    async with serving(path, rings.open) as server:
        with await raw_connection(path) as slow, FdBag() as bag:
            await slow.send(b"\1\0\0")  # 3 of 12 bytes
            with trio.fail_after(5):
                assert await slow.receive_some(1, bag) == b""
        await no_session(server)
        with Frontend() as frontend:
            await frontend.connect(str(path))


async def test_a_message_may_arrive_byte_by_byte(rings, path):
    async with serving(path, rings.open):
        with await raw_connection(path) as conn, FdBag() as bag:
            for byte in m.encode_request(Request.GET_FEATURES, m.Empty()):
                await conn.send(bytes([byte]))
                await trio.lowlevel.checkpoint()
            assert len(await conn.receive_rest(20, b"", bag)) == 20


async def test_a_peer_that_does_not_read_its_answers_is_not_read_either(rings, path):
    async with serving(path, rings.open) as server:
        with Frontend() as flood, Frontend() as other:
            await flood.connect(str(path))
            message = m.encode_request(Request.GET_FEATURES, m.Empty())
            sent = 0
            with trio.move_on_after(0.5):
                while True:
                    await flood.send_raw(message * 1000)
                    sent += 1
            assert sent < 100  # socket buffers, not ours, bound it
            flood.disconnect()
            await no_session(server)
            await other.connect(str(path))


async def test_more_descriptors_than_fit_end_the_session_and_are_closed(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            fds = [eventfd() for _ in range(20)]
            try:
                await frontend.send(Request.GET_FEATURES, fds=fds)
            finally:
                for fd in fds:
                    os.close(fd)
            assert await frontend.is_closed()


async def test_descriptors_in_the_middle_of_a_message_end_the_session(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            message = m.encode_request(Request.SET_VRING_KICK, m.VringFd(0, True))
            await frontend.send_raw(message[:12])
            await frontend.send_raw(message[12:], [frontend.rings[0].kick_fd])
            assert await frontend.is_closed()


async def test_a_resize_is_announced_on_the_back_end_channel(rings, path):
    async with serving(path, rings.open) as server:
        with Frontend() as frontend:
            await frontend.connect(str(path))
            await frontend.config()
            await frontend.start()
            rings.opened[0].capacity_sectors *= 2
            server.config_changed()
            server.config_changed()
            assert await frontend.next_announcement() == BackendRequest.CONFIG_CHANGE_MSG
            assert await frontend.next_announcement(within_s=0.1) is None
            assert struct.unpack_from("=Q", await frontend.config())[0] == 4096


async def test_a_resize_while_nobody_is_connected_is_announced_after_the_reconnect(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            await frontend.config()
            await frontend.start()
            assert await frontend.next_announcement(within_s=0.1) is None
            rings.capacity_sectors *= 2
            await frontend.reconnect(str(path))
            assert await frontend.next_announcement() == BackendRequest.CONFIG_CHANGE_MSG


async def test_the_write_cache_mode_outlives_a_session(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            await frontend.do(Request.SET_CONFIG, m.Config(32, 1, 0, b"\0"))
            await frontend.reconnect(str(path))
            assert rings.opened[1].wce == 0


async def test_a_broken_ring_makes_the_front_end_look(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            await frontend.start()
            await frontend.next_announcement(within_s=0.1)
            rings.opened[0].broken_rings[0] = "a descriptor chain loops"
            rings.report(0, memory_lost=False)
            assert await frontend.next_announcement() == BackendRequest.CONFIG_CHANGE_MSG
            assert await frontend.ask_number(Request.GET_STATUS) & 0x40


async def test_memory_that_goes_away_ends_the_session(rings, path):
    async with serving(path, rings.open) as server:
        with Frontend() as frontend:
            await frontend.connect(str(path))
            rings.report(0, memory_lost=True)
            assert await frontend.is_closed()
            await no_session(server)
            assert rings.opened[0].closed


async def test_a_back_end_channel_must_be_a_unix_stream_socket(rings, path):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            with pytest.raises(Refused):
                await frontend.do(Request.SET_BACKEND_REQ_FD, fds=[frontend.rings[0].kick_fd])
            datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with datagram[0], datagram[1], pytest.raises(Refused):
                await frontend.do(Request.SET_BACKEND_REQ_FD, fds=[datagram[0].fileno()])


@pytest.mark.parametrize("misdeed", ["closes it", "answers", "sends descriptors"])
async def test_a_bad_back_end_channel_is_dropped_and_the_session_goes_on(rings, path, misdeed):
    async with serving(path, rings.open):
        with Frontend() as frontend:
            await frontend.connect(str(path))
            if misdeed == "answers":
                await frontend.inbox.send(m.encode_reply(99, m.U64(0)))
            elif misdeed == "sends descriptors":
                await frontend.inbox.send(b"\0", [frontend.memory_fd])
            else:
                frontend.inbox.close()
                frontend.inbox = None
            await frontend.start()
            assert frontend.inbox is None or await frontend.next_announcement() is None


async def test_a_back_end_channel_that_nobody_reads_is_dropped():
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with trio.move_on_after(0.1):
            while True:
                await ours.send(bytes(4096))
        channel = BackendChannel(FdSocket(ours), send_s=0.1)
        channel.announce_config()
        assert await channel.run() == "the front end does not read it"


async def test_a_bug_in_one_session_does_not_end_the_server(rings, path, caplog):
    async with serving(path, rings.open):
        with Frontend() as frontend, Frontend() as next_one:
            await frontend.connect(str(path))
            rings.opened[0].vring_get_base = None
            await frontend.send(Request.GET_VRING_BASE, m.VringState(0, 0))
            assert await frontend.is_closed()
            assert "vhost.bug" in caplog.text
            await next_one.connect(str(path))


class OutOfDescriptors(trio.abc.Listener[trio.SocketStream]):
    """accept() that fails twice for want of descriptors and then has nothing to accept."""

    def __init__(self) -> None:
        self.failures = 0
        self.recovered = trio.Event()

    async def accept(self) -> trio.SocketStream:
        if self.failures == 2:
            self.recovered.set()
            await trio.sleep_forever()
        self.failures += 1
        raise OSError(errno.EMFILE, "Too many open files")

    async def aclose(self) -> None:
        """Nothing to close."""


async def test_xx_01_a_lack_of_descriptors_at_accept_is_waited_out(rings, autojump_clock):
    server, listener = VhostUserServer(rings.open, 1), OutOfDescriptors()
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listener)
        await listener.recovered.wait()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begin == pytest.approx(0.2)


async def test_a_connected_socket_is_served_like_an_accepted_one(rings, path):
    ours, theirs = trio.socket.socketpair()
    async with serving(path, rings.open) as server, trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connected, theirs)
        with Frontend() as frontend:
            frontend.attach(ours)
            await frontend.negotiate()
            await frontend.start()


async def test_device_state_goes_through_the_pipe_of_the_front_end(rings, path):
    async with serving(path, rings.open):
        with Frontend() as source:
            await source.connect(str(path))
            state = await source.save_state()
            assert len(state) == 16
            assert await source.load_state(state) == 0


@pytest.mark.parametrize("lie", ["directory", "never closed", "too long", "garbage"])
async def test_a_bad_descriptor_for_device_state_fails_the_check(rings, path, lie):
    async with serving(path, rings.open):
        with Frontend() as frontend, FdBag() as bag:
            await frontend.connect(str(path))
            bag.fds += os.pipe()
            if lie == "directory":
                bag.fds.insert(0, os.open("/tmp", os.O_RDONLY))
            elif lie != "never closed":
                os.write(bag.fds[1], b"x" * (10_000 if lie == "too long" else 16))
                os.close(bag.fds.pop())
            await frontend.ask(Request.SET_DEVICE_STATE_FD, m.DeviceState(1, 0), [bag.fds[0]])
            assert await frontend.ask_number(Request.CHECK_DEVICE_STATE) == 1
