"""Owns listening sockets: addresses, Unix socket files and their leftovers, sockets passed by a parent.

A Unix socket appears at its path only when it already listens (bound under another name, then linked), so a
second daemon that probes the path never takes a starting one for dead. A dead socket file is taken over; a
live one, or anything that is no socket, is refused. At close the file is removed only if it is still the
one that was made here.

Spec: sd_listen_fds(3) for inherited sockets. Knows no protocol: what is accepted goes on as a trio
SocketStream.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import trio

FIRST_INHERITED_FD = 3  # SD_LISTEN_FDS_START
INHERITED_MAX = 64
BACKLOG = 64
SUN_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) less the terminating NUL


class AddressError(ValueError):
    """Text that is no address; a usage error."""


class ListenError(Exception):
    """An address that cannot be listened on now; one line that names it and says why."""


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket at an absolute or relative path."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A TCP port; an empty host means every interface."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """The address in ``unix:PATH`` or ``tcp:HOST:PORT``. Raises AddressError with the rule."""
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        return unix_address(rest)
    if scheme == "tcp" and rest:
        return _tcp_address(text, rest)
    raise AddressError(f"{text}: must be unix:PATH or tcp:HOST:PORT")


def unix_address(path: str) -> UnixAddress:
    """The address of a socket file. Raises AddressError if no socket can have that path."""
    if not path or "\0" in path:
        raise AddressError(f"{path!r}: must be the path of a Unix socket")
    if len(os.fsencode(path)) > SUN_PATH_BYTES:
        raise AddressError(f"{path}: a Unix socket's path has at most {SUN_PATH_BYTES} bytes")
    return UnixAddress(path)


def _tcp_address(text: str, rest: str) -> TcpAddress:
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"{text}: must be tcp:HOST:PORT with a port from 0 to 65535")
    return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))


@dataclass
class Listener:
    """Open listening sockets of one address.

    ``sockets`` go to ``trio.serve_listeners``; ``close`` also removes the socket file if it is still ours.
    """

    address: Address
    sockets: list[trio.SocketListener | OneConnection]
    inherited: bool = False
    _made: tuple[int, int] | None = field(default=None, repr=False)  # device and inode of the socket file

    @property
    def path(self) -> str | None:
        """The socket file, if it has one."""
        return self.address.path if isinstance(self.address, UnixAddress) else None

    def close(self) -> None:
        """Stop listening. Connections that were accepted stay."""
        for sock in self.sockets:
            sock.socket.close()
        if self._made is not None and self.path is not None and _identity(self.path) == self._made:
            os.unlink(self.path)
        self._made = None


class OneConnection(trio.abc.Listener[trio.SocketStream]):
    """An already connected socket in a listener's place: accepted once, then never again."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self._pending = True

    async def accept(self) -> trio.SocketStream:
        if not self._pending:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self._pending = False
        return trio.SocketStream(self.socket)

    async def aclose(self) -> None:
        self.socket.close()
        await trio.lowlevel.checkpoint()


def open_listener(address: Address) -> Listener:
    """Listen on *address*. Raises ListenError with one line that names it."""
    try:
        return _open_unix(address) if isinstance(address, UnixAddress) else _open_tcp(address)
    except OSError as error:
        raise ListenError(f"{address}: {error.strerror or error}") from None


def _open_tcp(address: TcpAddress) -> Listener:
    flags = socket.AI_PASSIVE if not address.host else 0
    found = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=flags)
    opened: list[socket.socket] = []
    try:
        for family, *_, target in found:
            opened.append(socket.socket(family, socket.SOCK_STREAM))
            _bind_tcp(opened[-1], target)
    except OSError:
        for sock in opened:
            sock.close()
        raise
    port = opened[0].getsockname()[1]
    return Listener(TcpAddress(address.host, port), [_wrap(sock) for sock in opened])


def _bind_tcp(sock: socket.socket, target: tuple[Any, ...]) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:  # the IPv4 address has a socket of its own
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(target)
    sock.listen(BACKLOG)


def _wrap(sock: socket.socket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _open_unix(address: UnixAddress) -> Listener:
    path = address.path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    draft = os.path.join(os.path.dirname(path), f".{os.getpid()}")
    try:
        sock.bind(draft)
        try:
            sock.listen(BACKLOG)
            _put_in_place(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except BaseException:
        sock.close()
        raise
    return Listener(address, [_wrap(sock)], _made=_identity(path))


def _put_in_place(draft: str, path: str) -> None:
    """Give the listening socket *draft* its name; take the name over from a dead socket."""
    try:
        os.link(draft, path)
    except FileExistsError:
        _refuse_unless_dead(path)
        os.rename(draft, path)
    else:
        os.unlink(draft)


def _refuse_unless_dead(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenError(f"unix:{path}: there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        reason = probe.connect_ex(path)
    if reason != errno.ECONNREFUSED:
        raise ListenError(f"unix:{path}: a running server listens there")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# Sockets that somebody else opened.


def from_fd(fd: int) -> Listener:
    """A listener of the inherited *fd*, which listens or is connected. Raises ListenError if neither."""
    try:
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        name = sock.getsockname()
    except OSError as error:
        raise ListenError(f"fd {fd}: {error.strerror}") from None
    if kind != socket.SOCK_STREAM:
        raise ListenError(f"fd {fd}: must be a stream socket")
    one = _wrap(sock) if listening else OneConnection(trio.socket.from_stdlib_socket(sock))
    return Listener(_address_of(sock.family, name, fd), [one], inherited=True)


def _address_of(family: int, name: object, fd: int) -> Address:
    if family in (socket.AF_INET, socket.AF_INET6) and isinstance(name, tuple):
        return TcpAddress(name[0], name[1])
    return UnixAddress(os.fsdecode(name) if isinstance(name, str | bytes) and name else f"fd:{fd}")


def inherited(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[Listener]]:
    """Sockets passed by socket activation, by their ``FileDescriptorName=``; empty if there are none.

    Takes the variables out of *environ*. Raises ListenError if what they say is not so.
    """
    count, pid, names = (environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count:
        return {}
    if not count.isdecimal() or not 0 < int(count) <= INHERITED_MAX:
        raise ListenError(f"LISTEN_FDS={count}: must be from 1 to {INHERITED_MAX}")
    labels = names.split(":")
    if len(labels) != int(count):
        raise ListenError(f"LISTEN_FDNAMES={names}: must name {count} sockets")
    passed: dict[str, list[Listener]] = {}
    for offset, label in enumerate(labels):
        passed.setdefault(label, []).append(from_fd(FIRST_INHERITED_FD + offset))
    return passed
