"""Owns OCSSD 2.0's admin structures of a raw namespace: geometry and the chunk information log. No I/O
commands.

Both are computed from the flash core's tables at the moment of the command; nothing is kept twice.
"""

from __future__ import annotations

import numpy as np

from ..protocol.nvme import ocssd20
from .namespaces import RawNamespace, bits_for

# The wire layout of ocssd20.ChunkDescriptor, as a numpy record: a table of a million chunks is built in one
# go.
DESCRIPTOR = np.dtype([
    ("state", "<u1"), ("type", "<u1"), ("wear_index", "<u1"), ("reserved", "V5"),
    ("slba", "<u8"), ("cnlb", "<u8"), ("wp", "<u8"),
])


def mccap(namespace: RawNamespace) -> int:
    media = namespace.media
    return int(ocssd20.Mccap.VECTOR_COPY
               | (ocssd20.Mccap.MULTI_RESET if media.multi_reset else 0)
               | (ocssd20.Mccap.EARLY_RESET if media.early_reset else 0))


def geometry(namespace: RawNamespace, *, wear_threshold: int, times_ns: dict[str, int]) -> bytes:
    """The 4096 bytes of admin command E2h. ``times_ns`` has the six keys of the performance fields."""
    g = namespace.media.geometry
    zero = ocssd20.Geometry.parse(bytes(ocssd20.GEOMETRY_BYTES))
    groups = len(namespace.groups)
    return ocssd20.Geometry.build({
        **zero, "major": 2, "minor": 0,
        "lbaf": {"grp_len": bits_for(groups), "pu_len": bits_for(g.pus), "chk_len": bits_for(g.chunks),
                 "sec_len": bits_for(g.sectors)},
        "mccap": mccap(namespace), "wit": wear_threshold,
        "num_grp": groups, "num_pu": g.pus, "num_chk": g.chunks, "clba": g.sectors,
        "ws_min": g.ws_min, "ws_opt": g.ws_opt, "mw_cunits": g.mw_cunits, "maxoc": g.maxoc,
        "maxocpu": g.maxocpu,
        **times_ns,
    })


def chunk_log(namespace: RawNamespace, foreign: np.ndarray) -> np.ndarray:
    """All chunk descriptors, ordered chunk, then PU, then group; shape ``(groups * pus * chunks,)``,
    DESCRIPTOR.

    *foreign* is one bool per PU of the device; the chunks of a PU that somebody else owns look OFFLINE.
    """
    g = namespace.media.geometry
    base, count = namespace.chunk_base, namespace.chunk_count
    chunks = namespace.media.chunks[base:base + count]
    index = np.arange(count, dtype=np.uint64)
    log = np.zeros(count, DESCRIPTOR)
    log["state"], log["type"], log["wear_index"] = chunks["state"], chunks["type"], chunks["wear_index"]
    log["state"][np.repeat(foreign[base // g.chunks:(base + count) // g.chunks],
                           g.chunks)] = ocssd20.ChunkState.OFFLINE
    log["slba"] = slba_of(namespace, index)
    log["cnlb"] = chunks["cnlb"]
    invalid = (log["state"] == ocssd20.ChunkState.OFFLINE) | (log["type"] & ocssd20.ChunkType.RANDOM != 0)
    log["wp"] = np.where(invalid, np.uint64(0xFFFF_FFFF_FFFF_FFFF), chunks["wp"].astype(np.uint64))
    return log


def slba_of(namespace: RawNamespace, index: np.ndarray) -> np.ndarray:
    """First LBA of the chunks with these indices within the namespace."""
    g = namespace.media.geometry
    place = {field.name: np.uint64(field.offset) for field in namespace.fields}
    chunk, pu, group = index % g.chunks, index // g.chunks % g.pus, index // (g.chunks * g.pus)
    return chunk << place["chunk"] | pu << place["pu"] | group << place["group"]
