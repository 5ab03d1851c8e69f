"""Owns the NBD negotiation, server side: bytes in, events and bytes out. No sockets, no clock, no TLS.

Spec: NBD ``doc/proto.md``, "Fixed newstyle negotiation", "Option types", "TLS support"; extension-ext-header.

Theory of operation. The server has greeted when the object exists. The client answers with its flags and then sends
options, one at a time; each is answered before the next is looked at. ``_STEPS`` says for each state how many bytes it
waits for and who takes them; ``_OPTIONS`` says for each option who answers it and when it may be sent at all. Only this
file changes the state::

    CLIENT_FLAGS ──► OPTION ──► PAYLOAD ──► OPTION …        an option that is within MAX_OPTION_BYTES
                       └──────► SKIP ─────► OPTION          one that is not: read past it, then refuse it
                     PAYLOAD ─► TLS ──────► OPTION          STARTTLS: the caller upgrades, then calls ``tls_started``
                     PAYLOAD ─► TRANSMISSION                GO or EXPORT_NAME: the rest of the stream is not ours
                     any ─────► CLOSED                      ABORT, or a peer that cannot be answered

An illegal option is a reply (``OptionRefused`` carries it) and the session goes on; where framing is lost, or the spec
has no reply, the session ends with a ``Closed`` event that says why. The caller owns the time limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from construct import Construct, ConstructError

from . import wire
from .wire import HandshakeFlag, Info, KiB, MiB, Option, OptionReply, TransmissionFlag

MAX_OPTION_BYTES = 64 * KiB  # nbdkit: the same; the longest useful one is SET_META_CONTEXT with a name of 4 KiB
MAX_SKIPPED_BYTES = 32 * MiB  # a longer option ends the session, so that a liar cannot feed us for ever
OFFERED = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
MAX_OPTIONS = 1024  # nbdinfo --list asks a few per export; beyond this it is a loop


class TlsMode(Enum):
    """Whether TLS is offered, and whether anything is told without it. Spec: NOTLS, SELECTIVETLS, FORCEDTLS."""

    OFF = "off"
    ALLOW = "allow"
    REQUIRE = "require"


@dataclass(frozen=True)
class Export:
    """One thing that can be served. Sizes in bytes; *contexts* maps the names of metadata contexts to their ids."""

    name: str
    size_bytes: int
    flags: TransmissionFlag
    description: str = ""
    minimum_bytes: int = 1
    preferred_bytes: int = 4 * KiB
    max_payload_bytes: int = wire.MAX_PAYLOAD_BYTES
    contexts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StartTls:
    """The client was told to go ahead: wrap the stream, then call ``tls_started``."""


@dataclass(frozen=True)
class Transmission:
    """The negotiation is over: what was agreed, and the bytes that the client has sent since."""

    export: Export
    flags: TransmissionFlag
    structured: bool
    extended: bool
    context_ids: tuple[int, ...]
    leftover: bytes


@dataclass(frozen=True)
class Closed:
    """Send what is left to send, then close."""

    reason: str


Event = StartTls | Transmission | Closed


class OptionRefused(Exception):
    """An option that gets an error reply. ``reply`` is what goes on the wire, the text goes with it."""

    def __init__(self, reply: OptionReply, text: str) -> None:
        super().__init__(text)
        self.reply = reply


class SessionLost(Exception):
    """The session cannot go on: no reply exists for this, or the framing is lost."""


class State(Enum):
    CLIENT_FLAGS = auto()
    OPTION = auto()
    PAYLOAD = auto()
    SKIP = auto()
    TLS = auto()
    TRANSMISSION = auto()
    CLOSED = auto()


@dataclass
class _Agreed:
    """What the options so far have settled; STARTTLS forgets all of it."""

    structured: bool = False
    extended: bool = False
    context_export: Export | None = None
    context_ids: tuple[int, ...] = ()


class ServerHandshake:
    """Negotiates one connection.

    Args: *exports* by name, the first is also the default export ``""``; *tls* the policy; *refusal* why every
    option is refused, for a server that has no room.
    """

    def __init__(
        self, exports: Iterable[Export], tls: TlsMode = TlsMode.OFF, refusal: str | None = None
    ) -> None:
        listed = list(exports)
        self._listed = listed
        self._exports = {"": listed[0], **{export.name: export for export in listed}}
        self._tls = tls
        self._refusal = refusal
        self.tls_active = False
        self.state = State.CLIENT_FLAGS
        self._agreed = _Agreed()
        self._client_flags = HandshakeFlag(0)
        self._options = 0
        self._option = 0
        self._wanted_bytes = wire.ClientFlags.sizeof()
        self._in = bytearray()
        self._events: list[Event] = []
        self._out = bytearray(wire.Greeting.build({"flags": OFFERED}))

    def data_to_send(self) -> bytes:
        """Bytes for the client; each is returned once."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive(self, data: bytes) -> list[Event]:
        """Take *data* from the client; return what the caller has to act on, in order."""
        self._in += data
        try:
            self._run()
        except SessionLost as lost:
            self._close(str(lost))
        events, self._events = self._events, []
        return events

    def tls_started(self) -> None:
        """The stream is encrypted from here on. Whatever was agreed or buffered in clear is forgotten.

        Spec: "TLS support"; keeping it was CVE-2021-3716.
        """
        if self.state is not State.TLS:
            raise RuntimeError(f"tls_started in state {self.state.name}")
        self.tls_active = True
        self._in.clear()
        self._agreed = _Agreed()
        self._await(State.OPTION, wire.OptionHeader.sizeof())

    # --- the machine ---

    def _run(self) -> None:
        while self.state in _STEPS:
            if self.state is State.SKIP:
                self._discard()
            if len(self._in) < self._wanted_bytes:
                return
            data = bytes(self._in[: self._wanted_bytes])
            del self._in[: self._wanted_bytes]
            _STEPS[self.state](self, data)

    def _discard(self) -> None:
        gone = min(len(self._in), self._wanted_bytes)
        del self._in[:gone]
        self._wanted_bytes -= gone

    def _await(self, state: State, wanted_bytes: int) -> None:
        self.state = state
        self._wanted_bytes = wanted_bytes

    def _close(self, reason: str) -> None:
        self.state = State.CLOSED
        self._in.clear()
        self._events.append(Closed(reason))

    def _take_client_flags(self, data: bytes) -> None:
        flags = wire.ClientFlags.parse(data).flags
        if flags & ~int(OFFERED):
            raise SessionLost(f"unknown client flags {flags:#x}")
        self._client_flags = HandshakeFlag(flags)
        self._await(State.OPTION, wire.OptionHeader.sizeof())

    def _take_option_header(self, data: bytes) -> None:
        header = wire.OptionHeader.parse(data)
        if header.magic != wire.OPTION_MAGIC:
            raise SessionLost(f"bad option magic {header.magic.hex()}")
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise SessionLost(f"more than {MAX_OPTIONS} options")
        if header.length_bytes > MAX_SKIPPED_BYTES:
            raise SessionLost(f"option of {header.length_bytes} bytes")
        self._option = header.option
        fits = header.length_bytes <= MAX_OPTION_BYTES
        self._await(State.PAYLOAD if fits else State.SKIP, header.length_bytes)

    def _take_payload(self, data: bytes) -> None:
        self._await(State.OPTION, wire.OptionHeader.sizeof())  # what follows, unless the option says otherwise
        try:
            rule = self._rule()
            if rule.empty and data:
                raise OptionRefused(OptionReply.ERR_INVALID, "this option takes no data")
            rule.answer(self, data)
        except OptionRefused as refused:
            self._refuse(refused)

    def _skipped(self, _: bytes) -> None:
        self._await(State.OPTION, wire.OptionHeader.sizeof())
        try:
            self._rule()
            raise OptionRefused(OptionReply.ERR_TOO_BIG, f"options are limited to {MAX_OPTION_BYTES} bytes")
        except OptionRefused as refused:
            self._refuse(refused)

    def _rule(self) -> _Rule:
        """The rule for the current option, or the refusal that its number alone deserves."""
        rule = _OPTIONS.get(self._option)
        if not (self._client_flags & HandshakeFlag.FIXED_NEWSTYLE) and self._option != Option.EXPORT_NAME:
            raise SessionLost("option other than EXPORT_NAME without FIXED_NEWSTYLE")
        if self._refusal is not None and self._option != Option.ABORT:
            raise OptionRefused(OptionReply.ERR_POLICY, self._refusal)
        if self._tls is TlsMode.REQUIRE and not self.tls_active and not (rule and rule.in_clear):
            raise OptionRefused(OptionReply.ERR_TLS_REQD, "this server requires TLS")
        if rule is None:
            raise OptionRefused(OptionReply.ERR_UNSUP, f"{wire.name_of(Option, self._option)} is not supported")
        if rule.needs_structured and not self._agreed.structured:
            raise OptionRefused(OptionReply.ERR_INVALID, "negotiate structured replies first")
        return rule

    def _refuse(self, refused: OptionRefused) -> None:
        if self._option == Option.EXPORT_NAME:  # it has no error reply
            raise SessionLost(f"EXPORT_NAME: {refused}")
        self._reply(refused.reply, str(refused).encode())

    def _reply(self, kind: OptionReply, data: bytes = b"") -> None:
        header = {"option": self._option, "type": kind, "length_bytes": len(data)}
        self._out += wire.OptionReplyHeader.build(header) + data

    # --- the options ---

    def _export_name(self, data: bytes) -> None:
        if self._agreed.extended:
            raise SessionLost("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            export = self._find(data.decode())
        except UnicodeDecodeError:
            raise SessionLost("EXPORT_NAME: name is not UTF-8") from None
        answer = {"size_bytes": export.size_bytes, "flags": self._flags_for(export)}
        self._out += wire.ExportNameAnswer.build(answer)
        if not self._client_flags & HandshakeFlag.NO_ZEROES:
            self._out += bytes(wire.EXPORT_NAME_PADDING_BYTES)
        self._begin_transmission(export)

    def _abort(self, _: bytes) -> None:
        self._reply(OptionReply.ACK)
        self._close("client aborted")

    def _list(self, _: bytes) -> None:
        for export in self._listed:
            self._reply(OptionReply.SERVER, wire.ServerReply.build({"name": export.name, "details": b""}))
        self._reply(OptionReply.ACK)

    def _starttls(self, _: bytes) -> None:
        if self._tls is TlsMode.OFF:
            raise OptionRefused(OptionReply.ERR_UNSUP, "TLS is not configured")
        if self.tls_active:
            raise OptionRefused(OptionReply.ERR_INVALID, "TLS is on already")
        if self._in:
            raise SessionLost("clear text behind STARTTLS")
        self._reply(OptionReply.ACK)
        self.state = State.TLS
        self._events.append(StartTls())

    def _info(self, data: bytes) -> None:
        self._inform(data)

    def _go(self, data: bytes) -> None:
        self._begin_transmission(self._inform(data))

    def _inform(self, data: bytes) -> Export:
        request = _parse(wire.InfoRequest, data)
        if len(set(request.infos)) != len(request.infos):
            raise OptionRefused(OptionReply.ERR_INVALID, "an information kind was asked for twice")
        export = self._find(request.name)
        # The block sizes go out unasked: requests below the minimum will fail, and the spec lets us say so.
        for kind in sorted({Info.EXPORT, Info.BLOCK_SIZE, *request.infos} & _INFOS.keys()):
            self._reply(OptionReply.INFO, _INFOS[kind](self, export))
        self._reply(OptionReply.ACK)
        return export

    def _info_export(self, export: Export) -> bytes:
        return _build(wire.InfoExport, {"size_bytes": export.size_bytes, "flags": self._flags_for(export)})

    def _info_name(self, export: Export) -> bytes:
        return _build(wire.InfoText, {"type": Info.NAME, "text": export.name.encode()})

    def _info_description(self, export: Export) -> bytes:
        return _build(wire.InfoText, {"type": Info.DESCRIPTION, "text": export.description.encode()})

    def _info_block_size(self, export: Export) -> bytes:
        return _build(wire.InfoBlockSize, export.__dict__)

    def _structured_reply(self, _: bytes) -> None:
        if self._agreed.extended:
            raise OptionRefused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are on already")
        self._agreed.structured = True
        self._reply(OptionReply.ACK)

    def _extended_headers(self, _: bytes) -> None:
        self._agreed.structured = self._agreed.extended = True
        self._reply(OptionReply.ACK)

    def _list_meta_context(self, data: bytes) -> None:
        export, queries = self._parse_meta(data)
        for name in export.contexts:
            if not queries or any(_lists(query, name) for query in queries):
                self._reply(OptionReply.META_CONTEXT, wire.MetaContextReply.build({"id": 0, "name": name.encode()}))
        self._reply(OptionReply.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        self._agreed.context_export, self._agreed.context_ids = None, ()  # replaced even if this one fails
        export, queries = self._parse_meta(data)
        chosen = {name: number for name, number in export.contexts.items() if name in queries}
        for name, number in chosen.items():
            self._reply(
                OptionReply.META_CONTEXT, wire.MetaContextReply.build({"id": number, "name": name.encode()})
            )
        self._agreed.context_export, self._agreed.context_ids = export, tuple(chosen.values())
        self._reply(OptionReply.ACK)

    def _parse_meta(self, data: bytes) -> tuple[Export, list[str]]:
        request = _parse(wire.MetaContextRequest, data)
        if any(_too_long(query) for query in request.queries):
            raise OptionRefused(OptionReply.ERR_INVALID, "query is too long")
        return self._find(request.name), list(request.queries)

    # --- what they share ---

    def _find(self, name: str) -> Export:
        if _too_long(name):
            raise OptionRefused(OptionReply.ERR_INVALID, "export name is too long")
        if name not in self._exports:
            raise OptionRefused(OptionReply.ERR_UNKNOWN, "no such export")
        return self._exports[name]

    def _contexts_for(self, export: Export) -> tuple[int, ...]:
        """Contexts count only for the export that they were set for."""
        return self._agreed.context_ids if export is self._agreed.context_export else ()

    def _flags_for(self, export: Export) -> TransmissionFlag:
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        if not self._agreed.structured:
            flags &= ~TransmissionFlag.SEND_DF
        if not (self._agreed.extended and self._contexts_for(export)):
            flags &= ~TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _begin_transmission(self, export: Export) -> None:
        self.state = State.TRANSMISSION
        event = Transmission(
            export=export,
            flags=self._flags_for(export),
            structured=self._agreed.structured,
            extended=self._agreed.extended,
            context_ids=self._contexts_for(export),
            leftover=bytes(self._in),
        )
        self._in.clear()
        self._events.append(event)


def _too_long(text: str) -> bool:
    return len(text.encode()) > wire.MAX_STRING_BYTES


def _lists(query: str, name: str) -> bool:
    """Does a LIST query select context *name*? A bare namespace with its colon selects all of it."""
    return query == name or (query.endswith(":") and name.startswith(query))


def _build(shape: Construct, fields: Mapping[str, object]) -> bytes:
    data: bytes = shape.build(fields)
    return data


def _parse(shape: Construct, data: bytes) -> Any:
    try:
        return shape.parse(data)
    except (ConstructError, UnicodeDecodeError):
        raise OptionRefused(OptionReply.ERR_INVALID, "malformed option data") from None


@dataclass(frozen=True)
class _Rule:
    answer: Callable[[ServerHandshake, bytes], None]
    empty: bool = False  # data is an error
    in_clear: bool = False  # may be sent before the TLS that is required
    needs_structured: bool = False


_S = ServerHandshake

_STEPS: dict[State, Callable[[ServerHandshake, bytes], None]] = {
    State.CLIENT_FLAGS: _S._take_client_flags,
    State.OPTION: _S._take_option_header,
    State.PAYLOAD: _S._take_payload,
    State.SKIP: _S._skipped,
}

_OPTIONS: dict[int, _Rule] = {
    Option.EXPORT_NAME: _Rule(_S._export_name),
    Option.ABORT: _Rule(_S._abort, in_clear=True),  # with data too: whoever leaves need not be corrected
    Option.LIST: _Rule(_S._list, empty=True),
    Option.STARTTLS: _Rule(_S._starttls, empty=True, in_clear=True),
    Option.INFO: _Rule(_S._info),
    Option.GO: _Rule(_S._go),
    Option.STRUCTURED_REPLY: _Rule(_S._structured_reply, empty=True),
    Option.LIST_META_CONTEXT: _Rule(_S._list_meta_context, needs_structured=True),
    Option.SET_META_CONTEXT: _Rule(_S._set_meta_context, needs_structured=True),
    Option.EXTENDED_HEADERS: _Rule(_S._extended_headers, empty=True),
}

_INFOS: dict[int, Callable[[ServerHandshake, Export], bytes]] = {
    Info.EXPORT: _S._info_export,
    Info.NAME: _S._info_name,
    Info.DESCRIPTION: _S._info_description,
    Info.BLOCK_SIZE: _S._info_block_size,
}
