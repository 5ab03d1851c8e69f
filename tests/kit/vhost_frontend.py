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

import trio

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.wire import Feature, ProtocolFeature, Request
from ocssd_daemon.transport.fdsocket import FdBag, FdSocket, PeerGone
from tests.kit.guest_memory import USER_OFFSET, GuestMemory
from tests.kit.virtqueue import Packed, Split

REPLY_S = 10.0
EVERYTHING = (1 << 23) - 1  # every protocol feature there is
FRESH_PACKED_BASE = 0x8000_8000  # both indices 0, both wrap counters 1
NO_PAYLOAD = m.Empty()


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Refused(Exception):
    """The back end answered a request with a NACK."""


class Frontend:
    """A front end with one device: guest memory of one region and *num_rings* rings in it."""

    def __init__(
        self,
        *,
        num_rings: int = 1,
        ring_num: int = 128,
        layout: type[Split] | type[Packed] = Split,
        memory_bytes: int = 16 << 20,
    ) -> None:
        self.memory = GuestMemory((0, memory_bytes))
        self.rings: list[Split | Packed] = [layout(self.memory, ring_num, event_idx=True) for _ in range(num_rings)]
        self.bases = [0 if isinstance(ring, Split) else FRESH_PACKED_BASE for ring in self.rings]
        self.protocol_features = ProtocolFeature(0)
        self.features = 0  # acked by the driver
        self.offered = 0
        self.inflight: tuple[m.Inflight, int] | None = None  # region and its descriptor, kept over a reconnect
        self.inbox: FdSocket | None = None  # our end of the back-end channel
        self._regions_sent = False
        self._conn: FdSocket | None = None

    # Connection.

    async def connect(self, path: str, want: int = EVERYTHING) -> None:
        """Connect and negotiate as QEMU does when it realizes the device."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await sock.connect(path)
        self.attach(sock)
        await self.negotiate(want)

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
            ring.close()
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

    async def negotiate(self, want: int = EVERYTHING) -> None:
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
            await self.do(Request.SET_VRING_CALL, m.VringFd(index, True), [ring.call_fd])
            await self.do(Request.SET_VRING_ERR, m.VringFd(index, True), [ring.err_fd])

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
        self.bases = [0 if isinstance(ring, Split) else FRESH_PACKED_BASE for ring in self.rings]

    async def start(self, features: int | None = None) -> None:
        """The driver wrote DRIVER_OK. Features default to all offered but logging, and to the rings' layout."""
        unwanted = Feature.LOG_ALL | (Feature.RING_PACKED if isinstance(self.rings[0], Split) else 0)
        self.features = wire.without(self.offered, unwanted) if features is None else features
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

    def fresh_rings(self) -> None:
        """The driver lays out new rings, as after a reset."""
        for ring in self.rings:
            ring.close()
        self.rings = [type(ring)(self.memory, ring.num, event_idx=True) for ring in self.rings]

    def used_page(self, index: int) -> int:
        """The guest page that the device writes used elements to."""
        ring = self.rings[index]
        return (ring.used if isinstance(ring, Split) else ring.desc) // 4096

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
        gpa, size_bytes, user_addr, offset, _ = self.memory.regions[0].table_entry()
        return m.Region(gpa, size_bytes, 0 if self.by_gpa else user_addr, offset)

    @property
    def memory_fd(self) -> int:
        return self.memory.regions[0].fd

    def address(self, gpa: int) -> int:
        """How a ring address is told to the back end."""
        return gpa if self.by_gpa else gpa + USER_OFFSET

    async def share_memory(self) -> None:
        if ProtocolFeature.CONFIGURE_MEM_SLOTS not in self.protocol_features:
            await self.do(Request.SET_MEM_TABLE, m.MemTable((self.region(),)), [self.memory_fd])
        elif not self._regions_sent:
            await self.do(Request.ADD_MEM_REG, m.MemRegion(self.region()), [self.memory_fd])
        self._regions_sent = True

    def ring_address(self, index: int, flags: int = 0) -> m.VringAddr:
        ring = self.rings[index]
        desc, used, avail = (self.address(gpa) for gpa in (ring.desc, ring.used, ring.avail))
        return m.VringAddr(index, flags, desc=desc, used=used, avail=avail, log=ring.used)

    async def start_ring(self, index: int) -> None:
        ring = self.rings[index]
        await self.do(Request.SET_VRING_NUM, m.VringState(index, ring.num))
        await self.do(Request.SET_VRING_BASE, m.VringState(index, self.bases[index]))
        await self.do(Request.SET_VRING_ADDR, self.ring_address(index))
        # QEMU signals a kick descriptor before it hands it over; the backend must remember that.
        os.eventfd_write(ring.kick_fd, 1)
        await self.do(Request.SET_VRING_KICK, m.VringFd(index, True), [ring.kick_fd])
        await self.do(Request.SET_VRING_CALL, m.VringFd(index, True), [ring.call_fd])

    async def stop(self, *, status_first: bool = False) -> None:
        """Driver reset, pause or shutdown: rings are drained and remember where they stood.

        *status_first*: in the order of QEMU 7.2, which takes the status back before it asks the rings.
        """
        if status_first:
            await self.set_status(0)
        for index in range(len(self.rings)):
            await self.do(Request.SET_VRING_ENABLE, m.VringState(index, 0))
        for index in range(len(self.rings)):
            payload = await self.ask(Request.GET_VRING_BASE, m.VringState(index, 0))
            self.bases[index] = int.from_bytes(payload[4:], "little")
        await self.set_status(0)

    async def set_status(self, status: int) -> None:
        if ProtocolFeature.STATUS in self.protocol_features:
            await self.do(Request.SET_STATUS, m.U64(status))

    async def reconnect(self, path: str) -> None:
        """The back end died under a running guest: connect and start again where the used rings stand."""
        self.disconnect()
        await self.connect(path)
        # A packed ring has no used index in memory; the inflight region says where it stands.
        self.bases = [ring.used_idx if isinstance(ring, Split) else FRESH_PACKED_BASE for ring in self.rings]
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

    async def save_state(self) -> bytes:
        """Fetch the device state as a snapshot does."""
        with FdBag() as bag:
            ours, theirs = os.pipe()
            bag.fds.append(ours)
            try:
                await self.ask(Request.SET_DEVICE_STATE_FD, m.DeviceState(0, 0), [theirs])
            finally:
                os.close(theirs)
            assert await self.ask_number(Request.CHECK_DEVICE_STATE) == 0
            return os.read(ours, 4096)

    async def load_state(self, state: bytes) -> int:
        """Hand a device state over; returns what the check says, 0 is success."""
        with FdBag() as bag:
            theirs, ours = os.pipe()
            bag.fds.append(theirs)
            os.write(ours, state)
            os.close(ours)
            await self.ask(Request.SET_DEVICE_STATE_FD, m.DeviceState(1, 0), [theirs])
            return await self.ask_number(Request.CHECK_DEVICE_STATE)

    def kick(self, index: int) -> None:
        """Notify the back end of new requests."""
        self.rings[index].kick()

    async def next_announcement(self, within_s: float = REPLY_S) -> int | None:
        """The id of the next message on the back-end channel, or nothing if none comes in time."""
        assert self.inbox is not None
        with trio.move_on_after(within_s), FdBag() as bag, suppress(PeerGone):
            first = await self.inbox.receive_some(wire.HEADER_BYTES, bag)
            data = await self.inbox.receive_rest(wire.HEADER_BYTES, first, bag)
            return int(wire.Header.parse(data).request)
        return None
