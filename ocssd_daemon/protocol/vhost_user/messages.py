"""Owns the step from bytes to typed messages and back, and what sizes a payload may have.

Spec: vhost-user protocol, "Message Specification". Decoding checks syntax only: a message that comes out of
here is well formed, whether it makes sense in the session is decided by the handlers.

A `Violation` means that the byte stream itself can no longer be trusted (wrong version, impossible size): the
connection ends. A `Refusal` means that framing is intact and only this message is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from construct import Construct, Container

from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.wire import HeaderFlag, Request


class Violation(Exception):
    """The peer broke framing; the text says how. The connection cannot go on."""


class Refusal(ValueError):
    """One message cannot be carried out; the text says why. A NACK where the peer asked for an answer."""


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before each payload."""

    request: int
    flags: int
    size_bytes: int

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & HeaderFlag.NEED_REPLY)


@dataclass(frozen=True, slots=True)
class Empty:
    """A message without payload."""

    layout: ClassVar[Construct | None] = None


@dataclass(frozen=True, slots=True)
class U64:
    """Features, counts, status and acknowledgements."""

    value: int
    layout: ClassVar[Construct] = wire.U64


@dataclass(frozen=True, slots=True)
class VringFd:
    """Ring index of SET_VRING_KICK, _CALL and _ERR, and whether a descriptor comes with it."""

    index: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class VringState:
    """A ring and one number that belongs to it: size, base, or enable."""

    index: int
    num: int
    layout: ClassVar[Construct] = wire.VringState


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where the three parts of a ring are, in front-end addresses; *log* is guest-physical."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    layout: ClassVar[Construct] = wire.VringAddr


@dataclass(frozen=True, slots=True)
class Region:
    """One piece of guest memory: [gpa, gpa + size) is at *mmap_offset* of the descriptor."""

    gpa: int
    size_bytes: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class MemTable:
    """The whole memory map at once (SET_MEM_TABLE)."""

    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class MemRegion:
    """One region to add or to remove (ADD_MEM_REG, REM_MEM_REG)."""

    region: Region


@dataclass(frozen=True, slots=True)
class Log:
    """Where the dirty bitmap lies in the descriptor (SET_LOG_BASE)."""

    size_bytes: int
    offset_bytes: int
    layout: ClassVar[Construct] = wire.Log


@dataclass(frozen=True, slots=True)
class Config:
    """A window of the device configuration space."""

    offset: int
    size_bytes: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Inflight:
    """Where the inflight region lies in the descriptor, and for how many queues of which size."""

    mmap_size_bytes: int
    mmap_offset_bytes: int
    num_queues: int
    queue_size: int
    layout: ClassVar[Construct] = wire.Inflight


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Direction (0 save, 1 load) and phase of a state transfer."""

    direction: int
    phase: int
    layout: ClassVar[Construct] = wire.DeviceState


Message = Empty | U64 | VringFd | VringState | VringAddr | MemTable | MemRegion | Log | Config | Inflight | DeviceState


@dataclass(frozen=True, slots=True)
class Enclosing:
    """A reply that carries a descriptor; whoever sends it closes it."""

    message: Message
    fd: int


@dataclass(frozen=True, slots=True)
class Payload:
    """How one kind of payload is bounded and read."""

    min_bytes: int
    max_bytes: int
    decode: Callable[[bytes], Message]


def _plain(kind: Any) -> Payload:
    """Payload of a fixed size whose fields have the names of the dataclass."""
    size = kind.layout.sizeof()

    def decode(payload: bytes) -> Message:
        fields: Container = kind.layout.parse(payload)
        return kind(**{name: fields[name] for name in kind.__dataclass_fields__ if name in fields})

    return Payload(size, size, decode)


def _decode_vring_fd(payload: bytes) -> VringFd:
    value = wire.U64.parse(payload).value
    if value & ~(wire.VRING_INDEX_MASK | wire.VRING_NO_FD):
        raise Refusal(f"ring index word {value:#x} has reserved bits set")
    return VringFd(value & wire.VRING_INDEX_MASK, not value & wire.VRING_NO_FD)


def _region(fields: Container) -> Region:
    return Region(fields.gpa, fields.size_bytes, fields.user_addr, fields.mmap_offset)


def _decode_mem_table(payload: bytes) -> MemTable:
    # The count is compared with the payload before it is believed: 0xffffffff is a well-known way to kill a
    # back end.
    nregions = wire.MemTableHead.parse(payload).nregions
    if not 1 <= nregions <= wire.MEM_TABLE_REGIONS_MAX:
        raise Refusal(f"nregions is {nregions}, must be 1 to {wire.MEM_TABLE_REGIONS_MAX}")
    if len(payload) != wire.MemTableHead.sizeof() + nregions * wire.REGION_BYTES:
        raise Refusal(f"nregions is {nregions}, which does not fit a payload of {len(payload)} bytes")
    return MemTable(tuple(_region(fields) for fields in wire.MemTable.parse(payload).regions))


def _decode_mem_region(payload: bytes) -> MemRegion:
    return MemRegion(_region(wire.MemRegion.parse(payload).region))


def _decode_config(payload: bytes) -> Config:
    head = wire.ConfigHead.parse(payload)
    data = payload[wire.ConfigHead.sizeof() :]
    if head.size_bytes != len(data):
        raise Refusal(f"configuration size is {head.size_bytes}, but {len(data)} bytes of data follow")
    return Config(head.offset, head.size_bytes, head.flags, data)


_EMPTY = Payload(0, 0, lambda payload: Empty())
_U64 = _plain(U64)
_VRING_STATE = _plain(VringState)
_VRING_FD = Payload(8, 8, _decode_vring_fd)
_MEM_REGION = Payload(wire.MemRegion.sizeof(), wire.MemRegion.sizeof(), _decode_mem_region)
_MEM_TABLE = Payload(
    wire.MemTableHead.sizeof(),
    wire.MemTableHead.sizeof() + wire.MEM_TABLE_REGIONS_MAX * wire.REGION_BYTES,
    _decode_mem_table,
)
_CONFIG = Payload(wire.ConfigHead.sizeof(), wire.ConfigHead.sizeof() + wire.CONFIG_DATA_MAX_BYTES, _decode_config)
_INFLIGHT = _plain(Inflight)

PAYLOADS: dict[int, Payload] = {
    Request.GET_FEATURES: _EMPTY,
    Request.SET_FEATURES: _U64,
    Request.SET_OWNER: _EMPTY,
    Request.RESET_OWNER: _EMPTY,
    Request.SET_MEM_TABLE: _MEM_TABLE,
    Request.SET_LOG_BASE: _plain(Log),
    Request.SET_LOG_FD: _EMPTY,
    Request.SET_VRING_NUM: _VRING_STATE,
    Request.SET_VRING_ADDR: _plain(VringAddr),
    Request.SET_VRING_BASE: _VRING_STATE,
    Request.GET_VRING_BASE: _VRING_STATE,
    Request.SET_VRING_KICK: _VRING_FD,
    Request.SET_VRING_CALL: _VRING_FD,
    Request.SET_VRING_ERR: _VRING_FD,
    Request.GET_PROTOCOL_FEATURES: _EMPTY,
    Request.SET_PROTOCOL_FEATURES: _U64,
    Request.GET_QUEUE_NUM: _EMPTY,
    Request.SET_VRING_ENABLE: _VRING_STATE,
    Request.SET_BACKEND_REQ_FD: _EMPTY,
    Request.GET_CONFIG: _CONFIG,
    Request.SET_CONFIG: _CONFIG,
    Request.GET_INFLIGHT_FD: _INFLIGHT,
    Request.SET_INFLIGHT_FD: _INFLIGHT,
    Request.RESET_DEVICE: _EMPTY,
    Request.GET_MAX_MEM_SLOTS: _EMPTY,
    Request.ADD_MEM_REG: _MEM_REGION,
    Request.REM_MEM_REG: _MEM_REGION,
    Request.SET_STATUS: _U64,
    Request.GET_STATUS: _EMPTY,
    Request.SET_DEVICE_STATE_FD: _plain(DeviceState),
    Request.CHECK_DEVICE_STATE: _EMPTY,
}

# An unknown message is read in order to be refused, if it is no longer than any message that we know.
UNKNOWN_PAYLOAD_MAX_BYTES = max(payload.max_bytes for payload in PAYLOADS.values())
_UNKNOWN = Payload(0, UNKNOWN_PAYLOAD_MAX_BYTES, lambda payload: Empty())


def decode_header(data: bytes) -> Header:
    """Read and check a header; what follows it may then be read into a buffer of `size_bytes`."""
    fields = wire.Header.parse(data)
    header = Header(fields.request, fields.flags, fields.size_bytes)
    name = wire.request_name(header.request)
    if header.flags & wire.VERSION_MASK != HeaderFlag.VERSION_1:
        raise Violation(f"{name}: version {header.flags & wire.VERSION_MASK}, must be 1")
    if header.flags & HeaderFlag.REPLY:
        raise Violation(f"{name}: the reply bit is set in a request")
    payload = PAYLOADS.get(header.request, _UNKNOWN)
    if not payload.min_bytes <= header.size_bytes <= payload.max_bytes:
        raise Violation(f"{name}: payload of {header.size_bytes} bytes, not {payload.min_bytes} to {payload.max_bytes}")
    return header


def decode_payload(header: Header, payload: bytes) -> Message:
    """Read a payload whose size `decode_header` has accepted."""
    return PAYLOADS.get(header.request, _UNKNOWN).decode(payload)


def encode_payload(message: Message) -> bytes:
    """Bytes of a message as a payload."""
    match message:
        case Empty():
            return b""
        case VringFd():
            return wire.U64.build({"value": message.index | (0 if message.has_fd else wire.VRING_NO_FD)})
        case MemTable():
            regions = [asdict(region) for region in message.regions]
            return wire.MemTable.build({"nregions": len(regions), "regions": regions})
        case MemRegion():
            return wire.MemRegion.build({"region": asdict(message.region)})
        case Config():
            return wire.Config.build(asdict(message))
        case _:
            return message.layout.build(asdict(message))


def encode(request: int, flags: int, payload: bytes) -> bytes:
    """A whole message of either direction."""
    header = wire.Header.build({"request": request, "flags": flags, "size_bytes": len(payload)})
    return header + payload


def encode_request(request: int, message: Message, *, need_reply: bool = False) -> bytes:
    """A message that starts an exchange: from the front end, or from us on the back-end channel."""
    flags = HeaderFlag.VERSION_1 | (HeaderFlag.NEED_REPLY if need_reply else 0)
    return encode(request, flags, encode_payload(message))


def encode_reply(request: int, message: Message) -> bytes:
    """A reply; QEMU rejects any flags but version 1 and reply."""
    return encode(request, HeaderFlag.VERSION_1 | HeaderFlag.REPLY, encode_payload(message))
