"""Owns the bytes of vhost-user: request ids, flag and feature bits, header and payload layouts.

Spec: vhost-user protocol, "Message Specification" and "Protocol features". Integers are in the byte order of
the host, because both ends run on it. Sizes are bytes, addresses are 64-bit.

Must not know: sessions, sockets, or what this daemon offers (that is computed in session.py from its
handlers).
"""

from __future__ import annotations

import enum

from construct import Array, Bytes, Const, Int8un, Int16un, Int32un, Int64un, Padding, Struct, this

HEADER_BYTES = 12
REGION_BYTES = 32
MEM_TABLE_REGIONS_MAX = 8  # SET_MEM_TABLE; more needs CONFIGURE_MEM_SLOTS
CONFIG_DATA_MAX_BYTES = 256  # virtio device configuration that fits one message
VIRTQUEUE_SIZE_MAX = 32768  # virtio 1.3, 2.7: the queue size is at most 2^15
VRING_INDEX_MASK = 0xFF  # SET_VRING_KICK, _CALL, _ERR: ring index
VRING_NO_FD = 1 << 8  # the same messages: no descriptor comes along
VRING_FLAG_LOG = 1 << 0  # SET_VRING_ADDR: writes to the used ring are to be logged


class HeaderFlag(enum.IntFlag):
    """Bits of the header's flags word; bits 0-1 are the version."""

    VERSION_1 = 1
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


VERSION_MASK = 0x3


class Request(enum.IntEnum):
    """Messages from the front end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """Messages from the back end, over the channel that SET_BACKEND_REQ_FD brings."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(enum.IntFlag):
    """Bits of GET/SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22


class Feature(enum.IntFlag):
    """Bits of GET/SET_FEATURES that a block device may show (virtio 1.3, 5.2.3 and 6)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26  # vhost: log every write to guest memory
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30  # vhost-user: GET/SET_PROTOCOL_FEATURES exist
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class DeviceStatus(enum.IntFlag):
    """virtio 1.3, 2.1 "Device Status Field"."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


Header = Struct("request" / Int32un, "flags" / Int32un, "size_bytes" / Int32un)

U64 = Struct("value" / Int64un)
VringState = Struct("index" / Int32un, "num" / Int32un)
VringAddr = Struct(
    "index" / Int32un,
    "flags" / Int32un,
    "desc" / Int64un,
    "used" / Int64un,
    "avail" / Int64un,
    "log" / Int64un,
)
Region = Struct("gpa" / Int64un, "size_bytes" / Int64un, "user_addr" / Int64un, "mmap_offset" / Int64un)
MemTableHead = Struct("nregions" / Int32un, Padding(4))
MemTable = Struct("nregions" / Int32un, Padding(4), "regions" / Array(this.nregions, Region))
MemRegion = Struct(Padding(8), "region" / Region)
Log = Struct("size_bytes" / Int64un, "offset_bytes" / Int64un)
ConfigHead = Struct("offset" / Int32un, "size_bytes" / Int32un, "flags" / Int32un)
Config = Struct(*ConfigHead.subcons, "data" / Bytes(this.size_bytes))
# 20 bytes of fields, 24 on the wire: every peer sends the padded C struct and QEMU drops a reply of another
# size.
Inflight = Struct(
    "mmap_size_bytes" / Int64un,
    "mmap_offset_bytes" / Int64un,
    "num_queues" / Int16un,
    "queue_size" / Int16un,
    Padding(4),
)
DeviceState = Struct("direction" / Int32un, "phase" / Int32un)
Iotlb = Struct(
    "iova" / Int64un,
    "size_bytes" / Int64un,
    "user_addr" / Int64un,
    "perm" / Int8un,
    "type" / Int8un,
    Padding(6),
)

VirtioBlkConfig = Struct(
    "capacity_sectors" / Int64un,  # of 512 bytes whatever blk_size says
    "size_max" / Int32un,
    "seg_max" / Int32un,
    "geometry" / Struct("cylinders" / Int16un, "heads" / Int8un, "sectors" / Int8un),
    "blk_size" / Int32un,
    "topology"
    / Struct(
        "physical_block_exp" / Int8un,
        "alignment_offset" / Int8un,
        "min_io_size" / Int16un,
        "opt_io_size" / Int32un,
    ),
    "wce" / Int8un,
    Const(b"\0"),
    "num_queues" / Int16un,
    "max_discard_sectors" / Int32un,
    "max_discard_seg" / Int32un,
    "discard_sector_alignment" / Int32un,
    "max_write_zeroes_sectors" / Int32un,
    "max_write_zeroes_seg" / Int32un,
    "write_zeroes_may_unmap" / Int8un,
    Padding(3),
)
CONFIG_WCE_OFFSET = 32  # the one byte of virtio_blk_config that a driver may write


def without(value: int, bits: int) -> int:
    """*value* with *bits* cleared.

    The inverse of an IntFlag is no mask for this: it leaves out the bits that have no name.
    """
    return value & ~int(bits)


def bit_names(value: int, kind: type[enum.IntFlag]) -> str:
    """Name the bits of *value* for a log line or a refusal: "MQ, CONFIG, bit 40"."""
    bits = (1 << i for i in range(value.bit_length()) if value >> i & 1)
    known = {member.value: member.name for member in kind}
    return ", ".join(known.get(bit) or f"bit {bit.bit_length() - 1}" for bit in bits) or "none"


def request_name(request: int) -> str:
    """Name a request id for a log line, also an unknown one."""
    known = Request._value2member_map_.get(request)
    return known.name if isinstance(known, Request) else f"request {request:#x}"
