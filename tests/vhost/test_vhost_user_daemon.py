"""The whole daemon behind the wire: an inherited descriptor, requests that survive its death, counters."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user.wire import CONFIG_WCE_OFFSET as WCE
from ocssd_daemon.protocol.vhost_user.wire import Request
from ocssd_daemon.transport.vhost_user_live import DEFAULT_LIMITS
from tests.kit.blk_driver import IN, lay_out
from tests.kit.daemon import Daemon, daemon
from tests.kit.vhost_disk import completed, read, write
from tests.kit.vhost_frontend import Frontend
from tests.kit.virtqueue import Packed, Split

SMALL = ("--set", "geometry.groups=1", "--set", "geometry.chunks=64", "--set", "geometry.sectors=64")
DATA = bytes(range(256)) * 16


async def test_a_connected_socket_may_be_inherited(tmp_path):
    ours, theirs = socket.socketpair()
    with theirs, daemon(tmp_path, "--fd", str(theirs.fileno()), *SMALL, pass_fds=[theirs.fileno()]):
        ours.setblocking(False)
        with Frontend() as frontend:
            frontend.attach(trio.socket.from_stdlib_socket(ours))
            await frontend.negotiate()
            await frontend.start()
            await write(frontend, 0, DATA)
            assert await read(frontend, 0, len(DATA)) == DATA


async def test_the_daemon_ends_when_its_one_connection_does(tmp_path):
    ours, theirs = socket.socketpair()
    store = tmp_path / "flash.img"
    with daemon(tmp_path, "--fd", str(theirs.fileno()), "--store", store, *SMALL, pass_fds=[theirs.fileno()]) as only:
        theirs.close()
        ours.setblocking(False)
        with Frontend() as frontend:
            frontend.attach(trio.socket.from_stdlib_socket(ours))
            await frontend.negotiate()
            await frontend.start()
            await write(frontend, 0, DATA)
        assert only.process.wait(10) == 0
        assert "the only connection has ended" in only.said()
    with daemon(tmp_path, "--nbd", "unix:-", "--store", store) as again:
        assert again.ask("info")["disk"]["started"] == "checkpoint"  # it had stopped cleanly


async def test_another_door_keeps_the_daemon_when_the_one_connection_ends(tmp_path):
    ours, theirs = socket.socketpair()
    nbd = tmp_path / "nbd.sock"
    with daemon(
        tmp_path, "--fd", str(theirs.fileno()), "--nbd", f"unix:{nbd}", *SMALL, pass_fds=[theirs.fileno()]
    ) as both:
        theirs.close()
        ours.close()
        assert both.ask("info")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(nbd))
            assert client.recv(8) == b"NBDMAGIC"


async def test_a_listening_socket_may_be_inherited(tmp_path):
    path = tmp_path / "vhost.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with daemon(tmp_path, "--fd", str(listener.fileno()), *SMALL, pass_fds=[listener.fileno()]):
            for _ in range(2):
                with Frontend() as frontend:
                    await frontend.connect(str(path))
                    await frontend.start()
                    await write(frontend, 0, DATA)


async def test_as_many_queues_as_the_hard_limit_of_descriptors_allows(tmp_path):
    path, queues = tmp_path / "vhost.sock", 200
    limits = ["prlimit", "--nofile=256:4096"]
    with ExitStack() as life:
        life.callback(resource.setrlimit, resource.RLIMIT_NOFILE, raise_descriptor_limit(1000))
        life.enter_context(
            daemon(tmp_path, "--socket", str(path), "--set", f"vhost.num_queues={queues}", *SMALL, wrapper=limits)
        )
        frontend = life.enter_context(Frontend(num_rings=queues))
        await frontend.connect(str(path))
        await frontend.start()
        await write(frontend, 0, DATA)
        assert await read(frontend, 0, len(DATA)) == DATA


STORM = 1000


async def test_VU_51_a_thousand_connections_that_say_nothing_hold_nothing(tmp_path):
    path = tmp_path / "vhost.sock"
    with daemon(tmp_path, "--socket", str(path), *SMALL) as attacked, Frontend() as frontend, ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, raise_descriptor_limit(2 * STORM))
        await frontend.connect(str(path))
        await frontend.start()
        before = descriptors_of(attacked)
        for _ in range(STORM):
            await connect_silently(path, held)
        await write(frontend, 0, DATA)
        assert await read(frontend, 0, len(DATA)) == DATA
        with trio.fail_after(10):  # those that were sent away last may still be closing
            while descriptors_of(attacked) > before + DEFAULT_LIMITS.waiting_max:
                await trio.lowlevel.checkpoint()
        frontend.disconnect()
        with Frontend() as another:
            await another.connect(str(path))
            await another.start()
            await write(another, 0, DATA)


async def test_VU_51_a_storm_of_connections_that_come_and_go_leaves_nothing(tmp_path):
    path = tmp_path / "vhost.sock"
    with daemon(tmp_path, "--socket", str(path), *SMALL) as attacked, Frontend() as frontend:
        await frontend.connect(str(path))
        before = descriptors_of(attacked)
        for _ in range(STORM):
            with ExitStack() as brief:
                await connect_silently(path, brief)
        await frontend.start()
        await write(frontend, 0, DATA)
        with trio.fail_after(10):
            while descriptors_of(attacked) > before + 3:  # the start brought kick, call and error descriptors
                await trio.lowlevel.checkpoint()
        assert attacked.ask("stats")["transports"]["vhost-user"]["connections"] == 1


async def connect_silently(path: Path, until: ExitStack) -> None:
    """A connection that says nothing; waits for its turn while the listener's queue is full."""
    sock = until.enter_context(socket.socket(socket.AF_UNIX))
    with trio.fail_after(10):
        await trio.to_thread.run_sync(sock.connect, str(path), abandon_on_cancel=True)


def descriptors_of(running: Daemon) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def raise_descriptor_limit(wanted: int) -> tuple[int, int]:
    """Allow this process *wanted* descriptors; the limits before."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), before[1]))
    return before


@pytest.mark.parametrize("layout", [Split, Packed])
async def test_a_request_made_while_the_daemon_is_dead_is_served_by_the_next(tmp_path, layout):
    path, store = tmp_path / "vhost.sock", tmp_path / "flash.img"
    arguments = ("--socket", str(path), "--store", str(store), *SMALL)
    with Frontend(layout=layout) as frontend:
        with daemon(tmp_path, *arguments) as first:
            await frontend.connect(str(path))
            await frontend.start()
            await write(frontend, 0, DATA)
            first.process.kill()
            first.process.wait()
        queue = frontend.rings[0]
        request = lay_out(frontend.memory, IN, 0, in_size=len(DATA))
        head = queue.submit(request.chain)
        queue.kick()
        with daemon(tmp_path, *arguments) as second:
            await frontend.reconnect(str(path))
            assert await completed(queue) == [head]
            assert request.data == DATA
            assert second.ask("stats")["transports"]["vhost-user"]["requests"] == 1


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "stopped"])
async def test_write_through_stays_when_the_daemon_is_started_again(tmp_path, dies):
    path = tmp_path / "vhost.sock"
    arguments = ("--socket", str(path), "--store", str(tmp_path / "flash.img"), *SMALL)
    with Frontend() as frontend:
        with daemon(tmp_path, *arguments) as first:
            await frontend.connect(str(path))
            assert (await frontend.config())[WCE] == 1
            await frontend.do(Request.SET_CONFIG, m.Config(WCE, 1, 0, b"\0"))
            if dies:
                first.process.kill()
                first.process.wait()
        with daemon(tmp_path, *arguments):
            await frontend.reconnect(str(path))  # starts the ring without asking for the configuration
            assert (await frontend.config())[WCE] == 0
            with Frontend() as another:
                frontend.disconnect()
                await another.connect(str(path))
                assert (await another.config())[WCE] == 1  # another guest begins with write back


async def test_a_call_descriptor_that_is_made_to_block_stops_the_loop_for_seconds_at_most(tmp_path):
    """The peer shares its flags: it fills the counter and clears O_NONBLOCK when we have looked."""
    path = tmp_path / "vhost.sock"
    with daemon(tmp_path, "--socket", str(path), *SMALL) as attacked, Frontend() as frontend:
        await frontend.connect(str(path))
        await frontend.start()
        await write(frontend, 0, DATA)
        call_fd = frontend.rings[0].call_fd
        with suppress(BlockingIOError):
            os.eventfd_read(call_fd)
        os.eventfd_write(call_fd, 2**64 - 2)
        os.set_blocking(call_fd, True)
        for _ in range(20):  # the first holds the loop until the guard comes; the others would each hold it as long
            queue = frontend.rings[0]
            queue.want_calls(True)
            queue.submit(lay_out(frontend.memory, IN, 0, in_size=len(DATA)).chain)
            queue.kick()
            with trio.fail_after(10):
                while not queue.completed():
                    await trio.lowlevel.checkpoint()
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(attacked.ask, "stats")
        os.set_blocking(call_fd, False)
        frontend.disconnect()
        with Frontend() as another:
            await another.connect(str(path))
            await another.start()
            assert await read(another, 0, len(DATA)) == DATA
