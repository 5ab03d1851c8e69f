"""Owns the meeting of the daemon's device and the vfio-user server: settings in, counters and reports out."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import trio

from ocssd_daemon.device import DeviceError
from ocssd_daemon.log import kv
from ocssd_daemon.nvme.assembly import config_of, namespaces_of
from ocssd_daemon.nvme.namespaces import Namespace, Ocssd12Namespace
from ocssd_daemon.nvme.state_files import apply_bad_blocks
from ocssd_daemon.nvme.suitability import SPDK, problems
from ocssd_daemon.transport.vfio_user import Device as NvmeDevice
from ocssd_daemon.transport.vfio_user import VfioUserServer

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ocssd_daemon.device import Device
    from ocssd_daemon.settings import NvmeSettings
    from ocssd_daemon.transport.listen import Listener


async def serve_vfio_user(
    listener: Listener, device: Device, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *device* at *listener*, which stays the caller's, until cancelled.

    Raises DeviceError for a shape that the namespaces cannot have, or a file that cannot be read.
    """
    _warn_of_misfits(device)
    try:
        server = VfioUserServer(_nvme_device(device), device.new_token, device.forget)
    except ValueError as error:
        raise DeviceError(str(error)) from None
    device.add_transport("vfio-user", server.stats)
    async with trio.open_nursery() as nursery:
        for sock in listener.sockets:
            await nursery.start(server.serve, sock)
        task_status.started()


def _warn_of_misfits(device: Device) -> None:
    """Say at start what a host would only say by failing."""
    nvme = device.settings.nvme
    for version in {kind for kind in nvme.namespaces if kind != "block"}:
        for problem in problems(device.geometry, version, planes=nvme.planes, mdts=nvme.mdts):
            if problem.who != SPDK:
                log.warning(kv("nvme.geometry", namespace=version, who=problem.who, problem=problem.text))
    if device.ftl_owns.all() and set(nvme.namespaces) != {"block"}:
        log.warning(kv("nvme.no_raw_pus", reason="the host FTL owns every parallel unit; see ftl.pus"))


def _nvme_device(device: Device) -> NvmeDevice:
    nvme = device.settings.nvme
    disk = device.disk if "block" in nvme.namespaces else None
    store_uuid = device.store.superblock.uuid if device.settings.store else ""
    namespaces = namespaces_of(nvme, device.media, disk, store_uuid=store_uuid)
    with device.reactor.paused():
        _mark_bad_blocks(nvme, namespaces, device.ftl_owns)
    return NvmeDevice(
        device.reactor, config_of(nvme, time.monotonic), namespaces, device.ftl_owns,
        mapped_doorbells=nvme.doorbells == "mapped", wear_threshold=nvme.wear_threshold,
    )


def _mark_bad_blocks(nvme: NvmeSettings, namespaces: list[Namespace], owned: NDArray[np.uint8]) -> None:
    for namespace in namespaces:
        if nvme.bad_block_file is not None and isinstance(namespace, Ocssd12Namespace):
            apply_bad_blocks(nvme.bad_block_file, namespace, owned)
