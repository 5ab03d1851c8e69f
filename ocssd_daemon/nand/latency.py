"""Owns the latency numbers: the tables of cell types, profile files, and how settings become one set of numbers.

Units: nanoseconds; sizes in sectors. ``none`` is the profile of zeros. Numbers that are set replace the profile's.
Cell tables: SLC, MLC (Micron L95B), TLC as used by other emulators of the same boards; QLC is TLC scaled.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from ocssd_daemon.nand.geometry import Geometry

MAX_NS = 10**12
PAGE_KINDS = 4  # lower, middle, upper, top


class LatencyError(ValueError):
    """A latency number that cannot be: names the key (without ``latency.``) and the rule."""

    def __init__(self, key: str, rule: str) -> None:
        super().__init__(rule)
        self.key = key


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each step costs. Per page kind: one number for all kinds, or one per kind from the lower page up."""

    sense_ns: tuple[int, ...] = (0,)
    program_ns: tuple[int, ...] = (0,)
    erase_ns: int = 0
    transfer_ns_per_sector: int = 0
    controller_ns: int = 0
    buffer_ns: int = 0
    buffer_sectors: int | None = None  # None: two rows for each PU; 0: a write ends when it is programmed
    page_sectors: int | None = None  # None: ws_min
    planes: int | None = None  # None: ws_opt / page_sectors
    pairing: Literal["modulo", "shadow"] = "modulo"
    suspend: bool = False
    suspend_ns: int = 0

    def kinds_of_rows(self, sectors: int) -> list[int]:
        """The page kind of each row of a chunk of *sectors*: 0 lower, 1 middle or upper, ...

        ``modulo``: row number modulo the kinds. ``shadow``: the order in which flash with several bits a cell is
        programmed, so that a finished word line is disturbed least: the lower page of word line w, then the next page
        of w - 1, and so on. With three kinds that begins 0 0 1 0 1 2 0 1 2 and ends 1 2 2.
        """
        kinds = max(len(self.sense_ns), len(self.program_ns))
        rows = -(-sectors // ((self.page_sectors or 1) * (self.planes or 1)))
        if self.pairing == "modulo":
            return [row % kinds for row in range(rows)]
        lines = -(-rows // kinds)
        order = [kind for step in range(lines + kinds - 1) for kind in range(kinds) if 0 <= step - kind < lines]
        return order[:rows]

    @property
    def is_none(self) -> bool:
        return not any((*self.sense_ns, *self.program_ns, self.erase_ns, self.transfer_ns_per_sector,
                        self.controller_ns, self.buffer_ns))  # fmt: skip


def _scaled(values: tuple[int, ...], *factors: float) -> tuple[int, ...]:
    return tuple(round(values[min(i, len(values) - 1)] * factor) for i, factor in enumerate(factors))


_TLC_SENSE = (56_500, 77_500, 106_000)
_TLC_PROGRAM = (820_500, 2_225_000, 5_734_000)
_QLC_FACTORS = (1.05, 1.1, 1.2, 1.6)
_COMMON: dict[str, Any] = {"controller_ns": 2_000, "buffer_ns": 2_000, "suspend_ns": 20_000}
_PAIRED: dict[str, Any] = {**_COMMON, "pairing": "shadow"}

PROFILES: dict[str, Latency] = {
    "none": Latency(),
    "slc": Latency(
        sense_ns=(40_000,), program_ns=(800_000,), erase_ns=2_000_000, transfer_ns_per_sector=5_000, **_COMMON
    ),
    "mlc": Latency(
        sense_ns=(48_000, 64_000),
        program_ns=(850_000, 2_300_000),
        erase_ns=3_000_000,
        transfer_ns_per_sector=13_108,
        **_PAIRED,
    ),
    "tlc": Latency(
        sense_ns=_TLC_SENSE, program_ns=_TLC_PROGRAM, erase_ns=3_000_000, transfer_ns_per_sector=13_108, **_PAIRED
    ),
    "qlc": Latency(
        sense_ns=_scaled(_TLC_SENSE, *_QLC_FACTORS),
        program_ns=_scaled(_TLC_PROGRAM, *_QLC_FACTORS),
        erase_ns=3_000_000,
        transfer_ns_per_sector=13_108,
        **_PAIRED,
    ),
}


def load_profile(name: str) -> Latency:
    """A built-in profile, or one from a TOML file of the same keys. Raises LatencyError for anything else."""
    if name in PROFILES:
        return PROFILES[name]
    if not ("/" in name or name.endswith(".toml")):
        raise LatencyError("profile", f"must be one of {', '.join(PROFILES)}, or the path of a TOML file")
    text = ""
    try:
        text = Path(name).read_text(encoding="utf-8")
        return msgspec.convert(_lists(tomllib.loads(text)), Latency)
    except OSError as error:
        raise LatencyError("profile", f"{name}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LatencyError("profile", f"{name}: {error}") from None
    except msgspec.ValidationError as error:
        raise LatencyError("profile", f"{name}{_with_line(text, str(error))}") from None


def _with_line(text: str, complaint: str) -> str:
    """What is wrong with a profile's field, and in which line of *text* that is."""
    field = re.search(r"field `(\w+)`|`\$\.(\w+)", complaint)
    known = f"; there are {', '.join(Latency.__struct_fields__)}" if "unknown field" in complaint else ""
    return _line_of(text, (field[1] or field[2]) if field else "") + f": {complaint}{known}"


def _line_of(text: str, name: str) -> str:
    """``:N`` for the line that sets *name*, or nothing."""
    lines = enumerate(text.splitlines(), 1)
    return next((f":{n}" for n, line in lines if name and re.match(rf"\s*{name}\s*=", line)), "")


def _lists(fields: dict[str, Any]) -> dict[str, Any]:
    """One number may stand for the same number for every page kind."""
    per_kind = ("sense_ns", "program_ns")
    return {key: (value,) if key in per_kind and isinstance(value, int) else value for key, value in fields.items()}


def resolve(profile: str, overrides: dict[str, Any], geometry: Geometry) -> Latency | None:
    """The numbers in force for *geometry*: *profile* with *overrides* (None and empty: not set). None: no latency.

    Raises LatencyError.
    """
    chosen = {key: value for key, value in _lists(overrides).items() if value is not None and value != ()}
    merged = msgspec.structs.replace(load_profile(profile), **chosen)
    try:
        return None if merged.is_none else _checked(_completed(merged, geometry), geometry)
    except LatencyError as error:
        if error.key in chosen or profile in PROFILES:
            raise
        at = _line_of(Path(profile).read_text(encoding="utf-8"), error.key)
        value = msgspec.json.encode(getattr(merged, error.key)).decode()
        raise LatencyError("profile", f"{profile}{at}: {error.key} = {value}: {error}") from None


def _completed(latency: Latency, geometry: Geometry) -> Latency:
    page = geometry.ws_min if latency.page_sectors is None else latency.page_sectors
    planes = max(1, geometry.ws_opt // max(1, page)) if latency.planes is None else latency.planes
    buffer = latency.buffer_sectors
    if buffer is None:
        buffer = 2 * geometry.total_pus * max(page * planes, geometry.ws_opt)
    return msgspec.structs.replace(latency, page_sectors=page, planes=planes, buffer_sectors=buffer)


def _checked(latency: Latency, geometry: Geometry) -> Latency:
    for key in ("sense_ns", "program_ns"):
        values = getattr(latency, key)
        if not 1 <= len(values) <= PAGE_KINDS:
            raise LatencyError(key, f"must be 1 to {PAGE_KINDS} numbers, one per page kind")
        if not all(0 <= value <= MAX_NS for value in values):
            raise LatencyError(key, f"must be from 0 to {MAX_NS} ns")
    for key in ("erase_ns", "transfer_ns_per_sector", "controller_ns", "buffer_ns", "suspend_ns"):
        if not 0 <= getattr(latency, key) <= MAX_NS:
            raise LatencyError(key, f"must be from 0 to {MAX_NS} ns")
    for key in ("page_sectors", "planes"):
        if getattr(latency, key) < 1:
            raise LatencyError(key, "must be at least 1")
    if (latency.page_sectors or 1) * (latency.planes or 1) > geometry.sectors:
        raise LatencyError("planes", f"a row of all planes must fit a chunk of {geometry.sectors} sectors")
    if not 0 <= (latency.buffer_sectors or 0) <= 1 << 24:
        raise LatencyError("buffer_sectors", f"must be from 0 to {1 << 24}")
    return latency
