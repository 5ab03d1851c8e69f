"""Owns the NBD listeners: accept, limit, negotiate with ``protocol.nbd.handshake``, hand the socket to the reactor.

Before the transmission phase a client is a trio task with a time limit; in it, it is a source of the reactor, and the
task only waits for the report that it has ended. Spec: NBD ``doc/proto.md``. Knows no bytes of the protocol.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from ocssd_daemon._nbd import CONTEXTS, ENDS, NbdConnection, NbdStats
from ocssd_daemon.device import Device
from ocssd_daemon.log import kv, per
from ocssd_daemon.protocol.nbd.handshake import Closed, Export, ServerHandshake, StartTls, TlsMode, Transmission
from ocssd_daemon.protocol.nbd.wire import TransmissionFlag
from ocssd_daemon.settings import NbdSettings, SettingsError
from ocssd_daemon.transport.listen import Listener, TcpAddress
from ocssd_daemon.transport.nbd_tls import LINGER_S, Pump, TlsError, make_context, start_tls

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 * 1024
PREFERRED_BYTES = 4096
MAX_REFUSING = 16  # clients over the limit that are told so; further ones are just closed
SHUTDOWN_S = 1.0  # how long a client may take to read its last replies when the daemon stops
SOCKET_BUFFER_BYTES = 1 << 20  # the kernel clips it to net.core.wmem_max; a batch of 32 replies of 4 KiB should fit

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]

# One set of counters per device, shared by all its NBD listeners.
_STATS: WeakKeyDictionary[Device, NbdStats] = WeakKeyDictionary()


async def serve_nbd(
    listener: Listener, device: Device, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *device* to everyone who connects, until cancelled; open connections then get up to SHUTDOWN_S.

    Raises SettingsError when TLS is not set up as it must be for this address.
    """
    settings = device.settings.nbd
    check_exposure(listener, settings)
    server = _Server(str(listener.address), device, settings)
    device.add_transport("nbd", server.stats.as_dict)
    task_status.started()
    await trio.serve_listeners(server.handle, listener.sockets)


def check_exposure(listener: Listener, settings: NbdSettings) -> None:
    """Refuse to show a disk to a network in clear, unless asked to. Raises SettingsError."""
    address = listener.address
    if not isinstance(address, TcpAddress) or settings.tls.mode == "require" or settings.insecure:
        return
    if not _is_loopback(address.host):
        raise SettingsError(
            "nbd.listen", "a network address needs nbd.tls.mode=require, or --insecure if you mean it", str(address)
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def transmission_flags(read_only: bool) -> TransmissionFlag:
    """What an export of ours can do. The negotiation takes away what a client has not asked for."""
    flags = (
        TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_DF
        | TransmissionFlag.CAN_MULTI_CONN  # one flash behind all connections: a flush on one covers all
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.BLOCK_STATUS_PAYLOAD
    )
    if read_only:
        return flags | TransmissionFlag.READ_ONLY
    return (
        flags
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )


def export_of(device: Device, settings: NbdSettings) -> Export:
    """The one export there is; it is also the default export."""
    disk, geometry = device.disk, device.geometry
    return Export(
        name=settings.export,
        description=(
            f"Open-Channel SSD: {geometry.groups} groups x {geometry.pus} PUs x {geometry.chunks} chunks"
            f" x {geometry.sectors} sectors of {geometry.sector_bytes} bytes"
        ),
        size_bytes=disk.size_bytes,
        flags=transmission_flags(disk.read_only),
        minimum_bytes=disk.block_bytes,
        preferred_bytes=max(PREFERRED_BYTES, disk.sector_bytes),
        max_payload_bytes=settings.max_payload_bytes,
        contexts=CONTEXTS,
    )


@dataclass
class _Client:
    """One connection: its number in the log, and the stream that is replaced when TLS starts."""

    number: int
    address: str  # where it came in
    stream: Stream
    socket: trio.socket.SocketType

    def log(self, level: int, event: str, **values: object) -> None:
        """One line; clients come and go at will, so the same event of one address is limited in rate."""
        message = kv(f"nbd.{event}", address=self.address, client=self.number, **values)
        log.log(level, message, extra=per(self.address, event))


class _Server:
    """What the connections of one listener share."""

    _numbers = itertools.count(1)

    def __init__(self, address: str, device: Device, settings: NbdSettings) -> None:
        self._address = address
        self._device = device
        self._settings = settings
        self._tls = TlsMode(settings.tls.mode)
        self._context = self._make_context()
        self._serving = 0
        self._refusing = 0
        self.stats = _STATS.setdefault(device, NbdStats())

    def _make_context(self) -> ssl.SSLContext | None:
        if self._tls is TlsMode.OFF:
            return None
        try:
            return make_context(self._settings.tls)
        except TlsError as error:
            raise SettingsError(f"nbd.tls.{error.key}", error.why) from None

    async def handle(self, stream: trio.SocketStream) -> None:
        """One client, from accept to close; nothing that it does leaves this function as an exception."""
        client = _Client(next(self._numbers), self._address, stream, stream.socket)
        try:
            if self._serving < self._settings.max_connections:
                await self._serve(client)
            elif self._refusing < MAX_REFUSING:
                await self._refuse(client)
            else:
                client.log(logging.WARNING, "refused", why="too many connections")
        except* (trio.BrokenResourceError, OSError) as lost:
            client.log(logging.INFO, "lost", why=repr(lost.exceptions[0]))
        except* Exception as bug:
            log.error(kv("nbd.bug", client=client.number), exc_info=bug)  # this client's end, nobody else's
        finally:
            await trio.aclose_forcefully(client.stream)

    async def _refuse(self, client: _Client) -> None:
        """Tell the client in the protocol's words that there is no room, instead of a closed connection."""
        self._refusing += 1
        try:
            client.log(logging.WARNING, "refused", why="too many connections")
            await self._negotiate(client, "too many connections")
        finally:
            self._refusing -= 1

    async def _serve(self, client: _Client) -> None:
        self._serving += 1
        try:
            agreed = await self._negotiate(client)
            if agreed is not None:
                await self._transmit(client, agreed)
        finally:
            self._serving -= 1

    # --- negotiation ---

    async def _negotiate(self, client: _Client, refusal: str | None = None) -> Transmission | None:
        """What was agreed, or None when there is nothing more to do with this client."""
        machine = ServerHandshake([export_of(self._device, self._settings)], self._tls, refusal)
        with trio.move_on_after(self._settings.handshake_seconds):
            return await self._haggle(client, machine)
        client.log(logging.WARNING, "refused", why="handshake took too long", limit_s=self._settings.handshake_seconds)
        return None

    async def _haggle(self, client: _Client, machine: ServerHandshake) -> Transmission | None:
        await client.stream.send_all(machine.data_to_send())
        while data := await client.stream.receive_some(RECEIVE_BYTES):
            events = machine.receive(bytes(data))
            await client.stream.send_all(machine.data_to_send())
            for event in events:
                if isinstance(event, Transmission):
                    return event
                if isinstance(event, Closed):
                    client.log(logging.INFO, "closed", why=event.reason)
                    return None
                await self._start_tls(client, event, machine)
        client.log(logging.INFO, "closed", why="client left during negotiation")
        return None

    async def _start_tls(self, client: _Client, _: StartTls, machine: ServerHandshake) -> None:
        assert self._context is not None
        assert isinstance(client.stream, trio.SocketStream)
        try:
            client.stream = await start_tls(client.stream, self._context)
        except trio.BrokenResourceError as error:
            client.log(logging.WARNING, "refused", why="TLS handshake failed", error=error.__cause__)
            raise
        machine.tls_started()

    # --- transmission ---

    async def _transmit(self, client: _Client, agreed: Transmission) -> None:
        client.log(
            logging.INFO,
            "serving",
            extended=agreed.extended,
            structured=agreed.structured,
            contexts=len(agreed.context_ids),
            tls=isinstance(client.stream, trio.SSLStream),
        )
        async with self._reactor_end(client) as fd:
            end = await self._run(fd, agreed)
        client.log(logging.INFO, "closed", why=ENDS[end])

    @contextlib.asynccontextmanager
    async def _reactor_end(self, client: _Client) -> AsyncIterator[int]:
        """The descriptor on which the reactor finds plain NBD: the socket itself, or the inner end of a TLS pump."""
        if isinstance(client.stream, trio.SocketStream):
            _tune(client.socket)
            yield client.socket.fileno()
            return
        pump = Pump(client.stream)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(pump.run)
                yield pump.fd
                pump.close_inner()
                nursery.cancel_scope.deadline = trio.current_time() + LINGER_S
            with trio.move_on_after(LINGER_S):
                await client.stream.aclose()
        finally:
            pump.close()

    async def _run(self, fd: int, agreed: Transmission) -> int:
        """The transmission phase, in the reactor. Returns why it ended, a key of ENDS."""
        ended = trio.Event()
        codes: list[int] = []

        def reported(code: int) -> None:
            codes.append(code)
            ended.set()

        token = self._device.new_token(reported)
        connection = NbdConnection(
            self._device.reactor,
            self._device.disk,
            self.stats,
            fd,
            token,
            flags=agreed.flags,
            structured=agreed.structured,
            extended=agreed.extended,
            context_ids=agreed.context_ids,
            leftover=agreed.leftover,
            max_payload_bytes=agreed.export.max_payload_bytes,
        )
        try:
            connection.start()
            await ended.wait()
            return codes[0]
        except trio.Cancelled:
            with trio.move_on_after(SHUTDOWN_S, shield=True):
                connection.shutdown()
                await ended.wait()
            raise
        finally:
            connection.stop()
            self._device.forget(token)


def _tune(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer without power would stay for ever
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
