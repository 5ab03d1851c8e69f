"""Owns a small virtio-blk driver over one device and its rings, driven synchronously: no thread, no socket, no sleep.

``BlkRig`` builds flash, disk, a ``VhostDevice`` that is not attached to a loop, guest memory and one ring, and plays
the front end's part of the set-up. ``request`` builds the chain of one virtio-blk request (virtio 1.3, 5.2.6).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import TracebackType

from ocssd_daemon._fast import Disk, Ftl, Media, Reactor

from ocssd_daemon._vhost import VHOST_USER_F_PROTOCOL_FEATURES, VhostDevice
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.store import Store, open_ram

from .guest_memory import GuestMemory
from .virtqueue import Packed, Queue, Seg, Split

IN, OUT, FLUSH, SCSI, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 2, 8, 11, 13
OK, IOERR, UNSUPP, UNTOUCHED = 0, 1, 2, 0xAA
F_INDIRECT, F_EVENT_IDX, F_PACKED, F_LOG_ALL = 1 << 28, 1 << 29, 1 << 34, 1 << 26
F_FLUSH = 1 << 9

GEOMETRY = validate(
    Geometry(groups=1, pus=4, chunks=16, sectors=32, sector_bytes=4096, oob_bytes=16, ws_min=2, ws_opt=4, mw_cunits=8)
)


CAPACITY_SECTORS = GEOMETRY.total_sectors * 5 // 8


@dataclass
class Target:
    """Flash in RAM and the disk over it, 5 MiB."""

    store: Store
    ftl: Ftl
    disk: Disk


def make_target(block_bytes: int = 512, read_only: bool = False) -> Target:
    store = open_ram(GEOMETRY)
    ftl = Ftl(Media(store), CAPACITY_SECTORS)
    ftl.load(0)
    return Target(store, ftl, Disk(ftl, block_bytes, read_only))


@dataclass
class Request:
    """One request as it lies in guest memory."""

    memory: GuestMemory
    chain: list[Seg]
    status_at: int
    data_at: int = 0
    data_size: int = 0

    @property
    def status(self) -> int:
        return self.memory.read(self.status_at, 1)[0]

    @property
    def data(self) -> bytes:
        return self.memory.read(self.data_at, self.data_size)


def header(type: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", type, 0, sector)


def ranges(*items: tuple[int, int, int]) -> bytes:
    """A discard or write-zeroes payload of (sector, sectors, flags)."""
    return b"".join(struct.pack("<QII", *item) for item in items)


def lay_out(memory: GuestMemory, type: int, sector: int = 0, out: bytes = b"", in_size: int = 0) -> Request:
    """Lay out a request in three segments: header, data, status."""
    chain = [Seg(memory.put(header(type, sector)), 16)]
    data_at = 0
    if out:
        data_at = memory.put(out)
        chain.append(Seg(data_at, len(out)))
    if in_size:
        data_at = memory.put(b"\x55" * in_size)
        chain.append(Seg(data_at, in_size, writable=True))
    status_at = memory.put(bytes([UNTOUCHED]))
    chain.append(Seg(status_at, 1, writable=True))
    return Request(memory, chain, status_at, data_at, in_size or len(out))


class BlkRig:
    """A device with one driver. Use as a context manager."""

    def __init__(
        self,
        layout: type[Split] | type[Packed] = Split,
        *,
        num: int = 16,
        event_idx: bool = False,
        features: int = 0,
        without: int = 0,
        target: Target | None = None,
        memory: GuestMemory | None = None,
        queue: Queue | None = None,
        reactor: Reactor | None = None,
        num_queues: int = 1,
        start: bool = True,
        attach: bool = False,
    ) -> None:
        self.target = target or make_target()
        self.disk = self.target.disk
        self.reactor = reactor or Reactor(0)
        self.memory = memory or GuestMemory()
        self.device = VhostDevice(self.disk, self.reactor, num_queues, "serial-0001", 7, attach=attach)
        self.queue = queue or layout(self.memory, num, event_idx=event_idx)
        masked = F_EVENT_IDX * (not event_idx) | F_PACKED * (not self.queue.packed) | F_LOG_ALL | without
        self.features = self.device.device_features & ~masked | VHOST_USER_F_PROTOCOL_FEATURES | features
        if start:
            self.device.set_features(self.features)
            self.add_memory()
            self.start()

    def __enter__(self) -> BlkRig:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.device.close()

    def add_memory(self) -> None:
        for region in self.memory.regions:
            self.device.mem_add(*region.table_entry())

    def address(self, index: int = 0, queue: Queue | None = None, flags: int = 0, log: int = 0) -> None:
        q = queue or self.queue
        user = self.memory.user
        self.device.vring_addr(index, flags, user(q.desc), user(q.used), user(q.avail), log)

    def start(self, index: int = 0, queue: Queue | None = None, base: int | None = None) -> None:
        """The front end's start sequence for one ring."""
        q = queue or self.queue
        self.device.vring_num(index, q.num)
        self.device.vring_base(index, (0x8000_8000 if q.packed else 0) if base is None else base)
        self.device.vring_err(index, q.err_fd)
        self.address(index, q)
        self.device.vring_call(index, q.call_fd)
        self.device.vring_kick(index, q.kick_fd)
        self.device.vring_enable(index, True)

    def request(self, type: int, sector: int = 0, out: bytes = b"", in_size: int = 0) -> Request:
        return lay_out(self.memory, type, sector, out, in_size)

    def run(self, request: Request, *, indirect: bool = False) -> int:
        """Submit, serve, and take the completion; the status."""
        id = self.queue.submit(request.chain, indirect=indirect)
        self.device.process(64)
        done = self.queue.completed()
        assert [i for i, _ in done] == [id], (done, self.device.fault(0))
        return request.status

    def read(self, sector: int, size: int) -> bytes:
        request = self.request(IN, sector, in_size=size)
        assert self.run(request) == OK
        return request.data

    def write(self, sector: int, data: bytes) -> None:
        assert self.run(self.request(OUT, sector, out=data)) == OK
