"""The whole daemon behind the wire: an inherited descriptor, requests that survive its death, counters."""

from __future__ import annotations

import socket

import pytest
import trio

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user.wire import CONFIG_WCE_OFFSET as WCE
from ocssd_daemon.protocol.vhost_user.wire import Request
from tests.kit.blk_driver import IN, lay_out
from tests.kit.daemon import daemon
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
