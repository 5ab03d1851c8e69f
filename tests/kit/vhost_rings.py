"""Owns real vhost-user rings for a test: one small flash in RAM, its reactor in a thread, its reports dispatched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from ocssd_daemon.device import Device
from ocssd_daemon.settings import Given, build

SMALL = {
    "geometry.groups": 1,
    "geometry.pus": 4,
    "geometry.chunks": 64,
    "geometry.sectors": 64,
    "vhost.num_queues": 2,
}


@contextmanager
def small_device(**more: object) -> Iterator[Device]:
    """A running device of 64 MiB of flash, with 2 queues; *more* settings as ``ftl__op=0.2``."""
    named = SMALL | {name.replace("__", "."): value for name, value in more.items()}
    device = Device(build({name: Given(value, "test") for name, value in named.items()}))
    device.start()
    try:
        yield device
    finally:
        device.stop()
        device.close()


@asynccontextmanager
async def dispatching(device: Device) -> AsyncIterator[None]:
    """Hand the reactor's reports on while the block runs, as the daemon does."""

    async def dispatch() -> None:
        while True:
            await trio.lowlevel.wait_readable(device.reactor.event_fd)
            device.dispatch()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dispatch)
        yield
        nursery.cancel_scope.cancel()
