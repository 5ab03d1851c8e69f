"""Owns connected Unix stream sockets that carry descriptors (SCM_RIGHTS), and the closing of every descriptor
received.

A descriptor exists from the moment that recvmsg() returns, also if the message turns out to be wrong. So the
receiver puts each one into an `FdBag` before it looks at anything else, and the bag closes what it still
holds at its end.

Knows no protocol: who may send how many descriptors, and where, is for the caller to say.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from types import TracebackType

import trio

# Per message, unless the protocol says otherwise: a whole vhost-user memory table. The kernel drops the rest
# and says so.
FDS_MAX = 8


class PeerGone(Exception):
    """The other end closed the connection, or half of a message is all that ever came."""


class BadDescriptors(Exception):
    """Descriptors came where none belong, or more than fit."""


class FdBag:
    """Descriptors that are closed when the `with` block ends, however it ends."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def __enter__(self) -> FdBag:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        close_all(self.fds)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class FdSocket:
    """One connected Unix stream socket; closes it in `close()` or at the end of a `with` block."""

    def __init__(self, sock: trio.socket.SocketType, fds_max: int = FDS_MAX) -> None:
        self._sock = sock
        self._fds_max = fds_max

    def __enter__(self) -> FdSocket:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def peer(self) -> str:
        """Name the other end for the log."""
        try:
            credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return "unknown peer"
        return f"pid {struct.unpack('3i', credentials)[0]}"

    async def wait_for_data(self) -> bool:
        """Wait until the peer has sent a byte (True) or has left without a word (False); takes nothing."""
        try:
            return bool(await self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    async def receive_some(self, size: int, bag: FdBag) -> bytes:
        """At most *size* bytes (none: the peer is gone); descriptors that come with them go into *bag*.

        Raises `BadDescriptors` if more descriptors were sent than *fds_max*, or than this process may open.
        """
        try:
            data, ancillary, flags, _ = await self._sock.recvmsg(
                size, socket.CMSG_SPACE(self._fds_max * struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return b""
        bag.fds.extend(_descriptors(ancillary))
        if flags & socket.MSG_CTRUNC:
            raise BadDescriptors(f"more than {self._fds_max} descriptors in one message, or no room to open them")
        return data

    async def receive_rest(self, size: int, have: bytes, bag: FdBag) -> bytes:
        """Complete *have* to *size* bytes.

        Raises `PeerGone` if the connection ends before, `BadDescriptors` if descriptors come.
        """
        allowed = len(bag.fds)
        while len(have) < size:
            more = await self.receive_some(size - len(have), bag)
            if len(bag.fds) > allowed:
                raise BadDescriptors("descriptors came in the middle of a message")
            if not more:
                raise PeerGone("closed the connection in the middle of a message")
            have += more
        return have

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of *data*; *fds* go with its first byte and stay open here. Raises `PeerGone`."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            while data:
                sent = await self._sock.sendmsg([data], ancillary)
                data, ancillary = data[sent:], []
        except OSError as why:
            raise PeerGone(f"cannot be written to: {why.strerror}") from None


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> array.array[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # A truncated message may end within a descriptor number; whole ones are open and ours to close.
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds
