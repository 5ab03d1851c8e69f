"""Owns log identifiers and layouts (NVM Express Base 1.3, 5.14.1) and the asynchronous event dword (5.2)."""

from __future__ import annotations

from enum import IntEnum

from construct import Array, Bytes, BytesInteger, Int8ul, Int16ul, Int32ul, Int64ul, Padded, Padding, Struct


class Log(IntEnum):
    ERROR = 0x01
    SMART = 0x02
    FIRMWARE = 0x03
    CHANGED_NAMESPACES = 0x04
    EFFECTS = 0x05
    CHUNK_INFORMATION = 0xCA            # OCSSD 2.0
    CHUNK_NOTIFICATION = 0xD0           # OCSSD 2.0


class EventType(IntEnum):
    ERROR = 0
    SMART = 1
    NOTICE = 2
    VENDOR = 7                          # OCSSD 2.0: chunk notification, log page D0h


class ErrorEvent(IntEnum):
    INVALID_DOORBELL_REGISTER = 0
    INVALID_DOORBELL_VALUE = 1


def event_dword(kind: int, info: int, log: int) -> int:
    """DW0 of the completion of an Asynchronous Event Request."""
    return kind | info << 8 | log << 16


Int128ul = BytesInteger(16, swapped=True)

ErrorEntry = Padded(64, Struct(
    "error_count" / Int64ul, "sqid" / Int16ul, "cid" / Int16ul, "status_phase" / Int16ul,
    "parameter_location" / Int16ul, "lba" / Int64ul, "nsid" / Int32ul, "vendor" / Int8ul,
))

SmartLog = Padded(512, Struct(
    "critical_warning" / Int8ul, "temperature" / Int16ul, "available_spare" / Int8ul,
    "spare_threshold" / Int8ul,
    "percentage_used" / Int8ul, Padding(26),
    "data_units_read" / Int128ul, "data_units_written" / Int128ul, "host_reads" / Int128ul,
    "host_writes" / Int128ul,
    "busy_minutes" / Int128ul, "power_cycles" / Int128ul, "power_on_hours" / Int128ul,
    "unsafe_shutdowns" / Int128ul, "media_errors" / Int128ul, "error_entries" / Int128ul,
))

FirmwareLog = Padded(512, Struct("afi" / Int8ul, Padding(7), "slots" / Array(7, Bytes(8))))

# Effects of a command: bit 0 supported, 1 changes logical block content, 17 … submission rules.
EffectsLog = Padded(4096, Struct("admin" / Array(256, Int32ul), "io" / Array(256, Int32ul)))
EFFECT_SUPPORTED = 1 << 0
EFFECT_CONTENT = 1 << 1
EFFECT_NAMESPACE = 1 << 2
