"""Owns feature identifiers, the SEL values, and which bits of CDW11 each feature keeps (NVM Express Base
1.3, 5.21.1).
"""

from __future__ import annotations

from enum import IntEnum

from construct import Array, Bytes, Int8ul, Int64ul, Padding, Struct


class Feature(IntEnum):
    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    LBA_RANGE_TYPE = 0x03
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05               # DULBE is bit 16
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B
    SOFTWARE_PROGRESS = 0x80
    MEDIA_FEEDBACK = 0xCA               # OCSSD 2.0: bit 0 high ECC, bit 1 very high ECC


class Select(IntEnum):
    CURRENT = 0
    DEFAULT = 1
    SAVED = 2
    CAPABILITIES = 3


CHANGEABLE = 1 << 2                     # bits of the "supported capabilities" answer
NAMESPACE_SPECIFIC = 1 << 1
SAVEABLE = 1 << 0

DULBE = 1 << 16

LBA_RANGES = 64
LbaRange = Struct(
    "type" / Int8ul, "attributes" / Int8ul, Padding(14), "slba" / Int64ul, "nlb_0" / Int64ul,
    "guid" / Bytes(16),
    Padding(16),
)
LbaRangeTable = Array(LBA_RANGES, LbaRange)

LBA_RANGE_TABLE_BYTES = 4096
