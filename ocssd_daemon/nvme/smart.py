"""Owns the SMART log (NVM Express Base 1.3, 5.14.1.2): what was counted, and what the flash itself says.

Wear, spare and bad chunks are read from the flash, so those are as old as the image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.nvme import logs as layout
from ..protocol.nvme.features import Feature
from ..protocol.nvme.ocssd20 import ChunkState
from .features import TEMPERATURE_KELVIN, crossed, value_of
from .namespaces import BlockNamespace, Namespace, RawNamespace

if TYPE_CHECKING:
    from .controller import Controller

DATA_UNIT_BYTES = 512 * 1000
SPARE_THRESHOLD = 10            # percent
UNDER = 1 << 20                 # THSEL of the temperature threshold
SPARE_LOW, TEMPERATURE, UNRELIABLE = 1 << 0, 1 << 1, 1 << 2
MOST_USED = 255                 # percentage used, as far as its byte goes


def percentage_used(media: Any) -> int:
    """Mean share of their endurance that the chunks have used, in percent; 0 where no limit is set."""
    limit = media.chunks["pe_limit"]
    limited = limit > 0
    if not limited.any():
        return 0
    used = media.chunks["pe_cycles"][limited] / limit[limited]
    return min(MOST_USED, round(100 * float(np.mean(used))))


def available_spare(media: Any, disk_bytes: int) -> int:
    """Percent of the flash besides *disk_bytes* (of all flash, where no disk is) that has not gone bad."""
    g = media.geometry
    spare_bytes = g.raw_bytes - disk_bytes
    lost_bytes = int(np.count_nonzero(media.chunks["state"] == ChunkState.OFFLINE)) * g.sectors * g.sector_bytes
    return max(0, 100 * (spare_bytes - lost_bytes) // spare_bytes) if spare_bytes else 0


def _flash(namespaces: Iterable[Namespace]) -> tuple[Any, int]:
    """The flash that the namespaces lie on, and how much of it is disk."""
    media, disk_bytes = None, 0
    for namespace in namespaces:
        if isinstance(namespace, RawNamespace | BlockNamespace) and namespace.media is not None:
            media = namespace.media
        if isinstance(namespace, BlockNamespace):
            disk_bytes += namespace.size_lbas * namespace.lba_bytes
    return media, disk_bytes


def smart_log(controller: Controller) -> bytes:
    counted = controller.config.lifetime.counters()
    media, disk_bytes = _flash(controller.namespaces.values())
    spare = available_spare(media, disk_bytes) if media is not None else 100
    used = percentage_used(media) if media is not None else 0
    zero = layout.SmartLog.parse(bytes(512))
    return layout.SmartLog.build({
        **zero, "critical_warning": _warning(controller, spare, used), "temperature": TEMPERATURE_KELVIN,
        "available_spare": spare, "spare_threshold": SPARE_THRESHOLD, "percentage_used": used,
        "data_units_read": -(-counted["bytes_read"] // DATA_UNIT_BYTES),
        "data_units_written": -(-counted["bytes_written"] // DATA_UNIT_BYTES),
        "host_reads": counted["reads"], "host_writes": counted["writes"], "power_cycles": 1,
        "power_on_hours": controller.config.lifetime.hours, "media_errors": counted["media_errors"],
        "error_entries": counted["errors"],
    })


def _warning(controller: Controller, spare: int, used: int) -> int:
    over = value_of(controller, Feature.TEMPERATURE_THRESHOLD)
    under = value_of(controller, Feature.TEMPERATURE_THRESHOLD, UNDER) & 0xFFFF
    hot = crossed(over & 0xFFFF, under=False) or crossed(under, under=True)
    return ((SPARE_LOW if spare < SPARE_THRESHOLD else 0) | (TEMPERATURE if hot else 0)
            | (UNRELIABLE if used >= 100 else 0))
