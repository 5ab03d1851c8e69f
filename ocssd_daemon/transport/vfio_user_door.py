"""Owns the meeting of the daemon's device and the vfio-user server: settings in, counters and reports out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ocssd_daemon.nvme.assembly import config_of, namespaces_of
from ocssd_daemon.transport.vfio_user import Device as NvmeDevice
from ocssd_daemon.transport.vfio_user import VfioUserServer

if TYPE_CHECKING:
    from ocssd_daemon.device import Device
    from ocssd_daemon.transport.listen import Listener


async def serve_vfio_user(
    listener: Listener, device: Device, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *device* at *listener*, which stays the caller's, until cancelled. Raises ValueError for a shape that the
    namespaces cannot have."""
    server = VfioUserServer(_nvme_device(device), device.new_token, device.forget)
    device.add_transport("vfio-user", server.stats)
    async with trio.open_nursery() as nursery:
        for sock in listener.sockets:
            await nursery.start(server.serve, sock)
        task_status.started()


def _nvme_device(device: Device) -> NvmeDevice:
    nvme = device.settings.nvme
    disk = device.disk if "block" in nvme.namespaces else None
    store_uuid = device.store.superblock.uuid if device.settings.store else ""
    return NvmeDevice(
        device.reactor, config_of(nvme), namespaces_of(nvme, device.media, disk, store_uuid=store_uuid),
        device.ftl_owns, mapped_doorbells=nvme.doorbells == "mapped", wear_threshold=nvme.wear_threshold,
        seed=device.settings.seed,
    )
