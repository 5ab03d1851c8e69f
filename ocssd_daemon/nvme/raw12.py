"""Owns OCSSD 1.2's admin structures of a raw namespace: device identity and the bad-block table. No I/O
commands.

A block of one plane is one chunk of the flash core: chunk = block × planes + plane, which is also the order
of the table. The mark that the host sets on a block lives in the upper half of the chunk's ``flags``, so it
is kept in the image with everything else; a chunk that went OFFLINE is a grown bad block whatever the host
says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..protocol.nvme import ocssd12
from ..protocol.nvme.ocssd12 import BlockState
from ..protocol.nvme.ocssd20 import ChunkState
from .namespaces import RawNamespace

MARK_SHIFT = 4                          # of the BlockState in chunk_t.flags
MARK_MASK = 0xF << MARK_SHIFT
MULTI_PLANE = {1: 0x010101, 2: 0x020202, 4: 0x040404}
SETTABLE = {BlockState.FREE, BlockState.BAD, BlockState.GROWN_BAD, BlockState.HOST_RESERVED}


def _ppa_format(namespace: RawNamespace) -> dict[str, int]:
    prefix = {"group": "ch", "pu": "lun", "plane": "pln", "chunk": "blk", "page": "pg", "sector": "sect"}
    return {f"{prefix[f.name]}_{what}": value for f in namespace.fields
            for what, value in (("off", f.offset), ("len", f.length))}


def identity(namespace: RawNamespace, *, times_ns: dict[str, int]) -> bytes:
    """The 4096 bytes of admin command E2h. ``times_ns``: trdt, trdm, tprt, tprm, tbet, tbem."""
    g, counts = namespace.media.geometry, {f.name: f.count for f in namespace.fields}
    zero = ocssd12.Identity.parse(bytes(ocssd12.IDENTITY_BYTES))
    group: dict[str, Any] = {
        **zero.groups[0], "num_ch": counts["group"], "num_lun": counts["pu"], "num_pln": counts["plane"],
        "num_blk": counts["chunk"], "num_pg": counts["page"], "fpg_sz": g.ws_min * g.sector_bytes & 0xFFFF,
        "csecs": g.sector_bytes, "sos": g.oob_bytes, "mpos": MULTI_PLANE[namespace.planes], "mccap": 1,
        **times_ns,
    }
    return ocssd12.Identity.build({
        **zero, "ver_id": 1, "cgrps": 1, "cap": int(ocssd12.Capability.BAD_BLOCK_TABLE),
        "ppaf": _ppa_format(namespace),
        "groups": [group],
    })


def _parts(namespace: RawNamespace, ppa: int) -> dict[str, int] | None:
    """The fields of *ppa* by name, or None when one of them is out of range."""
    parts = {f.name: ppa >> f.offset & (1 << f.length) - 1 for f in namespace.fields}
    beyond = ppa >> sum(f.length for f in namespace.fields)
    return None if beyond or any(parts[f.name] >= f.count for f in namespace.fields) else parts


def lun_of(namespace: RawNamespace, ppa: int) -> int | None:
    """Index of the LUN (within the namespace) that *ppa* names, or None when there is none."""
    parts = _parts(namespace, ppa)
    return None if parts is None else parts["group"] * namespace.media.geometry.pus + parts["pu"]


def block_of(namespace: RawNamespace, ppa: int) -> int | None:
    """Index (within the namespace) of the chunk that is the block and plane of *ppa*, or None."""
    parts, lun = _parts(namespace, ppa), lun_of(namespace, ppa)
    if parts is None or lun is None:
        return None
    return lun * namespace.media.geometry.chunks + parts["chunk"] * namespace.planes + parts["plane"]


def is_foreign(namespace: RawNamespace, index: int, foreign: np.ndarray) -> bool:
    """Does somebody else own the LUN of this chunk (counted within the namespace)?"""
    return bool(foreign[(namespace.chunk_base + index) // namespace.media.geometry.chunks])


def lun_states(namespace: RawNamespace, lun: int, foreign: np.ndarray) -> np.ndarray:
    """One BlockState per block and plane of *lun*, as uint8."""
    g = namespace.media.geometry
    start = namespace.chunk_base + lun * g.chunks
    chunks = namespace.media.chunks[start:start + g.chunks]
    states = (chunks["flags"] & MARK_MASK) >> MARK_SHIFT
    states[(chunks["state"] == ChunkState.OFFLINE) & (states == 0)] = BlockState.GROWN_BAD
    if foreign[start // g.chunks]:
        states[:] = BlockState.HOST_RESERVED
    return states.astype(np.uint8)


def bad_block_table(namespace: RawNamespace, lun: int, foreign: np.ndarray) -> bytes:
    """The reply to Get Bad Block Table: the 64-byte header and one byte per block and plane."""
    states = lun_states(namespace, lun, foreign)
    counted = {name: int(np.count_nonzero(states == state)) for name, state in (
        ("tfact", BlockState.BAD), ("tgrown", BlockState.GROWN_BAD), ("tdresv", BlockState.DEVICE_RESERVED),
        ("thresv", BlockState.HOST_RESERVED))}
    header = ocssd12.BadBlockHeader.build({
        "tblid": ocssd12.BAD_BLOCK_MAGIC, "verid": 1, "revid": 1, "tblks": len(states), **counted})
    return header + states.tobytes()
