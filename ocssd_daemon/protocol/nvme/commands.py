"""Owns the layouts of submission and completion entries, data pointers, and the dwords 10–15 of each command.

NVM Express Base 1.3, 4.2 (SQE), 4.4 (SGL), 4.6 (CQE), 5 (admin), 6 (I/O); OCSSD 2.0 and 1.2 for the vendor
commands. Counts that the wire carries as "0's based" keep that here: the suffix ``_0`` says so.
"""

from __future__ import annotations

from enum import IntEnum

from construct import (
    Array,
    Bytes,
    Computed,
    Container,
    Int8ul,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
    this,
)

# A parsed structure, for type hints of those who may not know construct.
Record = Container

SQE_BYTES = 64
CQE_BYTES = 16
BROADCAST_NSID = 0xFFFF_FFFF


class AdminOpcode(IntEnum):
    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    KEEP_ALIVE = 0x18
    DOORBELL_BUFFER = 0x7C
    FORMAT_NVM = 0x80
    OCSSD_IDENTIFY = 0xE2       # 1.2: device identity; 2.0: geometry
    GET_L2P = 0xEA              # 1.2
    SET_BAD_BLOCKS = 0xF1       # 1.2
    GET_BAD_BLOCKS = 0xF2       # 1.2


class IoOpcode(IntEnum):
    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DSM = 0x09
    VERIFY = 0x0C
    VECTOR_RESET = 0x90         # 1.2: physical block erase
    VECTOR_WRITE = 0x91         # 1.2: physical page write
    VECTOR_READ = 0x92          # 1.2: physical page read
    VECTOR_COPY = 0x93          # 2.0


SubmissionEntry = Struct(
    "opcode" / Int8ul,
    "flags" / Int8ul,                       # FUSE in bits 0–1, PSDT in bits 6–7
    "cid" / Int16ul,
    "nsid" / Int32ul,
    "cdw2" / Int32ul,
    "cdw3" / Int32ul,
    "mptr" / Int64ul,
    "dptr" / Bytes(16),
    "dwords" / Bytes(24),                   # CDW10–15, laid out by the command
    "prp1" / Computed(lambda c: int.from_bytes(c.dptr[:8], "little")),
    "prp2" / Computed(lambda c: int.from_bytes(c.dptr[8:], "little")),
    "fuse" / Computed(this.flags & 3),
    "psdt" / Computed(this.flags >> 6),
    "cdw" / Computed(lambda c: [int.from_bytes(c.dwords[i:i + 4], "little") for i in range(0, 24, 4)]),
)

CompletionEntry = Struct(
    "dw0" / Int32ul,
    "dw1" / Int32ul,
    "sqhd" / Int16ul,
    "sqid" / Int16ul,
    "cid" / Int16ul,
    "status_phase" / Int16ul,               # phase tag in bit 0, the 15-bit status field above it
)

SglDescriptor = Struct(
    "address" / Int64ul,
    "length" / Int32ul,
    Padding(3),
    "identifier" / Int8ul,                  # type in bits 4–7, subtype in bits 0–3
    "type" / Computed(this.identifier >> 4),
    "subtype" / Computed(this.identifier & 0xF),
)


class SglType(IntEnum):
    DATA_BLOCK = 0
    BIT_BUCKET = 1
    SEGMENT = 2
    LAST_SEGMENT = 3


DeleteQueue = Struct("qid" / Int16ul, Padding(22))

CreateSq = Struct(
    "qid" / Int16ul, "qsize_0" / Int16ul,
    "flags" / Int16ul,                      # PC in bit 0, QPRIO in bits 1–2
    "cqid" / Int16ul, Padding(16),
    "contiguous" / Computed(this.flags & 1),
)

CreateCq = Struct(
    "qid" / Int16ul, "qsize_0" / Int16ul,
    "flags" / Int16ul,                      # PC in bit 0, IEN in bit 1
    "vector" / Int16ul, Padding(16),
    "contiguous" / Computed(this.flags & 1),
    "interrupts" / Computed(this.flags >> 1 & 1),
)

Abort = Struct("sqid" / Int16ul, "cid" / Int16ul, Padding(20))

IdentifyCommand = Struct("cns" / Int8ul, Padding(1), "cntid" / Int16ul, Padding(3), "csi" / Int8ul, Padding(16))

GetLogPage = Struct(
    "lid" / Int8ul, "lsp_rae" / Int8ul,     # LSP in bits 0–3, RAE in bit 7
    "numdl" / Int16ul, "numdu" / Int16ul, Padding(2),
    "offset_bytes" / Int64ul, Padding(8),
    "retain" / Computed(this.lsp_rae >> 7),
    "length_bytes" / Computed(((this.numdu << 16 | this.numdl) + 1) * 4),
)

GetFeatures = Struct(
    "fid" / Int8ul, "select_byte" / Int8ul, Padding(2), "cdw11" / Int32ul, Padding(16),
    "select" / Computed(this.select_byte & 7),
)

SetFeatures = Struct(
    "fid" / Int8ul, Padding(2), "save_byte" / Int8ul, "cdw11" / Int32ul, "cdw12" / Int32ul, Padding(12),
    "save" / Computed(this.save_byte >> 7),
)

FormatNvm = Struct(
    "cdw10" / Int32ul, Padding(20),
    "lbaf" / Computed(this.cdw10 & 0xF),
    "extended" / Computed(this.cdw10 >> 4 & 1),
    "protection" / Computed(this.cdw10 >> 5 & 7),
    "erase" / Computed(this.cdw10 >> 9 & 7),
)

# Read, Write, Compare, Write Zeroes, Verify.
ReadWrite = Struct(
    "slba" / Int64ul, "nlb_0" / Int16ul,
    "control" / Int16ul,                    # bit 15 LR, 14 FUA, 13–10 PRINFO, 9 DEAC (Write Zeroes)
    Padding(12),
)

DatasetManagement = Struct(
    "nr_0" / Int8ul, Padding(3), "attributes" / Int32ul, Padding(16),
    "deallocate" / Computed(this.attributes >> 2 & 1),
)
DsmRange = Struct("context" / Int32ul, "nlb" / Int32ul, "slba" / Int64ul)

# OCSSD 2.0 vector commands and the 1.2 physical page address commands.
Vector = Struct(
    "lbal" / Int64ul,                       # the address itself when there is one, else where the list is
    "nlb_0" / Int16ul,
    # 1.2: plane mode in bits 0–1, suspend 0x80, SLC 0x100, scramble 0x200
    "control" / Int16ul,
    "cdw13" / Int32ul,
    "destination" / Int64ul,                # vector copy: the destination list
)

GetL2p = Struct("slba" / Int64ul, "nlb" / Int32ul, Padding(12))
SetBadBlocks = Struct("ppa" / Int64ul, "nlb_0" / Int16ul, "value" / Int8ul, Padding(13))
GetBadBlocks = Struct("ppa" / Int64ul, Padding(16))


def sqe(opcode: int, cid: int = 0, nsid: int = 0, *, flags: int = 0, mptr: int = 0,
        prp1: int = 0, prp2: int = 0, dptr: bytes | None = None, dwords: bytes = b"") -> bytes:
    """Build one 64-byte submission entry; *dwords* (CDW10 on) is padded with zeroes."""
    pointer = dptr if dptr is not None else prp1.to_bytes(8, "little") + prp2.to_bytes(8, "little")
    return SubmissionEntry.build({
        "opcode": opcode, "flags": flags, "cid": cid, "nsid": nsid, "cdw2": 0, "cdw3": 0, "mptr": mptr,
        "dptr": pointer, "dwords": dwords.ljust(24, b"\0"),
    })


def dword_array(raw: bytes) -> Container:
    """CDW10–15 as six integers, for commands without a layout of their own."""
    return Array(6, Int32ul).parse(raw)
