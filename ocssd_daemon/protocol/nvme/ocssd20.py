"""Owns the OCSSD 2.0 data structures: geometry (E2h), chunk information (log CAh), chunk notification (log
D0h).

Open-Channel Solid State Drives Specification 2.0. ``mccap`` bit 2 (a chunk that is open may be reset) is not
in it; the reference emulator and Linux's pblk rely on it.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import Int8ul, Int16ul, Int32ul, Int64ul, Padded, Padding, Struct

GEOMETRY_BYTES = 4096
CHUNK_DESCRIPTOR_BYTES = 32
NOTIFICATION_BYTES = 64
MAX_VECTOR_LBAS = 64            # the failure bitmap in DW0–1 has 64 bits


class Mccap(IntFlag):
    VECTOR_COPY = 1 << 0
    MULTI_RESET = 1 << 1        # a FREE chunk may be reset
    EARLY_RESET = 1 << 2        # an OPEN chunk may be reset


class ChunkState(IntEnum):
    FREE = 1
    CLOSED = 2
    OPEN = 4
    OFFLINE = 8


class ChunkType(IntFlag):
    SEQUENTIAL = 1
    RANDOM = 2
    SIZE_DEVIATES = 0x10


LbaFormat = Struct("grp_len" / Int8ul, "pu_len" / Int8ul, "chk_len" / Int8ul, "sec_len" / Int8ul, Padding(4))

Geometry = Padded(GEOMETRY_BYTES, Struct(
    "major" / Int8ul, "minor" / Int8ul, Padding(6),
    "lbaf" / LbaFormat,
    "mccap" / Int32ul, Padding(12),
    "wit" / Int8ul, Padding(31),
    "num_grp" / Int16ul, "num_pu" / Int16ul, "num_chk" / Int32ul, "clba" / Int32ul, Padding(52),
    "ws_min" / Int32ul, "ws_opt" / Int32ul, "mw_cunits" / Int32ul, "maxoc" / Int32ul, "maxocpu" / Int32ul,
    Padding(44),
    "trdt_ns" / Int32ul, "trdm_ns" / Int32ul, "twrt_ns" / Int32ul, "twrm_ns" / Int32ul,
    "tcrst_ns" / Int32ul, "tcrsm_ns" / Int32ul,
))

ChunkDescriptor = Struct(
    "state" / Int8ul, "type" / Int8ul, "wear_index" / Int8ul, Padding(5),
    "slba" / Int64ul, "cnlb" / Int64ul, "wp" / Int64ul,
)

NotificationEntry = Padded(NOTIFICATION_BYTES, Struct(
    "nc" / Int64ul, "lba" / Int64ul, "nsid" / Int32ul, "state" / Int16ul, "mask" / Int8ul, Padding(9),
    "nlb" / Int16ul,
))


class NotificationState(IntFlag):
    LOW_ERROR_RATE = 1 << 0
    MEDIUM_ERROR_RATE = 1 << 1
    HIGH_ERROR_RATE = 1 << 2
    UNRECOVERABLE = 1 << 3
    REFRESHED = 1 << 4
    WEAR_OUTSIDE_THRESHOLD = 1 << 8


class NotificationMask(IntFlag):
    LOGICAL_BLOCK = 1 << 0
    CHUNK = 1 << 1
    PARALLEL_UNIT = 1 << 2
