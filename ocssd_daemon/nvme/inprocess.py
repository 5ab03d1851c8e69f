"""Owns the Python API: an Open-Channel SSD inside this process, driven with numpy arrays.

So a researcher writes an FTL in a notebook against the very rules that a guest meets::

    from ocssd_daemon import Device

    ssd = Device(groups=2, pus=4, chunks=64, sectors=256)
    lbas = ssd.lba(group=0, pu=1, chunk=3, sector=range(8))
    status, failed = ssd.write(lbas, data, oob)         # data (8, 4096) uint8, oob (8, 16) uint8
    status, failed, data, oob = ssd.read(lbas)

An LBA packs, from bit 0: sector, chunk, PU, group. Failures are values: *status* is NVMe's (SCT << 8 | SC, 0 is
success; ``describe(status)`` says it in words), *failed* a 64-bit map of the addresses that failed. Exceptions are for
wrong arguments (ValueError). Sizes are sectors unless the name says bytes. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ocssd_daemon._fast import Media
from ocssd_daemon._flash import Flash
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.store import Store, open_file, open_ram

from ..protocol.nvme import ocssd20
from ..protocol.nvme.status import describe
from .controller import FLASH_TIMES_NS
from .namespaces import raw_namespace
from .raw20 import chunk_log, geometry

__all__ = ["Device", "describe"]

MAX_ADDRESSES = ocssd20.MAX_VECTOR_LBAS
TIMES = ("trdt_ns", "trdm_ns", "twrt_ns", "twrm_ns", "tcrst_ns", "tcrsm_ns")


class Device:
    """OCSSD 2.0 flash in RAM, or in the image file *store*. Keyword arguments are the fields of the geometry.

    *early_reset*: an open chunk may be reset. *multi_reset*: a free one too. *dlfeat*: unwritten sectors read as zeroes
    (1) or ones (2). Acquires the image and its lock until ``close``, also by ``with``. Raises GeometryError,
    StoreError.
    """

    def __init__(self, *, store: str | None = None, early_reset: bool = True, multi_reset: bool = False,
                 dlfeat: int = 1,
                 **shape: int) -> None:
        wanted = validate(msgspec.convert(shape, Geometry))
        self._store: Store = open_ram(wanted) if store is None else open_file(store, wanted, bool(shape))
        self.geometry = self._store.geometry
        self._media = Media(self._store, early_reset=early_reset, multi_reset=multi_reset)
        self._namespace = raw_namespace("ocssd20", 1, self._media, dlfeat=dlfeat)
        self._flash = Flash(self._namespace, np.zeros(self.geometry.total_pus, np.uint8))

    def close(self) -> None:
        """Release the image. Arrays that were returned stay valid."""
        del self._flash, self._namespace, self._media
        self._store.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what there is ------------------------------------------------------------------------------------

    def identify(self) -> dict[str, Any]:
        """The geometry structure that a guest gets (admin command E2h), by the specification's names."""
        raw = geometry(self._namespace, wear_threshold=0, times_ns=dict(zip(TIMES, FLASH_TIMES_NS, strict=True)))
        parsed = ocssd20.Geometry.parse(raw)
        return {name: value for name, value in parsed.items() if isinstance(value, int)}

    def chunk_log(self) -> NDArray[Any]:
        """One record per chunk, ordered chunk, PU, group: state, type, wear_index, slba, cnlb, wp. A copy."""
        return chunk_log(self._namespace, np.zeros(self.geometry.total_pus, bool))

    def lba(self, group: int = 0, pu: int = 0, chunk: int = 0, sector: int | Iterable[int] = 0) -> NDArray[np.uint64]:
        """Addresses as uint64, one per sector. Raises ValueError outside the geometry."""
        sectors = np.atleast_1d(np.asarray(list(sector) if isinstance(sector, Iterable) else sector, np.int64))
        given: dict[str, Any] = {"group": np.int64(group), "pu": np.int64(pu), "chunk": np.int64(chunk)}
        given["sector"] = sectors
        address = np.zeros(sectors.shape, np.uint64)
        for field in self._namespace.fields:
            part = given.get(field.name, np.int64(0))
            if np.any(part < 0) or np.any(part >= field.count):
                raise ValueError(f"{field.name} {part}: there are {field.count}")
            address |= np.asarray(part, np.uint64) << np.uint64(field.offset)
        return address

    def set_dulbe(self, enabled: bool) -> None:
        """Make reading what is not written an error (287h) instead of predefined data."""
        self._flash.set_dulbe(enabled)

    # ---- commands: up to 64 addresses each ----------------------------------------------------------------

    def write(self, lbas: ArrayLike, data: ArrayLike, oob: ArrayLike | None = None) -> tuple[int, int]:
        """Vector write. *data* is uint8 of shape (n, sector_bytes), *oob* (n, oob_bytes) or None to leave it alone."""
        addresses = _addresses(lbas)
        sectors = _rows(data, len(addresses), self.geometry.sector_bytes, "data")
        extra = None if oob is None else _rows(oob, len(addresses), self.geometry.oob_bytes, "oob")
        return self._flash.write(addresses, sectors, extra)

    def read(self, lbas: ArrayLike) -> tuple[int, int, NDArray[np.uint8], NDArray[np.uint8]]:
        """Vector read: ``(status, failed, data, oob)``, shapes (n, sector_bytes) and (n, oob_bytes)."""
        addresses = _addresses(lbas)
        data = np.zeros((len(addresses), self.geometry.sector_bytes), np.uint8)
        oob = np.zeros((len(addresses), self.geometry.oob_bytes), np.uint8)
        status, failed = self._flash.read(addresses, data, oob if oob.size else None)
        return status, failed, data, oob

    def reset(self, lbas: ArrayLike) -> tuple[int, int]:
        """Vector reset: erases the chunk of each address."""
        return self._flash.reset(_addresses(lbas))

    def copy(self, sources: ArrayLike, targets: ArrayLike) -> tuple[int, int]:
        """Vector copy, data and OOB; *targets* obey the rules of a write."""
        origin, addresses = _addresses(sources), _addresses(targets)
        if len(origin) != len(addresses):
            raise ValueError(f"{len(origin)} sources for {len(addresses)} targets")
        return self._flash.copy(origin, addresses)


def _addresses(lbas: ArrayLike) -> NDArray[np.uint64]:
    addresses = np.ascontiguousarray(np.atleast_1d(lbas), np.uint64)
    if addresses.ndim != 1 or not 1 <= addresses.size <= MAX_ADDRESSES:
        raise ValueError(f"{addresses.size} addresses: 1 to {MAX_ADDRESSES}")
    return addresses


def _rows(given: ArrayLike, count: int, width: int, what: str) -> NDArray[np.uint8]:
    rows = np.ascontiguousarray(given, np.uint8)
    if rows.shape != (count, width):
        raise ValueError(f"{what} has shape {rows.shape}, expected {(count, width)}")
    return rows
