"""Owns the shape of the flash: its fields, their rules, and what is derived from them.

All counts are plain numbers, sizes end in ``_bytes``. Spec: OCSSD 2.0, geometry (admin command E2h).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

MAX_SECTORS_TOTAL = 1 << 31  # an L2P entry is 32 bits wide and ppa + 1 must fit


class GeometryError(ValueError):
    """A geometry that cannot exist: names the field, its value and the rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"geometry.{field} = {value}: {rule}")
        self.field = field


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the flash. The default is 4 GiB raw: 2 groups x 4 PUs x 128 chunks x 1024 sectors x 4 KiB."""

    groups: Annotated[int, Meta(description="groups (channels in 1.2)")] = 2
    pus: Annotated[int, Meta(description="parallel units per group (LUNs in 1.2)")] = 4
    chunks: Annotated[int, Meta(description="chunks per parallel unit (blocks in 1.2)")] = 128
    sectors: Annotated[int, Meta(description="sectors per chunk")] = 1024
    sector_bytes: Annotated[int, Meta(description="bytes per sector: a power of two")] = 4096
    oob_bytes: Annotated[int, Meta(description="out-of-band bytes per sector")] = 16
    ws_min: Annotated[int, Meta(description="sectors: the smallest write, and its granularity")] = 4
    ws_opt: Annotated[int, Meta(description="sectors: the write size that is fastest")] = 8
    mw_cunits: Annotated[int, Meta(description="sectors before the write pointer that cannot be read yet")] = 24
    maxoc: Annotated[int, Meta(description="chunks open at once in the device; 0: no limit")] = 0
    maxocpu: Annotated[int, Meta(description="chunks open at once in one parallel unit; 0: no limit")] = 0

    @property
    def total_pus(self) -> int:
        return self.groups * self.pus

    @property
    def total_chunks(self) -> int:
        return self.total_pus * self.chunks

    @property
    def total_sectors(self) -> int:
        return self.total_chunks * self.sectors

    @property
    def raw_bytes(self) -> int:
        return self.total_sectors * self.sector_bytes

    @property
    def sector_bits(self) -> int:
        """Bits of a ppa that count sectors inside a chunk."""
        return (self.sectors - 1).bit_length()

    def as_tuple(self) -> tuple[int, ...]:
        """The fields in the order of ``geometry_t``, derived ones last."""
        return (
            *msgspec.structs.astuple(self),
            self.total_pus,
            self.total_chunks,
            self.sector_bits,
        )


RANGES: dict[str, tuple[int, int]] = {
    "groups": (1, 256),
    "pus": (1, 256),
    "chunks": (1, 65536),
    "sectors": (1, 1 << 24),
    "sector_bytes": (512, 65536),
    "oob_bytes": (0, 4096),
    "ws_min": (1, 4096),
    "ws_opt": (1, 4096),
    "mw_cunits": (0, 1 << 24),
    "maxoc": (0, 1 << 24),
    "maxocpu": (0, 1 << 24),
}


def _check_ranges(geometry: Geometry) -> None:
    for field, (low, high) in RANGES.items():
        value = getattr(geometry, field)
        if not low <= value <= high:
            raise GeometryError(field, value, f"must be between {low} and {high}")


def _relations(g: Geometry) -> list[tuple[bool, str, str]]:
    """(holds, field, rule) for every rule that ties fields together."""
    return [
        (g.sector_bytes & (g.sector_bytes - 1) == 0, "sector_bytes", "must be a power of two"),
        (g.ws_opt % g.ws_min == 0, "ws_opt", f"must be a multiple of ws_min ({g.ws_min})"),
        (g.sectors % g.ws_opt == 0, "sectors", f"must be a multiple of ws_opt ({g.ws_opt})"),
        (g.mw_cunits % g.ws_min == 0, "mw_cunits", f"must be a multiple of ws_min ({g.ws_min})"),
        (g.mw_cunits <= g.sectors, "mw_cunits", f"must not be larger than a chunk ({g.sectors} sectors)"),
        (
            g.total_chunks << g.sector_bits < MAX_SECTORS_TOTAL,
            "chunks",
            f"{g.total_chunks} chunks x {g.sectors} sectors is beyond the limit of 2^31 sector addresses; "
            "use a larger sector_bytes or fewer chunks",
        ),
    ]


def validate(geometry: Geometry) -> Geometry:
    """Return *geometry*; raise GeometryError with the first field that breaks a rule."""
    _check_ranges(geometry)
    for holds, field, rule in _relations(geometry):
        if not holds:
            raise GeometryError(field, getattr(geometry, field), rule)
    return geometry


def with_size(geometry: Geometry, size_bytes: int) -> Geometry:
    """*geometry* with as many chunks per PU as give at least *size_bytes* of raw flash."""
    per_chunk_row = geometry.total_pus * geometry.sectors * geometry.sector_bytes
    return msgspec.structs.replace(geometry, chunks=max(1, -(-size_bytes // per_chunk_row)))


def from_dict(fields: dict[str, Any]) -> Geometry:
    """A validated geometry from plain fields (as in an image's superblock)."""
    return validate(msgspec.convert(fields, Geometry))
