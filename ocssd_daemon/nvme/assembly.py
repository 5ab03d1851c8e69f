"""Owns the step from settings to one controller: its configuration, its namespaces, and the queues that know
them.

Takes the flash and the disk that there are; opens nothing. Raises ValueError with one sentence that names
the setting.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .config import ControllerConfig
from .controller import Controller
from .lifetime import Lifetime
from .namespaces import BlockNamespace, Namespace, Ocssd12Namespace, RawNamespace, raw_namespace

_SEED = uuid.UUID("6f637373-642d-6461-656d-6f6e00000000")


def config_of(nvme: Any, now_s: Callable[[], float] = lambda: 0.0) -> ControllerConfig:
    """The controller's configuration from the ``nvme`` table of the settings; *now_s* counts its hours."""
    return ControllerConfig(
        lifetime=Lifetime(now_s),
        vid=nvme.vid, did=nvme.did, serial=nvme.serial, model=nvme.model, firmware=nvme.firmware,
        mdts=nvme.mdts,
        queue_pairs=nvme.queues, entries=nvme.entries, aerl=nvme.aerl, acl=nvme.acl,
        error_entries=nvme.error_entries,
        stride=nvme.stride, write_cache=nvme.write_cache, page_shift_max=nvme.mpsmax,
        coalesce_commands=nvme.coalesce_commands, coalesce_100us=nvme.coalesce_us // 100,
        # A guest with shadow doorbells rings when we sleep; on a mapped page nobody would hear it.
        shadow_doorbells=nvme.shadow_doorbells and nvme.doorbells == "trapped",
    )


def identity_of(serial: str, nsid: int, store_uuid: str = "") -> uuid.UUID:
    """The same for every start on the same image (or, in RAM, with the same serial)."""
    return uuid.uuid5(_SEED, f"{store_uuid or serial}/{nsid}")


def namespaces_of(nvme: Any, media: Any, disk: Any, *, store_uuid: str = "") -> list[Namespace]:
    """One namespace for each name in ``nvme.namespaces``, numbered from 1. Several raw ones share out the
    groups, several block ones the disk.
    """
    kinds: Sequence[str] = nvme.namespaces
    shares = _shares(media.geometry.groups, [kind for kind in kinds if kind != "block"])
    parts = _parts(disk, kinds.count("block"))
    found: list[Namespace] = []
    for nsid, kind in enumerate(kinds, 1):
        identity = identity_of(nvme.serial, nsid, store_uuid)
        if kind == "block":
            found.append(_block(nsid, disk, media, parts.pop(0), identity))
        else:
            found.append(raw_namespace(kind, nsid, media, groups=shares.pop(0), planes=nvme.planes,
                                       dlfeat=nvme.dlfeat,
                                       identity=identity))
    return found


def _shares(groups: int, raw_kinds: Sequence[str]) -> list[range]:
    count = len(raw_kinds)
    if count and groups % count:
        raise ValueError(f"nvme.namespaces: {count} raw namespaces cannot share {groups} groups evenly")
    each = groups // count if count else 0
    return [range(i * each, (i + 1) * each) for i in range(count)]


def _parts(disk: Any, count: int) -> list[range]:
    """The blocks of each of *count* block namespaces: equal parts of the disk, in whole sectors."""
    if not count:
        return []
    if disk is None:
        raise ValueError("nvme.namespaces: block needs parallel units for the host FTL (ftl.pus)")
    each = disk.size_bytes // count // disk.sector_bytes * disk.sector_bytes // disk.block_bytes
    if not each:
        raise ValueError(f"nvme.namespaces: {count} block namespaces cannot share a disk of {disk.size_bytes} bytes")
    return [range(i * each, (i + 1) * each) for i in range(count)]


def _block(nsid: int, disk: Any, media: Any, part: range, identity: uuid.UUID) -> BlockNamespace:
    return BlockNamespace(nsid, len(part), disk.block_bytes, read_only=disk.read_only, identity=identity, disk=disk,
                          media=media, base_lbas=part.start, preferred_lbas=disk.sector_bytes // disk.block_bytes)


def attach(namespaces: Sequence[Namespace], queues: Any, foreign: np.ndarray) -> None:
    """Make the namespaces known to the I/O queues. *foreign* is uint8, one per PU, and stays shared."""
    for namespace in namespaces:
        if isinstance(namespace, Ocssd12Namespace):     # 1.2 has no chunk states: a block may always be erased
            namespace.media.early_reset = namespace.media.multi_reset = True
        if isinstance(namespace, RawNamespace):
            queues.add_raw(namespace, foreign)
        elif isinstance(namespace, BlockNamespace):
            queues.add_block(namespace.nsid, namespace.disk, namespace.base_lbas, namespace.size_lbas)


def build_controller(config: ControllerConfig, namespaces: Sequence[Namespace], queues: Any,
                     foreign: np.ndarray, *,
                     wear_threshold: int = 0, flash_times_ns: tuple[int, ...] | None = None) -> Controller:
    options: dict[str, Any] = {} if flash_times_ns is None else {"flash_times_ns": flash_times_ns}
    return Controller(config, list(namespaces), queues, foreign_pus=lambda: foreign.astype(bool),
                      wear_threshold=wear_threshold, **options)
