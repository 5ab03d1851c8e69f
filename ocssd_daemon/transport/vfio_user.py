"""Owns the vfio-user server: one client at a time on a socket, and the conversation with it.

Each session has memory, queues and a controller of its own; what outlives it is the flash. A client that
leaves without a word (they all do) ends the session: queues are drained, mappings and descriptors released,
and the next client may come. A second client waits `TAKEOVER_S` for the first to leave and is then refused
by closing.

Between two messages the socket is lent to the reactor, which serves doorbells and register reads itself and
gives it back at the first message of another kind (``native/vfio_socket.pxd``). So nothing per I/O passes
through here, unless the client shares no memory: then the socket stays, because our DMA messages use it too.

Register accesses are answered before anything else is awaited: a vCPU that waits for one keeps QEMU from
serving our DMA messages, and after 5 s QEMU gives the device up. Admin commands, and I/O commands of clients
that share no memory, run in tasks of their own.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ocssd_daemon._nvme import BAD_DOORBELL, NOTICE, QUEUE_LOST, GuestMemory, NvmeQueues
from ocssd_daemon._vfio import SharedSocket
from ocssd_daemon.log import kv, per
from ocssd_daemon.nvme.admin_queue import AdminQueue
from ocssd_daemon.nvme.assembly import attach, build_controller
from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.nvme.namespaces import Namespace
from ocssd_daemon.nvme.ports import MemoryFault
from ocssd_daemon.nvme.registers import DOORBELLS
from ocssd_daemon.protocol.vfio_user import wire
from ocssd_daemon.protocol.vfio_user.session import DmaReply, ProtocolError, Rejected, Request, Session
from ocssd_daemon.protocol.vfio_user.wire import Command, DeviceFlags, Irq, Region, RegionFlags
from ocssd_daemon.transport.fdsocket import BadDescriptors, FdBag, FdSocket, PeerGone, close_all
from ocssd_daemon.transport.vfio_irqs import Interrupts, Refused
from ocssd_daemon.transport.vfio_memory import WHOLE_MESSAGE_BYTES, ClientMemory
from ocssd_daemon.transport.vfio_message_io import MessageQueues
from ocssd_daemon.transport.vfio_pci import ConfigSpace, RegionShape, regions

if TYPE_CHECKING:
    import numpy as np

    from ocssd_daemon._fast import Reactor

log = logging.getLogger(__name__)

TAKEOVER_S = 1.0
DMA_REPLY_S = 5.0
POLL_S = 0.002
REGION_INFO_BYTES = 32
COUNTERS = ("requests", "errors", "bytes_read", "bytes_written", "doorbells", "interrupts", "connections")


class Bell:
    """Wakes one task; rings that come while it works are remembered as one."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()


class Device:
    """What the session serves: configuration, namespaces and the reactor; independent of any client."""

    def __init__(self, reactor: Reactor, config: ControllerConfig, namespaces: list[Namespace],
                 foreign: np.ndarray, *,
                 mapped_doorbells: bool = False, wear_threshold: int = 0) -> None:
        self.reactor, self.config, self.namespaces, self.foreign = reactor, config, namespaces, foreign
        self.mapped_doorbells = mapped_doorbells
        self.wear_threshold = wear_threshold


class Client:
    """One connected client, from VERSION to its end."""

    def __init__(self, conn: FdSocket, device: Device, token: int) -> None:
        self._conn, self._device = conn, device
        self._session = Session()
        self._sending = trio.Lock()
        self._replies: dict[int, tuple[trio.Event, list[DmaReply]]] = {}
        self._admin_bell, self._io_bell = Bell(), Bell()
        config = device.config
        self._regions = regions(config)
        self._bar0 = os.memfd_create("bar0", os.MFD_CLOEXEC)
        os.ftruncate(self._bar0, self._regions[Region.BAR0].size_bytes)
        self._bar0_page = mmap.mmap(self._bar0, self._regions[Region.BAR0].size_bytes)
        self._doorbells = memoryview(self._bar0_page)[DOORBELLS:DOORBELLS + config.doorbell_bytes]
        mapped = GuestMemory(device.reactor)
        self.queues = NvmeQueues(
            device.reactor, mapped, self._doorbells, config.queue_pairs, stride=config.stride, token=token,
            mapped_doorbells=device.mapped_doorbells, max_transfer_bytes=config.max_transfer_bytes,
            wear_threshold=device.wear_threshold)
        self._socket = SharedSocket(self.queues, conn.fileno())
        self.memory = ClientMemory(mapped, self._dma_read, self._dma_write, self._by_message)
        attach(device.namespaces, self.queues, device.foreign)
        self.controller = build_controller(config, device.namespaces, self.queues, device.foreign,
                                           wear_threshold=device.wear_threshold)
        self._config_space = ConfigSpace(config)
        self._interrupts = Interrupts(config, self.queues)
        self._admin = AdminQueue(self.controller, self.memory, self)
        self._message_io = MessageQueues(self.queues, self.memory, self.controller)
        self._msix_bar = bytearray(self._regions[Region.BAR4].size_bytes)

    def close(self) -> None:
        """Release everything that the client gave us, and the page of doorbells that it may have mapped."""
        self._socket.close()
        self.queues.reset()
        self._interrupts.close()
        self.queues.close()
        self.memory.clear()
        close_all(self._session.pending_fds())
        self._doorbells.release()
        self._bar0_page.close()
        os.close(self._bar0)

    # ---- the conversation ---------------------------------------------------------------------------------

    async def run(self) -> str:
        """Converse until the client leaves; why it ended, empty when it just left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_admin)
            nursery.start_soon(self._serve_io)
            try:
                while True:
                    await self._lend()
                    await self._receive()
            except PeerGone:
                return ""
            except ProtocolError as error:
                await self._send(error.reply)
                return str(error)
            except BadDescriptors as error:
                return str(error)
            finally:
                nursery.cancel_scope.cancel()

    async def _lend(self) -> None:
        """Let the reactor have the socket until there is something on it that it leaves to us.

        It stays here while a message is half received or a DMA message has no answer yet.
        """
        if self._session.between_messages and not self._replies and not self.queues.by_message:
            self._socket.lend()
            await trio.lowlevel.wait_readable(self._socket.returned_fd)
            os.eventfd_read(self._socket.returned_fd)
            await self._send(b"")

    async def _receive(self) -> None:
        with FdBag() as bag:
            data = await self._conn.receive_some(self._session.wanted(), bag)
            if not data:
                raise PeerGone("left")
            fds, bag.fds = list(bag.fds), []
        event = self._session.receive(data, fds)
        if isinstance(event, Request):
            await self._request(event)
        elif isinstance(event, DmaReply):
            self._dma_arrived(event)
        elif isinstance(event, Rejected):
            log.warning(kv("vfio_user.rejected", reason=event.reason), extra=per("vfio-user", event.reason))
            close_all(event.fds)
            await self._send(event.reply)

    async def _request(self, request: Request) -> None:
        try:
            if request.command == Command.VERSION:
                reply = self._session.accept_version(request)
                self.memory.max_message_bytes = max(1, min(self._session.client_max_data_bytes, WHOLE_MESSAGE_BYTES))
                await self._send(reply)
                return
            payload, fds = HANDLERS[request.command](self, request)
            await self._send(self._session.reply(request, payload), fds)
        except Refused as refusal:
            log.warning(kv("vfio_user.refused", command=request.command.name, reason=refusal),
                        extra=per("vfio-user", request.command.name))
            await self._send(self._session.error(request, refusal.error))
        finally:
            close_all(request.fds)

    async def _send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send what the reactor had to leave, then *data*. The socket must be ours."""
        async with self._sending:
            await self._conn.send(self._socket.unsent())
            await self._conn.send(data, fds)

    # ---- DMA messages -------------------------------------------------------------------------------------

    async def _dma(self, number: int, message: bytes) -> bytes:
        """Send one DMA message and wait for its answer. Raises OSError."""
        arrived = trio.Event()
        box: list[DmaReply] = []
        self._replies[number] = (arrived, box)
        self._socket.take_back()
        try:
            await self._send(message)
            with trio.fail_after(DMA_REPLY_S):
                await arrived.wait()
        except trio.TooSlowError:
            self.controller.registers.fatal()
            raise OSError(errno.ETIMEDOUT, "no answer") from None
        finally:
            del self._replies[number]
        if box[0].error:
            raise OSError(box[0].error, os.strerror(box[0].error))
        return box[0].data

    async def _dma_read(self, address: int, count_bytes: int) -> bytes:
        return await self._dma(*self._session.dma_read(address, count_bytes))

    async def _dma_write(self, address: int, data: bytes) -> None:
        await self._dma(*self._session.dma_write(address, data))

    def _dma_arrived(self, reply: DmaReply) -> None:
        waiting = self._replies.get(reply.id)
        if waiting is not None:
            waiting[1].append(reply)
            waiting[0].set()

    def _by_message(self, by_message: bool) -> None:
        self.queues.by_message = by_message
        if by_message:
            self._io_bell.ring()        # the reactor leaves what it has not run to us

    # ---- commands -----------------------------------------------------------------------------------------

    async def _serve_admin(self) -> None:
        while True:
            await self._rung(self._admin_bell)
            await self._admin.run()

    async def _rung(self, bell: Bell) -> None:
        """Mapped doorbells ring for nobody. The reactor polls those of I/O queues, we the others."""
        with trio.move_on_after(POLL_S if self._device.mapped_doorbells else math.inf):
            await bell.wait()

    async def _serve_io(self) -> None:
        while True:
            await self._rung(self._io_bell)
            try:
                await self._message_io.run()
            except MemoryFault:
                self.controller.registers.fatal()

    async def fetch(self) -> bytes | None:
        place = self.queues.admin_place()
        if place is None:
            return None
        await self.memory.pull(*place)
        return self.queues.admin_fetch()

    async def complete(self, cid: int, status: int, dw0: int) -> None:
        place = self.queues.admin_complete(cid, status, dw0)
        if place is not None:
            await self.memory.push(*place)
            self.queues.signal(0)

    def report(self, code: int) -> None:
        """Something that the queues noticed."""
        if code == BAD_DOORBELL:
            self.queues.take_bad_doorbell()
            self.controller.doorbell_error(register=False)
        elif code == NOTICE:
            self.controller.chunk_notice()
        elif code == QUEUE_LOST:
            self.controller.registers.fatal()
        self._admin_bell.ring()

    # ---- requests -----------------------------------------------------------------------------------------

    def dma_map(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        fd = request.fds[0] if request.fds else None
        flags = body.flags & ~wire.DmaFlags.WRITE if fd is None and self._is_bar0(body.iova, body.size) else body.flags
        failed = self.memory.map(body.iova, body.size, flags, fd, body.fd_offset)
        if failed:
            raise Refused(failed, f"{body.iova:#x}+{body.size:#x} flags {body.flags:#x}")
        return b"", ()

    def _is_bar0(self, address: int, size_bytes: int) -> bool:
        """QEMU also announces the doorbells that it has mapped, as if other devices' memory: no data of a guest's."""
        start = self._config_space.bar0_address
        return bool(start) and start <= address and address + size_bytes <= start + len(self._bar0_page)

    def dma_unmap(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        failed = self.memory.unmap(body.iova, body.size, body.flags)
        if failed:
            raise Refused(failed, f"{body.iova:#x}+{body.size:#x} flags {body.flags:#x}")
        return wire.DmaUnmap.build(body), ()

    def get_info(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        return wire.DeviceInfo.build({"argsz": 16, "flags": DeviceFlags.RESET | DeviceFlags.PCI,
                                      "num_regions": Region.COUNT, "num_irqs": Irq.COUNT}), ()

    def get_region_info(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        if body.index >= Region.COUNT or body.argsz < REGION_INFO_BYTES:
            raise Refused(errno.EINVAL, f"region {body.index}, argsz {body.argsz}")
        shape = self._regions.get(body.index, RegionShape(0, 0))
        mappable = body.index == Region.BAR0 and self._device.mapped_doorbells
        caps = self._sparse_cap() if mappable else b""
        # Without room for the capability, CAPS stays clear but MMAP is set, or QEMU refuses the region.
        fits = body.argsz >= REGION_INFO_BYTES + len(caps)
        flags = shape.flags | (RegionFlags.MMAP if mappable else 0) | (RegionFlags.CAPS if caps and fits else 0)
        payload = wire.RegionInfo.build({
            "argsz": REGION_INFO_BYTES + len(caps), "flags": flags, "index": body.index,
            "cap_offset": REGION_INFO_BYTES if caps and fits else 0, "size": shape.size_bytes, "offset": 0})
        return (payload + caps, (self._bar0,)) if caps and fits else (payload, ())

    def _sparse_cap(self) -> bytes:
        pages = -(-self._device.config.doorbell_bytes // wire.PAGE_BYTES) * wire.PAGE_BYTES
        return wire.SparseCap.build({"id": wire.SPARSE_CAP_ID, "version": 1, "next": 0, "nr_areas": 1,
                                     "areas": [{"offset": DOORBELLS, "size": pages}]})

    def get_irq_info(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        index = request.body.index
        if index >= Irq.COUNT or request.body.argsz < 16:
            raise Refused(errno.EINVAL, f"interrupt index {index}")
        shape = self._interrupts.shapes.get(index)
        return wire.IrqInfo.build({"argsz": 16, "flags": shape.flags if shape else 0, "index": index,
                                   "count": shape.count if shape else 0}), ()

    def set_irqs(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        self._interrupts.set(request.body, request.fds)
        return b"", ()

    def reset(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        self.controller.bus_reset()
        self._config_space.reset()
        return b"", ()

    # ---- regions ------------------------------------------------------------------------------------------

    def _checked(self, region: int, offset: int, count: int) -> None:
        size = self._regions[region].size_bytes if region in self._regions else 0
        if not count or offset + count > size:
            raise Refused(errno.EINVAL, f"{count} bytes at {offset:#x} of region {region}")

    def region_read(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        self._checked(body.region, body.offset, body.count)
        data = READERS[body.region](self, body.offset, body.count)
        return wire.RegionAccess.build({"offset": body.offset, "region": body.region, "count": body.count,
                                        "data": data}), ()

    def region_write(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        self._write(body.region, body.offset, body.count, body.data)
        return wire.RegionAccess.build({"offset": body.offset, "region": body.region, "count": body.count,
                                        "data": b""}), ()

    def write_multi(self, request: Request) -> tuple[bytes, tuple[int, ...]]:
        body = request.body
        if not 0 < body.wr_cnt <= wire.MAX_WRITE_MULTI \
                or len(body.data) != body.wr_cnt * wire.WRITE_MULTI_ENTRY_BYTES:
            raise Refused(errno.EINVAL, f"{body.wr_cnt} writes in {len(body.data)} bytes")
        for at in range(0, len(body.data), wire.WRITE_MULTI_ENTRY_BYTES):
            entry = wire.WriteMultiEntry.parse(body.data[at:at + wire.WRITE_MULTI_ENTRY_BYTES])
            self._write(entry.region, entry.offset, entry.count, entry.data[:entry.count])
        return body.wr_cnt.to_bytes(8, "little"), ()

    def _write(self, region: int, offset: int, count: int, data: bytes) -> None:
        self._checked(region, offset, count)
        if len(data) != count:
            raise Refused(errno.EINVAL, f"{len(data)} bytes of {count}")
        WRITERS[region](self, offset, data)

    def _read_bar0(self, offset: int, count: int) -> bytes:
        if offset + count <= DOORBELLS:
            return self.controller.registers.read(offset, count)
        return bytes(count)

    def _write_bar0(self, offset: int, data: bytes) -> None:
        if len(data) not in (4, 8) or offset % 4:
            raise Refused(errno.EINVAL, f"register write of {len(data)} bytes at {offset:#x}")
        if offset < DOORBELLS:
            self.controller.registers.write(offset, data)
        else:
            self._ring(offset - DOORBELLS, int.from_bytes(data[:4], "little"))

    def _ring(self, offset: int, value: int) -> None:
        if not self.controller.registers.ready:
            return
        qid = self.queues.ring(offset, value)
        if qid < 0:
            self.controller.doorbell_error(register=True)
        if qid <= 0:
            self._admin_bell.ring()
        elif self.queues.by_message:
            self._io_bell.ring()

    def _read_config(self, offset: int, count: int) -> bytes:
        return self._config_space.read(offset, count)

    def _write_config(self, offset: int, data: bytes) -> None:
        self._config_space.write(offset, data)
        if self._config_space.function_reset:
            self._config_space.function_reset = False
            self.controller.bus_reset()

    def _read_msix(self, offset: int, count: int) -> bytes:
        return bytes(self._msix_bar[offset:offset + count])

    def _write_msix(self, offset: int, data: bytes) -> None:
        """The table is the client's affair (QEMU keeps it for itself); the pending bits behind it are
        read-only.
        """
        end = self.controller.config.vectors * 16
        if offset + len(data) <= end:
            self._msix_bar[offset:offset + len(data)] = data


Handler = Callable[[Client, Request], tuple[bytes, tuple[int, ...]]]

HANDLERS: dict[int, Handler] = {
    Command.DMA_MAP: Client.dma_map,
    Command.DMA_UNMAP: Client.dma_unmap,
    Command.DEVICE_GET_INFO: Client.get_info,
    Command.DEVICE_GET_REGION_INFO: Client.get_region_info,
    Command.DEVICE_GET_IRQ_INFO: Client.get_irq_info,
    Command.DEVICE_SET_IRQS: Client.set_irqs,
    Command.REGION_READ: Client.region_read,
    Command.REGION_WRITE: Client.region_write,
    Command.DEVICE_RESET: Client.reset,
    Command.REGION_WRITE_MULTI: Client.write_multi,
}

READERS: dict[int, Callable[[Client, int, int], bytes]] = {Region.BAR0: Client._read_bar0,
                                                           Region.BAR4: Client._read_msix,
                                                           Region.CONFIG: Client._read_config}
WRITERS: dict[int, Callable[[Client, int, bytes], None]] = {Region.BAR0: Client._write_bar0,
                                                            Region.BAR4: Client._write_msix,
           Region.CONFIG: Client._write_config}


class VfioUserServer:
    """Serves one device to one client at a time. ``new_token(report)`` and ``forget(token)`` are the
    reactor's reports.
    """

    def __init__(self, device: Device, new_token: Callable[[Callable[[int], None]], int],
                 forget: Callable[[int], None]) -> None:
        self.device = device
        self._new_token, self._forget = new_token, forget
        self._taken = trio.Lock()
        self._live: Client | None = None
        self._totals: Counter[str] = Counter()

    async def serve(self, listener: trio.abc.Listener[trio.SocketStream], *,
                    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept clients until cancelled; the listener stays the caller's."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                stream = await listener.accept()
                nursery.start_soon(self.serve_connected, stream.socket)

    async def serve_connected(self, sock: trio.socket.SocketType) -> None:
        """Serve one connected socket to its end and close it. Nothing that the peer does raises."""
        with FdSocket(sock, wire.MAX_MSG_FDS) as conn:
            with trio.move_on_after(TAKEOVER_S) as waited:
                await self._taken.acquire()
            if waited.cancelled_caught:
                log.warning(kv("vfio_user.refused", peer=conn.peer(), reason="another client has the device"))
                return
            try:
                await self._run(conn)
            finally:
                self._taken.release()

    async def _run(self, conn: FdSocket) -> None:
        peer = conn.peer()
        log.info(kv("vfio_user.connected", peer=peer))
        self._totals["connections"] += 1
        token = self._new_token(self._report)
        try:
            self._live = Client(conn, self.device, token)
            reason = await self._live.run()
            if reason:
                log.warning(kv("vfio_user.session_ended", peer=peer, reason=reason))
        except Exception:
            # A bug that one client found must not end the daemon.
            log.exception(kv("vfio_user.bug", peer=peer))
        finally:
            self._end(token)
        log.info(kv("vfio_user.disconnected", peer=peer))

    def _end(self, token: int) -> None:
        if self._live is not None:
            self._totals.update(self._live.queues.counters())
            self._live.close()
            self._live = None
        self._forget(token)

    def _report(self, code: int) -> None:
        if self._live is not None:
            self._live.report(code)

    def stats(self) -> dict[str, int]:
        """Counters over all sessions."""
        totals = self._totals + Counter(self._live.queues.counters() if self._live else {})
        return {name: totals[name] for name in COUNTERS}
