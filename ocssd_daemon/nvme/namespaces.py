"""Owns what a namespace is: its kind, its size, its Identify data. One class per kind, no command execution.

``block`` is the host FTL's disk as an ordinary NVMe namespace. ``ocssd20`` and ``ocssd12`` are two views of
the same flash; what differs between them is how an address is taken apart (``fields``) and which admin
structures describe it.

An address of a raw namespace packs, from bit 0: sector, plane, page, chunk (block), PU (LUN), group
(channel). OCSSD 2.0 has no planes and no pages: those fields are 0 bits wide there. Fields have the fewest
bits that hold count − 1.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from ..protocol.nvme import identify

KIND_BLOCK, KIND_OCSSD20, KIND_OCSSD12 = 1, 2, 3
KINDS = {"block": KIND_BLOCK, "ocssd20": KIND_OCSSD20, "ocssd12": KIND_OCSSD12}

NSFEAT_THIN = 1 << 0            # NCAP and NUSE may be below NSZE
NSFEAT_DEALLOCATED_ERROR = 1 << 2
MC_SEPARATE = 1 << 1


def bits_for(count: int) -> int:
    """Bits that hold 0 … count − 1; none for a count of 1."""
    return (count - 1).bit_length()


@dataclass(frozen=True)
class Field:
    """One part of an address: *count* values from bit *offset* on."""

    name: str
    offset: int
    length: int
    count: int


def pack_fields(counts: list[tuple[str, int]]) -> tuple[Field, ...]:
    """Lay the parts out from bit 0 up, in the order given."""
    fields, offset = [], 0
    for name, count in counts:
        fields.append(Field(name, offset, bits_for(count), count))
        offset += bits_for(count)
    return tuple(fields)


@dataclass
class Namespace:
    """What all kinds share. ``lba_bytes`` is a power of two, ``metadata_bytes`` a separate buffer per LBA."""

    nsid: int
    size_lbas: int
    lba_bytes: int
    metadata_bytes: int = 0
    read_only: bool = False
    identity: uuid.UUID = field(default_factory=lambda: uuid.UUID(int=0))

    kind = 0
    lightnvm = False
    used_lbas = property(lambda self: self.size_lbas)

    def identify(self) -> bytes:
        return identify.IdentifyNamespace.build(self._identify_fields())

    def _identify_fields(self) -> dict[str, Any]:
        zero = identify.IdentifyNamespace.parse(bytes(identify.IDENTIFY_BYTES))
        formats = [{"ms": self.metadata_bytes, "lbads": bits_for(self.lba_bytes), "rp": 0}]
        formats += [{"ms": 0, "lbads": 0, "rp": 0}] * (identify.LBA_FORMATS - 1)
        return {
            **zero, "nsze": self.size_lbas, "ncap": self.size_lbas, "nuse": self.used_lbas, "lbaf": formats,
            "mc": MC_SEPARATE if self.metadata_bytes else 0, "nsattr": int(self.read_only),
            "nguid": self.identity.bytes, "vs0": int(self.lightnvm),
        }


@dataclass
class BlockNamespace(Namespace):
    """The host FTL's disk, or a part of it: ``size_lbas`` blocks from ``base_lbas`` on."""

    disk: Any = None
    media: Any = None               # the flash behind it
    base_lbas: int = 0
    preferred_lbas: int = 1         # write granularity that needs no read-modify-write

    kind = KIND_BLOCK

    def _identify_fields(self) -> dict[str, Any]:
        unit = self.preferred_lbas - 1
        return {**super()._identify_fields(), "nsfeat": NSFEAT_THIN | NSFEAT_DEALLOCATED_ERROR | 1 << 4,
                "dlfeat": 1 | 1 << 3,
                "npwg": unit, "npwa": unit, "npdg": unit, "npda": unit}


@dataclass
class RawNamespace(Namespace):
    """Flash, as the guest's own FTL sees it.

    ``groups`` is the half-open range of the device's groups that this namespace shows; ``foreign`` says of
    each PU of the device (not of the namespace) whether somebody else owns it.
    """

    media: Any = None
    groups: range = range(0)
    planes: int = 1
    fields: tuple[Field, ...] = ()
    dlfeat: int = 1

    lightnvm = True

    @property
    def chunk_base(self) -> int:
        """Index, in the device, of this namespace's first chunk."""
        g = self.media.geometry
        return self.groups.start * g.pus * g.chunks

    @property
    def chunk_count(self) -> int:
        g = self.media.geometry
        return len(self.groups) * g.pus * g.chunks

    def _identify_fields(self) -> dict[str, Any]:
        return {**super()._identify_fields(), "nsfeat": NSFEAT_DEALLOCATED_ERROR, "dlfeat": self.dlfeat}


class Ocssd20Namespace(RawNamespace):
    kind = KIND_OCSSD20


class Ocssd12Namespace(RawNamespace):
    kind = KIND_OCSSD12


def raw_namespace(kind: str, nsid: int, media: Any, *, groups: range | None = None, planes: int = 1,
                  dlfeat: int = 1,
                  identity: uuid.UUID | None = None) -> RawNamespace:
    """Build an ``ocssd20`` or ``ocssd12`` namespace over *media*; raises ValueError for a shape that kind
    cannot have.
    """
    g = media.geometry
    shown = groups if groups is not None else range(g.groups)
    layout = _layout12(g, len(shown), planes) if kind == "ocssd12" else [
        ("sector", g.sectors), ("plane", 1), ("page", 1), ("chunk", g.chunks), ("pu", g.pus), ("group",
                                                                                               len(shown))]
    fields = pack_fields(layout)
    cls = {"ocssd20": Ocssd20Namespace, "ocssd12": Ocssd12Namespace}[kind]
    return cls(nsid, 1 << sum(f.length for f in fields), g.sector_bytes, g.oob_bytes, media=media,
               groups=shown,
               planes=planes, fields=fields, dlfeat=dlfeat, identity=identity or uuid.UUID(int=0))


def _layout12(g: Any, channels: int, planes: int) -> list[tuple[str, int]]:
    """1.2: a flash page is ws_min sectors; a chunk of ours is one block of one plane."""
    if planes not in (1, 2, 4):
        raise ValueError(f"planes={planes}: 1, 2 or 4")
    if g.chunks % planes or g.sectors % g.ws_min:
        raise ValueError(f"chunks={g.chunks}, sectors={g.sectors}: "
                         f"must be multiples of planes={planes} and ws_min={g.ws_min}")
    for name, count in (("channels", channels), ("LUNs", g.pus)):
        if count & count - 1:
            raise ValueError(f"{name}={count}: OCSSD 1.2 needs a power of two")
    return [("sector", g.ws_min), ("plane", planes), ("page", g.sectors // g.ws_min), ("chunk",
                                                                                       g.chunks // planes),
            ("pu", g.pus), ("group", channels)]
