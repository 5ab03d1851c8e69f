"""Owns the bytes of the NBD protocol: every struct, number and flag, and the names that logs and tests use.

Spec: NBD ``doc/proto.md`` (2024-04), with the extension branch ``extension-ext-header`` folded in. All integers are
big-endian; lengths and offsets are bytes. Nothing here behaves: what may follow what is in ``handshake.py``, what a
request does is in ``_nbd.pyx``, and a test holds this file and the native codec together.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import (
    Bytes,
    Const,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    PascalString,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
)

KiB = 1 << 10
MiB = 1 << 20

NBD_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003_E889_0455_65A9
REQUEST_MAGIC = 0x2560_9513
EXTENDED_REQUEST_MAGIC = 0x21E4_1C71
SIMPLE_REPLY_MAGIC = 0x6744_6698
STRUCTURED_REPLY_MAGIC = 0x668E_33EF
EXTENDED_REPLY_MAGIC = 0x6E8A_278C

MAX_STRING_BYTES = 4 * KiB  # "NBD protocol strings ... SHOULD NOT exceed 4096 bytes": names, queries, messages
MAX_PAYLOAD_BYTES = 32 * MiB  # the default maximum payload of the spec's size constraints
EXPORT_NAME_PADDING_BYTES = 124  # zeroes after an EXPORT_NAME answer, unless NO_ZEROES was agreed


class HandshakeFlag(IntFlag):
    """Bits of the server's greeting, and with the same values of the client's answer."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client may ask for while it haggles."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4  # withdrawn from the spec; the number stays taken
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


REP_ERROR_BIT = 1 << 31


class OptionReply(IntEnum):
    """Types of option replies; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REP_ERROR_BIT + 1
    ERR_POLICY = REP_ERROR_BIT + 2
    ERR_INVALID = REP_ERROR_BIT + 3
    ERR_PLATFORM = REP_ERROR_BIT + 4
    ERR_TLS_REQD = REP_ERROR_BIT + 5
    ERR_UNKNOWN = REP_ERROR_BIT + 6
    ERR_SHUTDOWN = REP_ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = REP_ERROR_BIT + 8
    ERR_TOO_BIG = REP_ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = REP_ERROR_BIT + 10


class Info(IntEnum):
    """Kinds of information in replies to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7  # only to a client that has structured replies
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12  # only to a client that has extended headers


class Command(IntEnum):
    """Types of transmission requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkType(IntEnum):
    """Types of structured reply chunks; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class ChunkFlag(IntFlag):
    """Flags of a structured reply chunk."""

    DONE = 1 << 0


class ErrorNumber(IntEnum):
    """Error values of replies: those of Linux errno that the spec lists."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class AllocationFlag(IntFlag):
    """Extent flags of the context ``base:allocation``."""

    HOLE = 1 << 0
    ZERO = 1 << 1


def name_of(kind: type[IntEnum], value: int) -> str:
    """The spec's name of *value*, or the number itself, for logs about what a peer sent."""
    try:
        return kind(value).name
    except ValueError:
        return f"{kind.__name__}({value})"


# --- handshake ---

Greeting = Struct(
    "nbd_magic" / Const(NBD_MAGIC),
    "option_magic" / Const(OPTION_MAGIC),
    "flags" / Int16ub,
)
ClientFlags = Struct("flags" / Int32ub)
OptionHeader = Struct(
    "magic" / Bytes(8),  # not Const: a wrong magic is an event of the machine, not a parse failure
    "option" / Int32ub,
    "length_bytes" / Int32ub,
)
OptionReplyHeader = Struct(
    "magic" / Const(OPTION_REPLY_MAGIC, Int64ub),
    "option" / Int32ub,
    "type" / Int32ub,
    "length_bytes" / Int32ub,
)
ExportNameAnswer = Struct("size_bytes" / Int64ub, "flags" / Int16ub)

Name = PascalString(Int32ub, "utf8")
InfoRequest = Struct("name" / Name, "infos" / PrefixedArray(Int16ub, Int16ub), Terminated)
MetaContextRequest = Struct("name" / Name, "queries" / PrefixedArray(Int32ub, Name), Terminated)

ServerReply = Struct("name" / Name, "details" / GreedyBytes)
InfoExport = Struct("type" / Const(Info.EXPORT, Int16ub), "size_bytes" / Int64ub, "flags" / Int16ub)
InfoText = Struct("type" / Int16ub, "text" / GreedyBytes)
InfoBlockSize = Struct(
    "type" / Const(Info.BLOCK_SIZE, Int16ub),
    "minimum_bytes" / Int32ub,
    "preferred_bytes" / Int32ub,
    "max_payload_bytes" / Int32ub,
)
MetaContextReply = Struct("id" / Int32ub, "name" / GreedyBytes)

# --- transmission: the oracle for the native codec ---

CompactRequest = Struct(
    "magic" / Const(REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset_bytes" / Int64ub,
    "length_bytes" / Int32ub,
)
ExtendedRequest = Struct(
    "magic" / Const(EXTENDED_REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset_bytes" / Int64ub,
    "length_bytes" / Int64ub,
)
BlockStatusPayload = Struct("effect_length_bytes" / Int64ub, "ids" / GreedyRange(Int32ub), Terminated)

SimpleReply = Struct("magic" / Const(SIMPLE_REPLY_MAGIC, Int32ub), "error" / Int32ub, "cookie" / Int64ub)
StructuredReply = Struct(
    "magic" / Const(STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "length_bytes" / Int32ub,
)
ExtendedReply = Struct(
    "magic" / Const(EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset_bytes" / Int64ub,  # that of the request, in every chunk
    "length_bytes" / Int64ub,
)
OffsetHole = Struct("offset_bytes" / Int64ub, "length_bytes" / Int32ub)
ErrorChunk = Struct("error" / Int32ub, "message" / Prefixed(Int16ub, GreedyBytes), "rest" / GreedyBytes)
Extent = Struct("length_bytes" / Int32ub, "flags" / Int32ub)
ExtentExt = Struct("length_bytes" / Int64ub, "flags" / Int64ub)
BlockStatus = Struct("context_id" / Int32ub, "extents" / GreedyRange(Extent), Terminated)
BlockStatusExt = Struct("context_id" / Int32ub, "extents" / PrefixedArray(Int32ub, ExtentExt), Terminated)
