"""Owns the server's side of one vfio-user connection: bytes in, checked requests out; replies in, bytes out.
No I/O.

States, and what moves between them::

    NEGOTIATE --VERSION accepted--> READY
    NEGOTIATE --anything else, major > 0, bad JSON--> CLOSED      (the error reply is sent first)
    READY     --header that cannot be framed--> CLOSED

The two directions share one stream: replies to our own DMA_READ/DMA_WRITE come in between the client's
commands and are matched by identifier. A message with a wrong size gets EINVAL and the stream goes on,
because its frame is known; a header whose size field makes no frame ends the connection. File descriptors
belong to the message in whose bytes they arrived; a message that may not carry them gets EINVAL, and whoever
reads the socket closes them.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from construct import ConstructError, Container
from construct import Struct as Layout

from . import wire
from .wire import Command, Flags


class ProtocolError(Exception):
    """The stream cannot go on; ``reply`` (maybe empty) is sent before closing."""

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reply = reply


class State(Enum):
    NEGOTIATE = auto()
    READY = auto()
    CLOSED = auto()


@dataclass(frozen=True)
class Rule:
    """What one command's message must look like, before anyone looks at what it says."""

    layout: Layout
    min_bytes: int
    max_bytes: int
    max_fds: int = 0
    answers: bool = False           # the reply carries data, so the command makes no sense with NO_REPLY


RULES: dict[int, Rule] = {
    Command.VERSION: Rule(wire.Version, 4, wire.MAX_VERSION_BYTES, answers=True),
    Command.DMA_MAP: Rule(wire.DmaMap, 32, 32, max_fds=1),
    Command.DMA_UNMAP: Rule(wire.DmaUnmap, 24, 24 + 4096),
    Command.DEVICE_GET_INFO: Rule(wire.DeviceInfo, 16, 16, answers=True),
    Command.DEVICE_GET_REGION_INFO: Rule(wire.RegionInfo, 32, 32 + 4096, answers=True),
    Command.DEVICE_GET_IRQ_INFO: Rule(wire.IrqInfo, 16, 16, answers=True),
    Command.DEVICE_SET_IRQS: Rule(wire.IrqSet, 20, 20 + 4096, max_fds=wire.MAX_MSG_FDS),
    Command.REGION_READ: Rule(wire.RegionAccess, 16, 16, answers=True),
    Command.REGION_WRITE: Rule(wire.RegionAccess, 16, 16 + wire.MAX_DATA_BYTES),
    Command.DEVICE_RESET: Rule(wire.Empty, 0, 0),
    Command.REGION_WRITE_MULTI: Rule(wire.WriteMulti, 8,
                                     8 + wire.MAX_WRITE_MULTI * wire.WRITE_MULTI_ENTRY_BYTES),
}


@dataclass
class Request:
    """One command of the client, framed and parsed. ``fds`` are the caller's to keep or close."""

    id: int
    command: Command
    no_reply: bool
    body: Container
    fds: list[int] = field(default_factory=list)


@dataclass
class DmaReply:
    """The client's answer to one of our DMA messages: an errno, or the bytes read."""

    id: int
    error: int
    data: bytes = b""


@dataclass
class Rejected:
    """A message that never became a request: ``reply`` goes back as it is, ``reason`` into the log, ``fds``
    closed.
    """

    reply: bytes
    reason: str
    fds: list[int]


Event = Request | DmaReply | Rejected


class Session:
    """Feed it exactly :meth:`wanted` bytes at a time (so that descriptors cannot be taken for a later
    message's).
    """

    def __init__(self, offer: dict[str, object] | None = None) -> None:
        self.state = State.NEGOTIATE
        self.client_max_data_bytes = wire.MAX_DATA_BYTES
        self.client_max_fds = 1
        self._offer = offer if offer is not None else {
            "max_msg_fds": wire.MAX_MSG_FDS, "max_data_xfer_size": wire.MAX_DATA_BYTES,
            "max_dma_maps": wire.MAX_DMA_MAPS, "pgsizes": wire.PAGE_BYTES, "write_multiple": True,
        }
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._header: Container | None = None
        self._next_id = 0
        self._dma_pending: dict[int, tuple[Command, int, int]] = {}

    # ---- bytes in ----------------------------------------------------------------------------------------

    def wanted(self) -> int:
        """How many bytes complete the header or the payload that is being received."""
        whole = wire.HEADER_BYTES if self._header is None else self._header.size - wire.HEADER_BYTES
        return whole - len(self._buffer)

    @property
    def between_messages(self) -> bool:
        """Negotiated, and no part of a message has been received."""
        return self.state is State.READY and self._header is None and not self._buffer and not self._fds

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> Event | None:
        """Take the next bytes; returns an event when they complete a message. Raises
        :class:`ProtocolError`.
        """
        self._buffer += data
        self._fds += fds
        if self._header is None and len(self._buffer) == wire.HEADER_BYTES:
            self._header = self._framed(wire.Header.parse(bytes(self._buffer)))
            self._buffer.clear()
        if self._header is None or self.wanted() > 0:
            return None
        head, payload, held = self._header, bytes(self._buffer), self._fds
        self._header, self._fds = None, []
        self._buffer.clear()
        return self._message(head, payload, held)

    def pending_fds(self) -> list[int]:
        """Descriptors of a message that was cut off; the caller closes them when the connection ends."""
        held, self._fds = self._fds, []
        return held

    def _framed(self, head: Container) -> Container:
        if not wire.HEADER_BYTES <= head.size <= wire.MAX_MESSAGE_BYTES:
            raise self._fatal(f"message size {head.size}", self._error_bytes(head, errno.EINVAL))
        if self.state is State.NEGOTIATE and head.size > wire.HEADER_BYTES + wire.MAX_VERSION_BYTES:
            raise self._fatal(f"first message of {head.size} bytes", self._error_bytes(head, errno.EINVAL))
        return head

    def _message(self, head: Container, payload: bytes, fds: list[int]) -> Event:
        kind = head.flags & Flags.TYPE_MASK
        if kind == Flags.REPLY and self.state is State.READY:
            return self._dma_reply(head, payload, fds)
        if kind != Flags.COMMAND:
            return self._refuse(head, errno.EINVAL, f"message type {kind}", fds)
        if (head.command == Command.VERSION) != (self.state is State.NEGOTIATE):
            return self._refuse(head, errno.EINVAL, f"command {head.command} in state {self.state.name}", fds)
        return self._request(head, payload, fds)

    def _request(self, head: Container, payload: bytes, fds: list[int]) -> Event:
        rule = RULES.get(head.command)
        if rule is None:
            return self._refuse(head, errno.ENOTSUP, f"unsupported command {head.command}", fds)
        if not rule.min_bytes <= len(payload) <= rule.max_bytes or len(fds) > rule.max_fds:
            reason = f"{len(payload)} bytes, {len(fds)} descriptors in command {head.command}"
            return self._refuse(head, errno.EINVAL, reason, fds)
        no_reply = bool(head.flags & Flags.NO_REPLY)
        if no_reply and rule.answers:
            return self._refuse(head, errno.EINVAL, f"command {head.command} without a reply", fds)
        try:
            body = rule.layout.parse(payload)
        except ConstructError as error:
            return self._refuse(head, errno.EINVAL, str(error), fds)
        return Request(head.id, Command(head.command), no_reply, body, fds)

    def _refuse(self, head: Container, error: int, reason: str, fds: list[int]) -> Rejected:
        reply = b"" if head.flags & Flags.NO_REPLY else self._error_bytes(head, error)
        if self.state is State.NEGOTIATE:
            raise self._fatal(reason, reply)
        return Rejected(reply, reason, fds)

    def _fatal(self, reason: str, reply: bytes) -> ProtocolError:
        self.state = State.CLOSED
        return ProtocolError(reason, reply)

    # ---- negotiation -------------------------------------------------------------------------------------

    def accept_version(self, request: Request) -> bytes:
        """Answer VERSION: same major, the lower minor, our capabilities. Raises :class:`ProtocolError` on a
        misfit.
        """
        try:
            capabilities = wire.parse_capabilities(request.body.json)
        except wire.CapabilityError as error:
            raise self._fatal(f"VERSION: {error}", self.error(request, errno.EINVAL)) from None
        if request.body.major != 0:
            raise self._fatal(f"VERSION: major {request.body.major}", self.error(request, errno.EINVAL))
        self.client_max_data_bytes = min(wire.MAX_DATA_BYTES, int(capabilities.get("max_data_xfer_size",
                                                                                   1 << 20)))
        self.client_max_fds = int(capabilities.get("max_msg_fds", 1))
        self.state = State.READY
        payload = wire.Version.build({"major": 0, "minor": 0, "json": wire.build_capabilities(self._offer)})
        return self.reply(request, payload)

    # ---- replies out -------------------------------------------------------------------------------------

    def reply(self, request: Request, payload: bytes = b"") -> bytes:
        if request.no_reply:
            return b""
        return wire.header(request.id, request.command, len(payload), Flags.REPLY) + payload

    def error(self, request: Request, error: int) -> bytes:
        if request.no_reply:
            return b""
        return wire.header(request.id, request.command, 0, Flags.REPLY | Flags.ERROR, error)

    @staticmethod
    def _error_bytes(head: Container, error: int) -> bytes:
        return wire.header(head.id, head.command, 0, Flags.REPLY | Flags.ERROR, error)

    # ---- our own requests --------------------------------------------------------------------------------

    def dma_read(self, address: int, count_bytes: int) -> tuple[int, bytes]:
        """``(id, message)`` that asks the client for *count_bytes* of its memory."""
        return self._dma(Command.DMA_READ, address, count_bytes, b"")

    def dma_write(self, address: int, data: bytes) -> tuple[int, bytes]:
        return self._dma(Command.DMA_WRITE, address, len(data), data)

    def _dma(self, command: Command, address: int, count_bytes: int, data: bytes) -> tuple[int, bytes]:
        self._next_id = (self._next_id + 1) & 0xFFFF
        payload = wire.DmaAccess.build({"address": address, "count": count_bytes, "data": data})
        self._dma_pending[self._next_id] = (command, address, count_bytes)
        return self._next_id, wire.header(self._next_id, command, len(payload)) + payload

    def _dma_reply(self, head: Container, payload: bytes, fds: list[int]) -> Event:
        asked = self._dma_pending.pop(head.id, None)
        if asked is None or asked[0] != head.command or fds:
            raise self._fatal(f"reply {head.id} to nothing we asked", b"")
        if head.flags & Flags.ERROR:
            return DmaReply(head.id, head.errno or errno.EIO)
        return self._dma_answer(head.id, asked, payload)

    @staticmethod
    def _dma_answer(message_id: int, asked: tuple[Command, int, int], payload: bytes) -> DmaReply:
        command, address, count_bytes = asked
        expected = 16 + (count_bytes if command == Command.DMA_READ else 0)
        if len(payload) != expected:
            return DmaReply(message_id, errno.EPROTO)
        body = wire.DmaAccess.parse(payload)
        if (body.address, body.count) != (address, count_bytes):
            return DmaReply(message_id, errno.EPROTO)
        return DmaReply(message_id, 0, body.data)
