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

With a virtual clock commands take the time that the flash would take, without anybody waiting for it::

    ssd = Device(clock="virtual", latency="tlc")
    ssd.now_ns = 5_000              # when the next command is issued
    status, failed = ssd.reset(ssd.lba(chunk=3))
    ssd.done_ns                     # when it ends
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ocssd_daemon._fast import Media
from ocssd_daemon._flash import Flash
from ocssd_daemon._physics import Timing, attach_timing
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.latency import Latency, resolve
from ocssd_daemon.nand.store import Store, boot_id, open_file, open_ram

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
    (1) or ones (2). *clock* ``virtual``: a command is issued at ``now_ns``, which is yours to set, and ends at
    ``done_ns``, by the numbers of *latency*: the name of a profile, a profile file, or a dict of the settings
    ``latency.*``. ``real``: nothing takes time. Acquires the image and its lock until ``close``, also by ``with``.
    Raises GeometryError, StoreError, LatencyError.
    """

    def __init__(self, *, store: str | None = None, early_reset: bool = True, multi_reset: bool = False,
                 dlfeat: int = 1, clock: Literal["real", "virtual"] = "real",
                 latency: str | Mapping[str, Any] = "none", **shape: int) -> None:
        if clock not in ("real", "virtual"):
            raise ValueError(f"clock={clock}: must be real or virtual")
        if clock == "real" and latency != "none":
            raise ValueError("latency: only with clock='virtual'; a daemon serves flash that takes real time")
        wanted = validate(msgspec.convert(shape, Geometry))
        self._store: Store = open_ram(wanted) if store is None else open_file(store, wanted, bool(shape))
        self.geometry = self._store.geometry
        self._store.save_superblock(boot_id=boot_id())      # used from now on: nothing else may take it for fresh
        self._media = Media(self._store, early_reset=early_reset, multi_reset=multi_reset)
        self._namespace = raw_namespace("ocssd20", 1, self._media, dlfeat=dlfeat)
        self._flash = Flash(self._namespace, np.zeros(self.geometry.total_pus, np.uint8))
        if clock == "virtual":
            try:
                attach_timing(self._media, _timing(latency, self.geometry), virtual=True)
            except BaseException:
                self.close()                                # or the image would stay locked
                raise

    def close(self) -> None:
        """Release the image. Arrays that were returned stay valid."""
        del self._flash, self._namespace, self._media
        self._store.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- time, with clock="virtual" -----------------------------------------------------------------------

    @property
    def now_ns(self) -> int:
        """When the next command is issued. It never runs backwards: an earlier time counts as the latest one so far."""
        return int(self._media.now_ns)

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self._media.now_ns = value

    @property
    def done_ns(self) -> int:
        """When the last command ends."""
        return int(self._media.done_ns)

    # ---- what there is ------------------------------------------------------------------------------------

    def identify(self) -> dict[str, Any]:
        """The geometry structure that a guest gets (admin command E2h), by the specification's names.

        Counts are plain, times in ns; ``mccap`` has bit 0 vector copy, 1 reset of free chunks, 2 reset of open ones.
        """
        raw = geometry(self._namespace, wear_threshold=0, times_ns=dict(zip(TIMES, FLASH_TIMES_NS, strict=True)))
        parsed = ocssd20.Geometry.parse(raw)
        return {name: value for name, value in parsed.items() if isinstance(value, int)}

    def chunk_log(self) -> NDArray[Any]:
        """One record per chunk, ordered chunk, PU, group: shape ``(groups * pus * chunks,)``. A copy.

        ``state`` 1 free, 2 closed, 4 open, 8 offline; ``type`` 1 sequential, 2 random; ``wear_index`` 0 to 255;
        ``slba`` its first address; ``cnlb`` sectors; ``wp`` sectors from its start, all ones where there is none.
        """
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
        """Vector write: ``(status, failed)``.

        *lbas*: n addresses, 1 to 64. *data*: uint8 of shape (n, sector_bytes). *oob*: uint8 (n, oob_bytes), or None to
        leave what is there. A write that breaks a rule does nothing: 280h outside, closed, offline or past the end,
        2F2h not at the write pointer, 002h no multiple of ws_min. One that the flash fails closes its chunk (2F1h).
        Raises ValueError for arrays of another shape or dtype.
        """
        addresses = _addresses(lbas)
        sectors = _rows(data, len(addresses), self.geometry.sector_bytes, "data")
        extra = None if oob is None else _rows(oob, len(addresses), self.geometry.oob_bytes, "oob")
        return self._flash.write(addresses, sectors, extra)

    def read(self, lbas: ArrayLike) -> tuple[int, int, NDArray[np.uint8], NDArray[np.uint8]]:
        """Vector read: ``(status, failed, data, oob)``, uint8 of shapes (n, sector_bytes) and (n, oob_bytes).

        What is not written, or lies less than mw_cunits before the write pointer, reads as *dlfeat* says, with an OOB
        of FFh; with ``set_dulbe`` it fails with 287h. 281h: the flash cannot recover it. Raises ValueError.
        """
        addresses = _addresses(lbas)
        data = np.zeros((len(addresses), self.geometry.sector_bytes), np.uint8)
        oob = np.zeros((len(addresses), self.geometry.oob_bytes), np.uint8)
        status, failed = self._flash.read(addresses, data, oob if oob.size else None)
        return status, failed, data, oob

    def reset(self, lbas: ArrayLike) -> tuple[int, int]:
        """Vector reset: erases the chunk of each address (any sector of it): ``(status, failed)``.

        Every address is tried. 2C0h offline; 2C1h outside, not to be reset in its state, or failed, and then the chunk
        is offline. Raises ValueError.
        """
        return self._flash.reset(_addresses(lbas))

    def copy(self, sources: ArrayLike, targets: ArrayLike) -> tuple[int, int]:
        """Vector copy of n sectors, data and OOB: ``(status, failed)``.

        *targets* obey the rules of a write; all sources must be readable (281h, or 287h with ``set_dulbe``), or
        nothing is done. Raises ValueError.
        """
        origin, addresses = _addresses(sources), _addresses(targets)
        if len(origin) != len(addresses):
            raise ValueError(f"{len(origin)} sources for {len(addresses)} targets")
        return self._flash.copy(origin, addresses)


def _timing(latency: str | Mapping[str, Any], geometry: Geometry) -> Timing | None:
    numbers = {"profile": latency} if isinstance(latency, str) else dict(latency)
    profile = numbers.pop("profile", "none")
    if unknown := sorted(numbers.keys() - set(Latency.__struct_fields__)):
        raise ValueError(f"latency: {unknown[0]}: must be one of profile, {', '.join(Latency.__struct_fields__)}")
    resolved = resolve(profile, numbers, geometry)
    return Timing(geometry, resolved) if resolved else None


def _addresses(lbas: ArrayLike) -> NDArray[np.uint64]:
    given = np.atleast_1d(lbas)
    if given.ndim != 1 or not 1 <= given.size <= MAX_ADDRESSES:
        raise ValueError(f"addresses have shape {given.shape}: 1 to {MAX_ADDRESSES} in a row")
    if given.dtype.kind not in "ui" or (given.dtype.kind == "i" and given.min() < 0):
        raise ValueError(f"addresses are {given.dtype}: must be integers from 0")
    return np.ascontiguousarray(given, np.uint64)


def _rows(given: ArrayLike, count: int, width: int, what: str) -> NDArray[np.uint8]:
    """*given* as it is: other types would lose bytes silently."""
    rows = np.asarray(given)
    if rows.shape != (count, width):
        raise ValueError(f"{what} has shape {rows.shape}, expected {(count, width)}")
    if rows.dtype != np.uint8:
        raise ValueError(f"{what} has dtype {rows.dtype}, expected uint8")
    return np.ascontiguousarray(rows)
