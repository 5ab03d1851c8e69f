"""Owns the vhost-user-blk server: who may be the front end of a socket, and the life of that session.

One socket serves one front end at a time, because rings, memory and inflight region are one device's state.
Who connects is nobody until it says something: silent connections wait. The first that speaks takes the
device. One that speaks while the device is taken waits `Limits.takeover_s` for the other to leave (a front
end that reconnects may overtake its own end of file) and is then refused by closing. At most
`Limits.waiting_max` connections wait at all; one more sends the oldest away.

The end of a session, whatever its cause, drains the rings and releases each descriptor and mapping; the next
session starts with nothing but what `Carried` says.

What the reactor reports (broken ring, memory fault) and a resize of the disk reach the live session as plain
calls from the trio thread.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from ocssd_daemon._vhost import FAULT_MEMORY_LOST, VhostDevice
from ocssd_daemon.log import kv, per
from ocssd_daemon.protocol.vhost_user.backend import Backend
from ocssd_daemon.transport.fdsocket import FdSocket
from ocssd_daemon.transport.listen import OneConnection
from ocssd_daemon.transport.vhost_user_live import DEFAULT_LIMITS, Limits, LiveSession, WriteCacheMode

if TYPE_CHECKING:
    from ocssd_daemon.device import Device
    from ocssd_daemon.transport.listen import Listener

log = logging.getLogger(__name__)

# accept() failed for want of resources: the socket is sound, and trying again at once would spin.
ACCEPT_CAPACITY_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
ACCEPT_PAUSE_S = 0.1

COUNTERS = ("requests", "errors", "bytes_read", "bytes_written", "connections")

Report = Callable[[int, bool], None]  # (ring that broke, whether guest memory is lost)
# Opens the rings of one session, which report to the given function; leaving drains and releases them.
OpenBackend = Callable[[Report], AbstractContextManager[Backend]]


async def serve_vhost_user(
    listener: Listener, device: Device, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *device* at *listener*, which stays the caller's, until cancelled.

    Returns when nobody can come any more: the listener was one connection, and that has ended.
    """
    server = VhostUserServer(rings_of(device), device.settings.vhost.num_queues, mode=KeptMode(device))
    device.add_transport("vhost-user", server.stats)
    async with trio.open_nursery() as nursery:
        for sock in listener.sockets:
            if isinstance(sock, OneConnection):
                nursery.start_soon(server.serve_connected, (await sock.accept()).socket)
            else:
                await nursery.start(server.serve, sock)
        task_status.started()


def rings_of(device: Device) -> OpenBackend:
    """Real rings, over *device*'s disk and in its reactor."""
    settings = device.settings.vhost

    @contextmanager
    def open_backend(report: Report) -> Iterator[Backend]:
        def take(code: int) -> None:
            report(code >> 8, code & 0xFF == FAULT_MEMORY_LOST)

        token = device.new_token(take)
        rings = VhostDevice(device.disk, device.reactor, settings.num_queues, settings.serial, token)
        try:
            yield rings
        finally:
            rings.close()
            device.forget(token)

    return open_backend


class KeptMode:
    """The mode in the device's image, from where a daemon goes on after a kill."""

    def __init__(self, device: Device) -> None:
        self._store = device.store

    @property
    def wce(self) -> int:
        return int(self._store.superblock.write_cache)

    @wce.setter
    def wce(self, wce: int) -> None:
        if wce != self.wce:
            self._store.save_superblock(write_cache=bool(wce))


@dataclass(slots=True)
class ModeInMemory:
    wce: int = 1


@dataclass(slots=True)
class Carried:
    """What outlives a session: a front end that reconnects does not send it again."""

    mode: WriteCacheMode
    known_config: bytes | None = None
    totals: Counter[str] = field(default_factory=Counter)


class VhostUserServer:
    """Serves one device to one front end at a time."""

    def __init__(
        self,
        open_backend: OpenBackend,
        num_queues: int,
        *,
        mode: WriteCacheMode | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.open_backend = open_backend
        self.num_queues = num_queues
        self.limits = limits
        self.carried = Carried(mode or ModeInMemory())
        self.live: LiveSession | None = None
        self._device = trio.Lock()
        self._waiting: list[trio.CancelScope] = []

    async def serve(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept front ends until cancelled. The listener stays open, it is the caller's.

        Survives a lack of descriptors or memory at accept() with a pause of 100 ms; any other error is
        raised.
        """
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                sock = await self._accept(listener)
                nursery.start_soon(self.serve_connected, sock)

    async def _accept(self, listener: trio.abc.Listener[trio.SocketStream]) -> trio.socket.SocketType:
        while True:
            try:
                return (await listener.accept()).socket
            except OSError as why:
                if why.errno not in ACCEPT_CAPACITY_ERRNOS:
                    raise
                self.warn("vhost.accept_failed", reason=why.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)

    async def serve_connected(self, sock: trio.socket.SocketType) -> None:
        """Serve one connected socket to its end and close it. Nothing that the peer does raises."""
        with FdSocket(sock) as conn:
            if await self._takes_device(conn):
                try:
                    await self._run_session(conn)
                finally:
                    self._device.release()

    async def _takes_device(self, conn: FdSocket) -> bool:
        if len(self._waiting) >= self.limits.waiting_max:
            self._waiting.pop(0).cancel()
        with trio.CancelScope() as scope:
            self._waiting.append(scope)
            try:
                return await conn.wait_for_data() and await self._device_is_free(conn)
            finally:
                if scope in self._waiting:
                    self._waiting.remove(scope)
        self.warn("vhost.refused", peer=conn.peer(), reason="too many connections wait")
        return False

    async def _device_is_free(self, conn: FdSocket) -> bool:
        with trio.move_on_after(self.limits.takeover_s):
            await self._device.acquire()
            return True
        self.warn("vhost.refused", peer=conn.peer(), reason="another front end has the device")
        return False

    async def _run_session(self, conn: FdSocket) -> None:
        peer = conn.peer()
        log.info(kv("vhost.connected", peer=peer))
        self.carried.totals["connections"] += 1
        try:
            with self.open_backend(self._report) as backend:
                reason = await self._converse(conn, backend)
            if reason:
                self.warn("vhost.session_ended", peer=peer, reason=reason)
        except Exception:
            # A bug that one front end found must not end the sessions of others.
            log.exception(kv("vhost.bug", peer=peer))
        log.info(kv("vhost.disconnected", peer=peer))

    async def _converse(self, conn: FdSocket, backend: Backend) -> str:
        self.live = LiveSession(
            conn,
            backend,
            self.num_queues,
            self.carried.known_config,
            self.carried.mode,
            warn=self.warn,
            limits=self.limits,
        )
        try:
            return await self.live.run()
        finally:
            self.carried.known_config = self.live.session.known_config
            self.live = None
            self.carried.totals.update(backend.stats())

    def warn(self, event: str, **fields: object) -> None:
        """Log what a peer provoked; one line per event and interval, however many peers do it."""
        log.warning(kv(event, **fields), extra=per("vhost-user", event))

    def stats(self) -> dict[str, int]:
        """Counters over all sessions of this socket."""
        totals = Counter(dict.fromkeys(COUNTERS, 0))
        totals.update(self.carried.totals)
        totals.update(self.live.backend.stats() if self.live else {})
        return dict(totals)

    def config_changed(self) -> None:
        """The disk has another size: tell the front end, now or when its rings run next."""
        if self.live is not None:
            self.live.announce_if_news()

    def _report(self, index: int, memory_lost: bool) -> None:
        if self.live is not None:
            self.live.ring_broke(index, memory_lost)
