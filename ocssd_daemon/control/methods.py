"""Owns what each control method does with the device.

Handlers only read, or change shared state under the reactor's lock; none may block. Knows nothing of
sockets or JSON.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ocssd_daemon import __version__
from ocssd_daemon.control import faults, schema
from ocssd_daemon.control.server import Handler
from ocssd_daemon.device import Device


def handlers(device: Device, addresses: Callable[[], list[str]]) -> dict[str, Handler]:
    """The handler of each method of the schema. *addresses* says where the daemon listens now."""
    started_s = time.monotonic()

    def info(params: schema.NoParams) -> schema.Info:
        return schema.Info(
            version=__version__,
            pid=os.getpid(),
            uptime_s=time.monotonic() - started_s,
            geometry=msgspec.structs.asdict(device.geometry),
            settings=msgspec.to_builtins(device.settings),
            disk=device.disk_info(),
            addresses=addresses(),
        )

    def stats(params: schema.NoParams) -> schema.Stats:
        return schema.Stats(**device.stats())

    table: dict[str, Callable[[Any], msgspec.Struct]] = {"info": info, "stats": stats, **faults.handlers(device)}
    assert table.keys() == schema.METHODS.keys()
    return table
