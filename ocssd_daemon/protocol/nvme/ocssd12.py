"""Owns the OCSSD 1.2 data structures: device identity (E2h) and the bad-block table (F1h, F2h).

Open-Channel Solid State Drives, interface specification 1.2. Times are nanoseconds.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import Array, Bytes, Int8ul, Int16ul, Int32ul, Padded, Padding, Struct

IDENTITY_BYTES = 4096
GROUP_BYTES = 960
BAD_BLOCK_HEADER_BYTES = 64
BAD_BLOCK_MAGIC = b"BBLT"


class Capability(IntFlag):
    BAD_BLOCK_TABLE = 1 << 0
    HYBRID = 1 << 1


class BlockState(IntEnum):
    """One byte of the bad-block table. The values are bits; the host writes FREE, BAD, GROWN_BAD or
    HOST_RESERVED.
    """

    FREE = 0
    BAD = 1
    GROWN_BAD = 2
    DEVICE_RESERVED = 4
    HOST_RESERVED = 8


class Control(IntFlag):
    """Upper half of CDW12 of the page and block commands; the two lowest bits are the plane mode."""

    SINGLE_PLANE = 0
    DUAL_PLANE = 1
    QUAD_PLANE = 2
    SUSPEND = 0x80
    SLC = 0x100
    SCRAMBLE = 0x200


PLANE_MODE_PLANES = {Control.SINGLE_PLANE: 1, Control.DUAL_PLANE: 2, Control.QUAD_PLANE: 4}

PpaFormat = Struct(
    "ch_off" / Int8ul, "ch_len" / Int8ul, "lun_off" / Int8ul, "lun_len" / Int8ul, "pln_off" / Int8ul,
    "pln_len" / Int8ul, "blk_off" / Int8ul, "blk_len" / Int8ul, "pg_off" / Int8ul, "pg_len" / Int8ul,
    "sect_off" / Int8ul, "sect_len" / Int8ul, Padding(4),
)

Group = Padded(GROUP_BYTES, Struct(
    "mtype" / Int8ul, "fmtype" / Int8ul, Padding(2), "num_ch" / Int8ul, "num_lun" / Int8ul,
    "num_pln" / Int8ul,
    Padding(1), "num_blk" / Int16ul, "num_pg" / Int16ul, "fpg_sz" / Int16ul, "csecs" / Int16ul,
    "sos" / Int16ul,
    Padding(2),
    "trdt_ns" / Int32ul, "trdm_ns" / Int32ul, "tprt_ns" / Int32ul, "tprm_ns" / Int32ul, "tbet_ns" / Int32ul,
    "tbem_ns" / Int32ul,
    "mpos" / Int32ul, "mccap" / Int32ul, "cpar" / Int16ul,
))

Identity = Padded(IDENTITY_BYTES, Struct(
    "ver_id" / Int8ul, "vmnt" / Int8ul, "cgrps" / Int8ul, Padding(1), "cap" / Int32ul, "dom" / Int32ul,
    "ppaf" / PpaFormat, Padding(228),
    "groups" / Array(1, Group),
))

BadBlockHeader = Padded(BAD_BLOCK_HEADER_BYTES, Struct(
    "tblid" / Bytes(4), "verid" / Int16ul, "revid" / Int16ul, Padding(4), "tblks" / Int32ul,
    "tfact" / Int32ul, "tgrown" / Int32ul, "tdresv" / Int32ul, "thresv" / Int32ul,
))
