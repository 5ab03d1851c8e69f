"""Owns a vhost-user front end: one message at a time, and the sequences that QEMU sends.

The sequences are those recorded from QEMU 11.1 (connect, start, stop, reset, reconnect, migration). A front
end owns its guest memory (a memfd), the ring layout in it and the event descriptors, and keeps them over a
reconnect, as QEMU does. Requests are put into the rings by others (`virtqueue`), this module never looks at
them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import mmap

import trio

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.wire import Feature, ProtocolFeature, Request
from ocssd_daemon.transport.fdsocket import FdBag, FdSocket, PeerGone, close_all

USER_BASE = 0x7F00_0000_0000  # where this front end pretends to have mapped guest memory
REPLY_S = 10.0
NO_PAYLOAD = m.Empty()


class Memory:
    """Guest memory: a memfd, mapped here, that starts at guest-physical 0."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size_bytes)
        self.map = mmap(self.fd, size_bytes)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


@dataclass
class Ring:
    """One virtqueue as the driver laid it out, in guest-physical addresses."""

    num: int
    desc: int
    avail: int
    used: int
    base: int = 0
    kick: int = field(default_factory=eventfd)
    call: int = field(default_factory=eventfd)
    err: int = field(default_factory=eventfd)


def ring_at(gpa: int, num: int) -> Ring:
    """A ring whose three parts lie on pages of their own from *gpa* on; split and packed fit alike."""
    avail = gpa + _whole_pages(16 * num)
    return Ring(num, desc=gpa, avail=avail, used=avail + _whole_pages(6 + 2 * num))


def _whole_pages(size_bytes: int) -> int:
    return (size_bytes + 4095) // 4096 * 4096


class Refused(Exception):
    """The back end answered a request with a NACK."""


class Frontend:
    """A front end with one device: *memory_bytes* of guest memory and rings at its start."""

    def __init__(self, *, num_rings: int = 1, ring_num: int = 128, memory_bytes: int = 16 << 20) -> None:
        self.memory = Memory(memory_bytes)
        self.rings = [ring_at(0x10000 + (i << 16), ring_num) for i in range(num_rings)]
        self.protocol_features = ProtocolFeature(0)
        self.features = 0  # acked by the driver
        self.offered = 0
        self.inflight: tuple[m.Inflight, int] | None = (
            None  # region and its descriptor, kept over a reconnect
        )
        self.inbox: FdSocket | None = None  # our end of the back-end channel
        self._regions_sent = False
        self._conn: FdSocket | None = None

    # Connection.

    async def connect(self, path: str) -> None:
        """Connect and negotiate as QEMU does when it realizes the device."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(path)
        self.attach(sock)
        await self.negotiate()

    def attach(self, sock: trio.socket.SocketType) -> None:
        """Use a socket that is connected already."""
        self._conn = FdSocket(sock)
        self._regions_sent = False

    @property
    def conn(self) -> FdSocket:
        assert self._conn is not None, "not connected"
        return self._conn

    def disconnect(self) -> None:
        """Leave without a word, as a front end that was killed does."""
        for sock in (self._conn, self.inbox):
            if sock is not None:
                sock.close()
        self._conn = self.inbox = None

    def close(self) -> None:
        """Disconnect and give up memory and descriptors."""
        self.disconnect()
        self.memory.close()
        for ring in self.rings:
            close_all((ring.kick, ring.call, ring.err))
        if self.inflight is not None:
            os.close(self.inflight[1])

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # One message.

    async def send(
        self,
        request: int,
        message: m.Message = NO_PAYLOAD,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        await self.conn.send(m.encode_request(request, message, need_reply=need_reply), fds)

    async def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        await self.conn.send(data, fds)

    async def reply(self, bag: FdBag | None = None) -> tuple[int, int, bytes]:
        """The next message of the back end: request, flags, payload. Raises `PeerGone` if there is none."""
        with trio.fail_after(REPLY_S), FdBag() as own:
            bag = bag or own
            first = await self.conn.receive_some(wire.HEADER_BYTES, bag)
            head = await self.conn.receive_rest(wire.HEADER_BYTES, first, bag)
            fields = wire.Header.parse(head)
            payload = await self.conn.receive_rest(fields.size_bytes, b"", bag)
            return fields.request, fields.flags, payload

    async def ask(
        self, request: int, message: m.Message = NO_PAYLOAD, fds: Sequence[int] = (), bag: FdBag | None = None
    ) -> bytes:
        """Send a request that has a reply of its own, and return its payload."""
        await self.send(request, message, fds)
        got, flags, payload = await self.reply(bag)
        assert (got, flags) == (request, 5), f"reply {got} with flags {flags:#x} to {request}"
        return payload

    async def ask_number(self, request: int) -> int:
        return int.from_bytes(await self.ask(request), "little")

    async def do(self, request: int, message: m.Message = NO_PAYLOAD, fds: Sequence[int] = ()) -> None:
        """Send a request that has to succeed; raises `Refused` otherwise. Needs REPLY_ACK to be sure."""
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            await self.send(request, message, fds)
            await self.ask(Request.GET_FEATURES)  # a barrier, as QEMU does it
        elif await self.status_of(request, message, fds):
            raise Refused(wire.request_name(request))

    async def status_of(self, request: int, message: m.Message = NO_PAYLOAD, fds: Sequence[int] = ()) -> int:
        """Send a request with need_reply and return the acknowledgement: 0 is success."""
        await self.send(request, message, fds, need_reply=True)
        got, flags, payload = await self.reply()
        assert (got, flags, len(payload)) == (request, 5, 8)
        return int.from_bytes(payload, "little")

    async def is_closed(self, within_s: float = REPLY_S) -> bool:
        """Whether the back end ends the connection; what it still sends before is dropped."""
        with trio.move_on_after(within_s), FdBag() as bag:
            while await self.conn.receive_some(4096, bag):
                pass
            return True
        return False

    # Sequences.

    async def negotiate(self, want: int = (1 << 23) - 1) -> None:
        """Connect: everything that is offered (within *want*) is acked, as QEMU does."""
        self.offered = await self.ask_number(Request.GET_FEATURES)
        offered = await self.ask_number(Request.GET_PROTOCOL_FEATURES)
        self.protocol_features = ProtocolFeature(offered & want)
        await self.send(Request.SET_PROTOCOL_FEATURES, m.U64(self.protocol_features))
        if ProtocolFeature.MQ in self.protocol_features:
            assert await self.ask_number(Request.GET_QUEUE_NUM) >= len(self.rings)
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol_features:
            await self.ask_number(Request.GET_MAX_MEM_SLOTS)
        if ProtocolFeature.BACKEND_REQ in self.protocol_features:
            await self.open_channel()
        await self.send(Request.SET_OWNER)
        await self.ask_number(Request.GET_FEATURES)
        for index, ring in enumerate(self.rings):
            await self.do(Request.SET_VRING_CALL, m.VringFd(index, True), [ring.call])
            await self.do(Request.SET_VRING_ERR, m.VringFd(index, True), [ring.err])

    async def open_channel(self) -> None:
        ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.inbox = FdSocket(ours)
            await self.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    async def config(self, size_bytes: int = 57) -> bytes:
        payload = await self.ask(Request.GET_CONFIG, m.Config(0, size_bytes, 0, bytes(size_bytes)))
        return payload[wire.ConfigHead.sizeof() :]

    async def reset(self) -> None:
        """Machine reset: the driver forgets its rings, the device its features; memory stays known."""
        await self.do(Request.RESET_DEVICE)
        for ring in self.rings:
            ring.base = 0

    async def start(self, features: int | None = None) -> None:
        """The driver wrote DRIVER_OK. Features default to all offered but packed rings and logging."""
        unwanted = int(Feature.RING_PACKED | Feature.LOG_ALL)
        self.features = self.offered & ~unwanted if features is None else features
        await self.send(Request.SET_FEATURES, m.U64(self.features))
        if ProtocolFeature.INFLIGHT_SHMFD in self.protocol_features:
            await self.share_inflight()
        await self.send(Request.SET_FEATURES, m.U64(self.features))
        await self.share_memory()
        for index in range(len(self.rings)):
            await self.start_ring(index)
        for index in range(len(self.rings)):
            await self.do(Request.SET_VRING_ENABLE, m.VringState(index, 1))
        await self.set_status(0xF)

    async def share_inflight(self) -> None:
        """Ask for a region the first time, and hand back the same one ever after."""
        if self.inflight is None:
            wanted = m.Inflight(0, 0, len(self.rings), max(ring.num for ring in self.rings))
            with FdBag() as bag:
                payload = await self.ask(Request.GET_INFLIGHT_FD, wanted, bag=bag)
                region = m.decode_payload(m.Header(Request.GET_INFLIGHT_FD, 1, len(payload)), payload)
                assert isinstance(region, m.Inflight)
                self.inflight = region, bag.fds.pop()
        region, fd = self.inflight
        await self.do(Request.SET_INFLIGHT_FD, region, [fd])

    @property
    def by_gpa(self) -> bool:
        return ProtocolFeature.GPA_ADDRESSES in self.protocol_features

    def region(self) -> m.Region:
        return m.Region(0, self.memory.size_bytes, 0 if self.by_gpa else USER_BASE, 0)

    def address(self, gpa: int) -> int:
        """How a ring address is told to the back end."""
        return gpa if self.by_gpa else USER_BASE + gpa

    async def share_memory(self) -> None:
        if ProtocolFeature.CONFIGURE_MEM_SLOTS not in self.protocol_features:
            await self.do(Request.SET_MEM_TABLE, m.MemTable((self.region(),)), [self.memory.fd])
        elif not self._regions_sent:
            await self.do(Request.ADD_MEM_REG, m.MemRegion(self.region()), [self.memory.fd])
        self._regions_sent = True

    def ring_address(self, index: int, flags: int = 0) -> m.VringAddr:
        ring = self.rings[index]
        desc, used, avail = (self.address(gpa) for gpa in (ring.desc, ring.used, ring.avail))
        return m.VringAddr(index, flags, desc=desc, used=used, avail=avail, log=ring.used)

    async def start_ring(self, index: int) -> None:
        ring = self.rings[index]
        await self.do(Request.SET_VRING_NUM, m.VringState(index, ring.num))
        await self.do(Request.SET_VRING_BASE, m.VringState(index, ring.base))
        await self.do(Request.SET_VRING_ADDR, self.ring_address(index))
        # QEMU signals a kick descriptor before it hands it over; the backend must remember that.
        os.eventfd_write(ring.kick, 1)
        await self.do(Request.SET_VRING_KICK, m.VringFd(index, True), [ring.kick])
        await self.do(Request.SET_VRING_CALL, m.VringFd(index, True), [ring.call])

    async def stop(self) -> None:
        """Driver reset, pause or shutdown: rings are drained and remember where they stood."""
        for index in range(len(self.rings)):
            await self.do(Request.SET_VRING_ENABLE, m.VringState(index, 0))
        for index, ring in enumerate(self.rings):
            payload = await self.ask(Request.GET_VRING_BASE, m.VringState(index, 0))
            ring.base = int.from_bytes(payload[4:], "little")
        await self.set_status(0)

    async def set_status(self, status: int) -> None:
        if ProtocolFeature.STATUS in self.protocol_features:
            await self.do(Request.SET_STATUS, m.U64(status))

    async def reconnect(self, path: str) -> None:
        """The back end died under a running guest: connect and start again where the used rings stand."""
        self.disconnect()
        await self.connect(path)
        for ring in self.rings:
            used_idx = int.from_bytes(self.memory.map[ring.used + 2 : ring.used + 4], "little")
            ring.base = used_idx
        await self.start(self.features)

    async def start_logging(self, log_fd: int, size_bytes: int) -> None:
        """Migration begins: hand over the dirty bitmap, switch logging on, for the used rings too."""
        await self.ask(Request.SET_LOG_BASE, m.Log(size_bytes, 0), [log_fd])
        await self.do(Request.SET_FEATURES, m.U64(self.features | Feature.LOG_ALL))
        for index in range(len(self.rings)):
            await self.do(Request.SET_VRING_ADDR, self.ring_address(index, wire.VRING_FLAG_LOG))

    async def cancel_logging(self) -> None:
        await self.do(Request.SET_FEATURES, m.U64(self.features))
        for index in range(len(self.rings)):
            await self.do(Request.SET_VRING_ADDR, self.ring_address(index))

    async def next_announcement(self, within_s: float = REPLY_S) -> int | None:
        """The id of the next message on the back-end channel, or nothing if none comes in time."""
        assert self.inbox is not None
        with trio.move_on_after(within_s), FdBag() as bag, suppress(PeerGone):
            first = await self.inbox.receive_some(wire.HEADER_BYTES, bag)
            data = await self.inbox.receive_rest(wire.HEADER_BYTES, first, bag)
            return int(wire.Header.parse(data).request)
        return None
