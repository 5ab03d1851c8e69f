"""Owns the layouts of vfio-user messages, protocol version 0.0 (QEMU docs/interop/vfio-user.rst).

Every message starts with a 16-byte header; an error reply is that header alone. ``argsz`` is the size that
the sender has room for, header excluded. Addresses and sizes are bytes. This module knows no order of
messages and no device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Any

from construct import (
    Array,
    Bytes,
    Computed,
    Container,
    GreedyBytes,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
    this,
)

HEADER_BYTES = 16
PAGE_BYTES = 4096
MAX_MSG_FDS = 16
MAX_DATA_BYTES = 1 << 20
MAX_DMA_MAPS = 65535
MAX_VERSION_BYTES = 16 << 10
MAX_WRITE_MULTI = 200
MAX_MESSAGE_BYTES = HEADER_BYTES + 16 + MAX_DATA_BYTES + 4096


# A parsed message, for type hints of those who may not know construct.
Record = Container


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11               # server to client
    DMA_WRITE = 12              # server to client
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Flags(IntFlag):
    COMMAND = 0
    REPLY = 1
    TYPE_MASK = 0xF
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


class DmaFlags(IntFlag):
    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2               # newer libvfio-user clients say how the descriptor may be used
    FILE_IO = 1 << 3


UNMAP_ALL = 1 << 1


class Region(IntEnum):
    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8
    COUNT = 9


class RegionFlags(IntFlag):
    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class Irq(IntEnum):
    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4
    COUNT = 5


class IrqFlags(IntFlag):
    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class SetIrqs(IntFlag):
    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5
    DATA_BITS = 0x07
    ACTION_BITS = 0x38


class DeviceFlags(IntFlag):
    RESET = 1 << 0
    PCI = 1 << 1


Header = Struct("id" / Int16ul, "command" / Int16ul, "size" / Int32ul, "flags" / Int32ul, "errno" / Int32ul)

Version = Struct("major" / Int16ul, "minor" / Int16ul, "json" / GreedyBytes)
DmaMap = Struct(
    "argsz" / Int32ul, "flags" / Int32ul, "fd_offset" / Int64ul, "iova" / Int64ul, "size" / Int64ul,
)
DmaUnmap = Struct("argsz" / Int32ul, "flags" / Int32ul, "iova" / Int64ul, "size" / Int64ul)
DeviceInfo = Struct("argsz" / Int32ul, "flags" / Int32ul, "num_regions" / Int32ul, "num_irqs" / Int32ul)
RegionInfo = Struct(
    "argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "cap_offset" / Int32ul, "size" / Int64ul,
    "offset" / Int64ul,
)
SparseArea = Struct("offset" / Int64ul, "size" / Int64ul)
SparseCap = Struct(
    "id" / Int16ul, "version" / Int16ul, "next" / Int32ul, "nr_areas" / Int32ul, Padding(4),
    "areas" / Array(this.nr_areas, SparseArea),
)
SPARSE_CAP_ID = 1
IrqInfo = Struct("argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul)
IrqSet = Struct(
    "argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "start" / Int32ul, "count" / Int32ul,
    "data" / GreedyBytes,
    "data_kind" / Computed(this.flags & SetIrqs.DATA_BITS),
    "action" / Computed(this.flags & SetIrqs.ACTION_BITS),
)
RegionAccess = Struct("offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / GreedyBytes)
DmaAccess = Struct("address" / Int64ul, "count" / Int64ul, "data" / GreedyBytes)
WriteMultiEntry = Struct("offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / Bytes(8))
WriteMulti = Struct("wr_cnt" / Int64ul, "data" / GreedyBytes)
WRITE_MULTI_ENTRY_BYTES = 24
Empty = Struct()


def header(message_id: int, command: int, payload_bytes: int, flags: int = 0, errno: int = 0) -> bytes:
    """The 16 bytes before a payload of *payload_bytes*."""
    return Header.build({
        "id": message_id, "command": command, "size": HEADER_BYTES + payload_bytes, "flags": flags,
        "errno": errno,
    })


class CapabilityError(ValueError):
    """The JSON of a VERSION message is not what the specification allows."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise CapabilityError("duplicate key")
    return dict(pairs)


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_capabilities(raw: bytes) -> dict[str, Any]:
    """The ``capabilities`` object of a VERSION payload: NUL-terminated JSON, or nothing. Unknown keys pass
    through.
    """
    if not raw:
        return {}
    if raw[-1] != 0 or b"\0" in raw[:-1]:
        raise CapabilityError("not one NUL-terminated string")
    try:
        document = json.loads(raw[:-1].decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CapabilityError(str(error)) from None
    capabilities = document.get("capabilities", {}) if isinstance(document, dict) else None
    if not isinstance(capabilities, dict):
        raise CapabilityError("not an object")
    for key in ("max_msg_fds", "max_data_xfer_size", "pgsizes", "max_dma_maps"):
        if key in capabilities and not _natural(capabilities[key]):
            raise CapabilityError(f"{key} is not a natural number")
    return capabilities


def build_capabilities(capabilities: Mapping[str, object]) -> bytes:
    return json.dumps({"capabilities": capabilities}).encode() + b"\0"
