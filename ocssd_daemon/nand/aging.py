"""Owns what a drive looks like before its first use here: factory bad blocks, endurance of each chunk, a used life.

Works on a chunk table (``layout.CHUNK_DTYPE``) that nothing runs on yet. Everything comes from a seed.

    bad       "12" chunks, "2%" of them, or a list GROUP/PU/CHUNK,GROUP/PU/CHUNK
    age       "life=90%,fill=80%,retention=180d,seed=7"
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ocssd_daemon.nand.geometry import Geometry

CHUNK_OFFLINE = 8
NO_WP = 0xFFFF_FFFF
FACTORY_MARK = 1 << 4  # of chunk_t.flags: BAD in OCSSD 1.2's table (native/nvme_flash.pxd, MARK_SHIFT)
DAY_NS = 86_400_000_000_000

Chunks = npt.NDArray[Any]


class AgingError(ValueError):
    """A bad-block list or an age that cannot be; one line."""


class Age(msgspec.Struct, frozen=True):
    """A used life. ``life`` and ``fill`` are shares, 0 to 1."""

    life: float = 0.0
    fill: float = 0.0
    retention_days: float = 0.0
    seed: int = 0


def _share(key: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise AgingError(f"{key}={text}: must be a share such as 90% or 0.9")
    return value


def _days(key: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)d?", text)
    if match is None:
        raise AgingError(f"{key}={text}: must be days such as 180d")
    return float(match[1])


def _seed(key: str, text: str) -> int:
    if not text.isdigit():
        raise AgingError(f"{key}={text}: must be a whole number")
    return int(text)


_AGE_KEYS = {
    "life": ("life", _share),
    "fill": ("fill", _share),
    "retention": ("retention_days", _days),
    "seed": ("seed", _seed),
}


def parse_age(text: str) -> Age:
    """The age that *text* says. Raises AgingError."""
    fields: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in _AGE_KEYS:
            raise AgingError(f"{part.strip()}: must be KEY=VALUE with one of {', '.join(_AGE_KEYS)}")
        name, read = _AGE_KEYS[key]
        fields[name] = read(key, value)
    return msgspec.convert(fields, Age)


def _listed(text: str, geometry: Geometry) -> list[int]:
    indices = []
    for place in text.split(","):
        parts = place.strip().split("/")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise AgingError(f"{place.strip()}: must be GROUP/PU/CHUNK")
        group, pu, chunk = map(int, parts)
        if group >= geometry.groups or pu >= geometry.pus or chunk >= geometry.chunks:
            raise AgingError(
                f"{place.strip()}: the flash has {geometry.groups}/{geometry.pus}/{geometry.chunks}"
            )
        indices.append((group * geometry.pus + pu) * geometry.chunks + chunk)
    return indices


def bad_chunks(text: str, geometry: Geometry, seed: int) -> list[int]:
    """Indices of the chunks that *text* makes bad. Raises AgingError."""
    if "/" in text:
        return _listed(text, geometry)
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise AgingError(f"{text}: must be a number of chunks, a percentage, or a list of GROUP/PU/CHUNK")
    count = round(geometry.total_chunks * float(match[1]) / 100) if match[2] else int(match[1])
    if count > geometry.total_chunks:
        raise AgingError(f"{text}: the flash has {geometry.total_chunks} chunks")
    return sorted(np.random.default_rng(seed).choice(geometry.total_chunks, count, replace=False).tolist())


def mark_bad(chunks: Chunks, indices: list[int]) -> None:
    """Take chunks offline for good, as bad from the factory."""
    chunks["state"][indices] = CHUNK_OFFLINE
    chunks["flags"][indices] |= FACTORY_MARK
    chunks["wp"][indices] = NO_WP


def set_endurance(chunks: Chunks, pe_limit: int, spread: float, seed: int) -> None:
    """Give each chunk its own limit: normal around *pe_limit* with a standard deviation of *spread* times it."""
    drawn = np.random.default_rng(seed).normal(pe_limit, spread * pe_limit, len(chunks))
    chunks["pe_limit"] = np.clip(np.rint(drawn), 1, 0xFFFF_FFFF).astype(np.uint32)


def set_life(chunks: Chunks, life: float, pe_limit: int, seed: int) -> None:
    """Use up *life* of each chunk's endurance, with the small spread that wear levelling leaves."""
    limit = np.where(chunks["pe_limit"] > 0, chunks["pe_limit"], pe_limit)
    noise = np.random.default_rng(seed).normal(1.0, 0.02, len(chunks))
    used = np.clip(np.rint(life * limit * noise), 0, np.maximum(limit.astype(np.int64) - 1, 0))
    chunks["pe_cycles"] = used.astype(np.uint32)
    chunks["wear_index"] = np.minimum(255, 255 * used.astype(np.int64) // np.maximum(limit, 1)).astype(
        np.uint8
    )
