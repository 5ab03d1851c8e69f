"""Owns a vhost-user server inside the test, on a socket of its own, over fake rings or over real ones."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ocssd_daemon.protocol.vhost_user.backend import Backend
from ocssd_daemon.transport.vhost_user import Report, VhostUserServer
from ocssd_daemon.transport.vhost_user_live import Limits
from tests.kit.fake_backend import FakeBackend

QUICK = Limits(message_s=0.3, takeover_s=0.2, channel_send_s=0.3, waiting_max=4)


@dataclass
class FakeRings:
    """Opens a fake backend per session and remembers all of them."""

    capacity_sectors: int = 2048
    opened: list[FakeBackend] = field(default_factory=list)
    report: Report | None = None

    @contextmanager
    def open(self, report: Report) -> Iterator[Backend]:
        self.report = report
        self.opened.append(FakeBackend(capacity_sectors=self.capacity_sectors))
        try:
            yield self.opened[-1]
        finally:
            self.opened[-1].close()


@asynccontextmanager
async def serving(
    path: Path,
    open_backend: Callable[[Report], AbstractContextManager[Backend]],
    *,
    num_queues: int = 2,
    limits: Limits = QUICK,
) -> AsyncIterator[VhostUserServer]:
    """A server that accepts front ends at *path* while the block runs."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        await sock.bind(str(path))
        sock.listen(128)
        server = VhostUserServer(open_backend, num_queues, limits=limits)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, trio.SocketListener(sock))
            yield server
            nursery.cancel_scope.cancel()


async def no_session(server: VhostUserServer) -> None:
    """Wait until the server has cleaned up after its front end."""
    with trio.fail_after(5):
        while server.live is not None:
            await trio.lowlevel.checkpoint()


def open_fds() -> set[str]:
    """What each descriptor of this process refers to, for a comparison before and after."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue  # the descriptor of listdir() itself
    return found
