"""The whole daemon behind the wire: an inherited descriptor, requests that survive its death, counters."""

from __future__ import annotations

import socket

import pytest
import trio

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
