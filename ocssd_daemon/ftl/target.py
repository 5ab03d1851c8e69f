"""Owns a block target's life: how large it is, how it starts on what the flash holds, how it is left.

Start, by what the image says of itself:

    left clean, L2P checksum right          load the L2P as a checkpoint
    otherwise                               rebuild the map from the out-of-band entries

A rebuild trusts the image's unmapped entries (trims) when the page cache that the dead process wrote to is still there
(same boot) or every flush went to disk (durability host); it checks data against its entries after a crash of the host.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from typing import Any

from ocssd_daemon._fast import Disk, Ftl, Media
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.store import Store, StoreError, boot_id

log = logging.getLogger(__name__)

CHUNK_CLOSED, CHUNK_OPEN = 2, 4
SPARE_LINES = 4  # open lines of both frontiers, one that GC moves into, one being collected


class CapacityError(ValueError):
    """The flash is too small for the over-provisioning that is asked for; says which number to change."""


def capacity_of(geometry: Geometry, op: float, exact: bool = False, pus: int | None = None) -> int:
    """Logical sectors of a disk over *pus* PUs (default: all): raw / (1 + *op*), leaving the lines that GC needs.

    *exact*: the user named *op*, so a device that cannot honour it is refused with CapacityError; otherwise small
    devices get more spare space than *op*, as pblk does.
    """
    line = (geometry.total_pus if pus is None else pus) * geometry.sectors
    raw = line * geometry.chunks
    wanted = int(raw / (1 + op))
    most = (geometry.chunks - SPARE_LINES) * line
    if most < line:
        raise CapacityError(
            f"geometry.chunks = {geometry.chunks}: the FTL needs at least {SPARE_LINES + 1} chunks per PU"
        )
    if wanted > most and exact:
        raise CapacityError(
            f"ftl.op = {op}: leaves {geometry.chunks - wanted / line:.1f} spare lines of {geometry.chunks}, "
            f"GC needs {SPARE_LINES}; use ftl.op >= {raw / most - 1:.3f} or more geometry.chunks"
        )
    return min(wanted, most)


@dataclass
class Target:
    """A running block target. ``how_started`` is "fresh", "checkpoint" or "recovered"."""

    store: Store
    media: Media
    ftl: Ftl
    disk: Disk
    durability: str
    how_started: str

    def close(self) -> None:
        """Clean stop: program the buffers and leave the L2P as a checkpoint. The store stays open."""
        self.ftl.program_buffers()
        stats = self.ftl.stats()
        self.store.save_superblock(
            clean=True,
            seq=self.ftl.seq,
            l2p_crc=_l2p_crc(self.store),
            counters={name: stats[name] for name in Ftl.COUNTERS},
        )
        if self.durability == "host":
            self.store.sync()


def _l2p_crc(store: Store) -> int:
    capacity = store.superblock.capacity_sectors
    return zlib.crc32(store.l2p[:capacity].data) if capacity else 0


def _start(ftl: Ftl, store: Store) -> str:
    """Bring *ftl* to what the flash holds; says how."""
    before = store.superblock
    if before.capacity_sectors == 0:
        ftl.load(0)
        return "fresh"
    ftl.restore_counters(before.counters)
    if before.clean and _l2p_crc(store) == before.l2p_crc:
        ftl.load(before.seq)
        return "checkpoint"
    same_boot = before.boot_id == boot_id()
    mapped = ftl.recover(
        trust_trims=same_boot or before.durability == "host",
        verify_data=not same_boot,
    )
    log.info("ftl.recovered mapped_sectors=%d same_boot=%s", mapped, same_boot)
    return "recovered"


def _check_owned(store: Store, owned: list[int]) -> None:
    before = store.superblock
    had = before.ftl_pus or list(range(store.geometry.total_pus))
    if before.capacity_sectors and had != owned:
        raise StoreError(f"{store.path}: its disk lies on PUs {had}, ftl.pus names {owned}; name the same ones")


def _check_not_raw(store: Store, owned: list[int]) -> None:
    """Flash that a guest wrote as raw flash is not taken for free: the FTL would erase it."""
    before = store.superblock
    if before.is_fresh or before.capacity_sectors:
        return
    states = store.chunks["state"].reshape(store.geometry.total_pus, -1)[owned]
    if ((states == CHUNK_OPEN) | (states == CHUNK_CLOSED)).any():
        raise StoreError(
            f"{store.path}: holds raw flash that was written (vfio-user, import, or the Python API); the host FTL "
            "would erase it: name other PUs with ftl.pus, format its namespace first, or use another file"
        )


def open_target(
    store: Store,
    *,
    op: float = 0.11,
    op_is_exact: bool = False,
    block_bytes: int = 512,
    durability: str = "process",
    read_only: bool = False,
    early_reset: bool = True,
    multi_reset: bool = False,
    pus: list[int] | None = None,
    **ftl_options: Any,
) -> Target:
    """Start a block target on *store*, over the PUs *pus* (default: all).

    *ftl_options* go to ``Ftl``: victim, frontiers, reserve_lines, d_choices, wear_spread, settle, retire, seed. An
    image keeps the capacity and the PUs that it was first used with. Raises CapacityError, StoreError or ValueError
    with one sentence.
    """
    owned = list(range(store.geometry.total_pus)) if pus is None else pus
    _check_owned(store, owned)
    _check_not_raw(store, owned)
    media = Media(store, early_reset=early_reset, multi_reset=multi_reset)
    known = store.superblock.capacity_sectors
    capacity = known or capacity_of(store.geometry, op, op_is_exact, len(owned))
    durable = durability == "host" and store.fd >= 0
    ftl = Ftl(media, capacity, pus=owned, host_durable=durable, **ftl_options)
    try:
        how = _start(ftl, store)
    except ValueError as error:
        raise StoreError(f"{store.path}: {error}; the image is damaged") from None
    store.save_superblock(
        clean=False, boot_id=boot_id(), durability=durability, capacity_sectors=capacity, ftl_pus=owned
    )
    if durability == "host":
        store.sync()
    return Target(store, media, ftl, Disk(ftl, block_bytes, read_only), durability, how)
