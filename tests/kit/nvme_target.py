"""A controller on a vfio-user socket, served from a thread of the test's own process: flash in RAM, real reactor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import trio
from ocssd_daemon._fast import Disk, Ftl, Media, Reactor

from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.store import open_ram
from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.nvme.namespaces import BlockNamespace, raw_namespace
from ocssd_daemon.transport.listen import UnixAddress, open_listener
from ocssd_daemon.transport.vfio_user import Device, VfioUserServer
from tests.kit.nvme_host import NvmeHost
from tests.kit.vfio_user_client import VfioUserClient

SMALL = Geometry(groups=2, pus=2, chunks=8, sectors=64, sector_bytes=4096, oob_bytes=16, ws_min=4, ws_opt=8,
                 mw_cunits=0)


class Target:
    """``media`` and ``server`` may be looked at while the reactor is paused."""

    def __init__(self, path: str, kinds: tuple[str, ...], geometry: Geometry, *, early_reset: bool = True,
                 multi_reset: bool = False, config: ControllerConfig | None = None, planes: int = 1, dlfeat: int = 1,
                 block_bytes: int = 4096, foreign: np.ndarray | None = None, **device: Any) -> None:
        self.path, self.reactor = path, Reactor(50)
        self.media = Media(open_ram(geometry), early_reset=early_reset, multi_reset=multi_reset)
        self.disk = self._disk(geometry, block_bytes) if "block" in kinds else None
        namespaces = [self._namespace(kind, nsid, planes, dlfeat) for nsid, kind in enumerate(kinds, 1)]
        owners = np.zeros(geometry.total_pus, np.uint8) if foreign is None else foreign
        self.config = config or ControllerConfig(queue_pairs=8, entries=256)
        self.tokens: dict[int, Any] = {}
        self.server = VfioUserServer(Device(self.reactor, self.config, namespaces, owners, **device), self._new_token,
                                     self._forget)

    def _disk(self, geometry: Geometry, block_bytes: int) -> Disk:
        ftl = Ftl(self.media, geometry.total_sectors // 2)
        ftl.load(0)
        return Disk(ftl, block_bytes)

    def _namespace(self, kind: str, nsid: int, planes: int, dlfeat: int) -> Any:
        if kind != "block":
            return raw_namespace(kind, nsid, self.media, planes=planes, dlfeat=dlfeat)
        disk: Any = self.disk
        return BlockNamespace(nsid, disk.size_bytes // disk.block_bytes, disk.block_bytes, disk=disk)

    def _new_token(self, handler: Any) -> int:
        self.tokens[len(self.tokens) + 1] = handler
        return len(self.tokens)

    def _forget(self, token: int) -> None:
        self.tokens[token] = lambda code: None

    async def serve(self, started: threading.Event) -> None:
        self.trio_token = trio.lowlevel.current_trio_token()
        listener = open_listener(UnixAddress(self.path))
        async with trio.open_nursery() as nursery:
            self.cancel = nursery.cancel_scope.cancel
            nursery.start_soon(self._reports)
            await nursery.start(self.server.serve, listener.sockets[0])
            started.set()
        listener.close()

    async def _reports(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.reactor.event_fd)
            for token, code in self.reactor.events():
                self.tokens[token](code)


@contextmanager
def serving(path: str, kinds: tuple[str, ...] = ("ocssd20",), geometry: Geometry = SMALL,
            **options: Any) -> Iterator[Target]:
    """Run a target until the block ends; nothing of it is left then."""
    target, started = Target(path, kinds, geometry, **options), threading.Event()
    loop = target.reactor.start()
    thread = threading.Thread(target=trio.run, args=(target.serve, started))
    thread.start()
    assert started.wait(10), "the server did not start"
    try:
        yield target
    finally:
        target.trio_token.run_sync_soon(target.cancel)
        thread.join(10)
        target.reactor.stop()
        loop.join(10)


@contextmanager
def attached(target: Target, *, shared: bool = True, memory_bytes: int = 64 << 20) -> Iterator[NvmeHost]:
    """A client with its memory mapped, and a host whose controller is enabled."""
    with VfioUserClient(target.path, memory_bytes, shared=shared) as client:
        client.negotiate()
        client.map_memory()
        host = NvmeHost(client)
        host.enable()
        try:
            yield host
        finally:
            host.close()
