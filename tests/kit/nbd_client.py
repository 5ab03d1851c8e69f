"""The other side of NBD for tests: small, blocking, and able to send what no decent client would.

Nothing here is shared with the server's codec: the formats are written out again, from the spec, so that both would
have to be wrong in the same way. Every wait has a time limit; a connection that the server closed raises ``Gone``.
"""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 10.0

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 4, 5, 6, 7
OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META, OPT_EXTENDED = 8, 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = (
    (1 << 31) + n for n in (1, 2, 3, 5, 6, 9, 10)
)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 95, 108
COMPACT, EXTENDED = 0x25609513, 0x21E41C71


class Gone(Exception):
    """The server closed the connection."""


def option(number: int, data: bytes = b"", *, magic: bytes = b"IHAVEOPT", length: int | None = None) -> bytes:
    """An option as it goes on the wire; *length* may lie."""
    return magic + struct.pack(">II", number, len(data) if length is None else length) + data


def info_data(name: bytes, infos: tuple[int, ...] = ()) -> bytes:
    """Data of INFO and GO."""
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name: bytes, queries: tuple[bytes, ...] = ()) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    packed = b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) + packed


@dataclass
class Reply:
    """All of the server's answer to one request."""

    cookie: int
    error: int = 0
    message: str = ""
    data: bytes = b""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # context id: (length, flags)
    chunks: list[int] = field(default_factory=list)  # types, in order; none for a simple reply
    pieces: list[tuple[str, int, int]] = field(default_factory=list)  # of a read: data or hole, offset, length


class NbdClient:
    """One connection. Methods without an underscore speak valid NBD unless told otherwise."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(DEADLINE_S)
        self.structured = False
        self.extended = False
        self.size_bytes = 0
        self.flags = 0
        self.infos: dict[int, bytes] = {}
        self._cookies = itertools.count(1)
        self._reads: dict[int, int] = {}  # cookie: length, since a simple reply does not tell

    @classmethod
    def unix(cls, path: str) -> NbdClient:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE_S)
        sock.connect(path)
        return cls(sock)

    @classmethod
    def tcp(cls, host: str, port: int) -> NbdClient:
        return cls(socket.create_connection((host, port), DEADLINE_S))

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # --- bytes ---

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone from None

    def take(self, n: int) -> bytes:
        """Exactly *n* bytes. Raises Gone at the end of the stream."""
        parts = []
        while n:
            try:
                part = self.sock.recv(n)
            except ConnectionResetError:
                part = b""
            if not part:
                raise Gone
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def is_closed(self) -> bool:
        """Wait until the server has closed; what it sends before that is dropped. False if it does not in time."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    # --- handshake ---

    def greet(self, flags: int = 3) -> int:
        """Take the greeting, answer with *flags*; returns the server's flags."""
        greeting = self.take(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT"
        self.send(struct.pack(">I", flags))
        return int.from_bytes(greeting[16:])

    def option_reply(self) -> tuple[int, int, bytes]:
        """The next option reply: (option, type, data)."""
        magic, number, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == 0x3E889045565A9
        return number, kind, self.take(length)

    def ask(self, number: int, data: bytes = b"") -> tuple[int, list[tuple[int, bytes]]]:
        """Send an option; returns the type of the final reply and the replies before it as (type, data)."""
        self.send(option(number, data))
        return self.answer(number)

    def answer(self, number: int) -> tuple[int, list[tuple[int, bytes]]]:
        """The replies to option *number* that was sent before."""
        replies: list[tuple[int, bytes]] = []
        while True:
            echoed, kind, data = self.option_reply()
            assert echoed == number
            if kind == REP_ACK or kind >= 1 << 31:
                return kind, replies
            replies.append((kind, data))

    def set_contexts(self, *names: bytes, export: bytes = b"") -> dict[bytes, int]:
        """SET_META_CONTEXT; returns the ids by name."""
        kind, replies = self.ask(OPT_SET_META, meta_data(export, names))
        assert kind == REP_ACK
        return {data[4:]: int.from_bytes(data[:4]) for _, data in replies}

    def negotiate(self, *, structured: bool = False, extended: bool = False, contexts: tuple[bytes, ...] = (),
                  export: bytes = b"") -> dict[bytes, int]:
        """From the greeting to the transmission phase; returns the ids of the contexts."""
        self.greet()
        if extended:
            assert self.ask(OPT_EXTENDED)[0] == REP_ACK
        elif structured:
            assert self.ask(OPT_STRUCTURED)[0] == REP_ACK
        self.structured, self.extended = structured or extended, extended
        ids = self.set_contexts(*contexts, export=export) if contexts else {}
        assert self.go(export) == REP_ACK
        return ids

    def go(self, name: bytes = b"", infos: tuple[int, ...] = (1, 2, 3)) -> int:
        """GO; returns the type of the final reply and keeps what it told."""
        kind, replies = self.ask(OPT_GO, info_data(name, infos))
        for _, data in replies:
            self.infos[int.from_bytes(data[:2])] = data[2:]
        if 0 in self.infos:
            self.size_bytes, self.flags = struct.unpack(">QH", self.infos[0])
        return kind

    # --- transmission ---

    def request(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, *, cookie: int | None = None,
                magic: int | None = None) -> bytes:
        """A request header; the cookie is the next unused number unless given."""
        if cookie is None:
            cookie = next(self._cookies)
        if kind == READ:
            self._reads[cookie] = length
        if self.extended:
            return struct.pack(">IHHQQQ", magic or EXTENDED, flags, kind, cookie, offset, length)
        return struct.pack(">IHHQQI", magic or COMPACT, flags, kind, cookie, offset, length)

    def call(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"",
             **more: Any) -> Reply:
        """Send one request and take its reply."""
        self.send(self.request(kind, offset, length, flags, **more) + payload)
        return self.reply()

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = self.call(READ, offset, length, flags)
        assert reply.error == 0, reply
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        flags |= PAYLOAD_LEN if self.extended else 0
        return self.call(WRITE, offset, len(data), flags, data).error

    def status(self, offset: int, length: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
        reply = self.call(BLOCK_STATUS, offset, length, flags)
        assert reply.error == 0, reply
        return reply.extents

    def disconnect(self) -> None:
        self.send(self.request(DISC))

    def reply(self) -> Reply:
        """The next reply; chunks of different replies must not be mixed, which this server does not do."""
        magic = int.from_bytes(self.take(4))
        if magic == 0x67446698:
            return self._simple_reply()
        reply = None
        while True:
            assert magic == (0x6E8A278C if self.extended else 0x668E33EF), hex(magic)
            done, reply = self._chunk(reply)
            if done:
                return reply
            magic = int.from_bytes(self.take(4))

    def _simple_reply(self) -> Reply:
        error, cookie = struct.unpack(">IQ", self.take(12))
        length = self._reads.pop(cookie, 0)
        assert not (self.structured and length), "a READ was answered with a simple reply"
        assert not self.extended, "a request with an extended header was answered with a simple reply"
        return Reply(cookie, error, data=b"" if error else self.take(length))

    def _chunk(self, reply: Reply | None) -> tuple[bool, Reply]:
        if self.extended:
            flags, kind, cookie, _, length = struct.unpack(">HHQQQ", self.take(28))
        else:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        reply = reply or Reply(cookie)
        assert reply.cookie == cookie
        reply.chunks.append(kind)
        _CHUNKS[kind](reply, self.take(length))
        return bool(flags & 1), reply


def _offset_data(reply: Reply, data: bytes) -> None:
    assert len(data) > 8, "a data chunk without data"
    reply.pieces.append(("data", int.from_bytes(data[:8]), len(data) - 8))
    reply.data += data[8:]


def _offset_hole(reply: Reply, data: bytes) -> None:
    offset, length = struct.unpack(">QI", data)
    assert length, "a hole without length"
    reply.pieces.append(("hole", offset, length))
    reply.data += bytes(length)


def _error(reply: Reply, data: bytes) -> None:
    reply.error, length = struct.unpack(">IH", data[:6])
    reply.message = data[6 : 6 + length].decode()


def _block_status(reply: Reply, data: bytes) -> None:
    reply.extents[int.from_bytes(data[:4])] = list(struct.iter_unpack(">II", data[4:]))


def _block_status_ext(reply: Reply, data: bytes) -> None:
    context, count = struct.unpack(">II", data[:8])
    extents = list(struct.iter_unpack(">QQ", data[8:]))
    assert len(extents) == count
    reply.extents[context] = extents


_CHUNKS = {
    0: lambda reply, data: None,
    1: _offset_data,
    2: _offset_hole,
    5: _block_status,
    6: _block_status_ext,
    0x8001: _error,
    0x8002: _error,
}
