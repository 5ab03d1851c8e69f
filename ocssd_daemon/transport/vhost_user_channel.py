"""Owns the back-end channel of a vhost-user session: the socket on which we, for once, ask the front end.

We say only CONFIG_CHANGE_MSG and never set need_reply: the front end reacts by reading the configuration on
the main socket, and a back end that waited here for an answer would be waiting for itself. So nothing may
come back, and whatever does is a reason to drop the channel. Losing the channel never hurts the data path.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable

import trio

from ocssd_daemon.protocol.vhost_user.messages import Empty, encode_request
from ocssd_daemon.protocol.vhost_user.wire import BackendRequest
from ocssd_daemon.transport.fdsocket import BadDescriptors, FdBag, FdSocket, PeerGone

_CONFIG_CHANGE = encode_request(BackendRequest.CONFIG_CHANGE_MSG, Empty())


def channel_socket(fd: int) -> FdSocket:
    """A socket of our own for the borrowed *fd*. Raises ValueError if it is not a Unix stream socket."""
    own = os.dup(fd)
    try:
        sock = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise ValueError("the back-end channel is not a socket") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise ValueError("the back-end channel is not a Unix stream socket")
    sock.setblocking(False)
    return FdSocket(trio.socket.from_stdlib_socket(sock))


class BackendChannel:
    """Announces configuration changes until the peer breaks the rules, leaves, or stops reading."""

    def __init__(self, sock: FdSocket, send_s: float) -> None:
        self._sock = sock
        self._send_s = send_s
        self._news = trio.Event()
        self._scope = trio.CancelScope()

    def announce_config(self) -> None:
        """Tell the front end to read the configuration again; changes that wait are told as one."""
        self._news.set()

    def drop(self) -> None:
        self._scope.cancel()

    async def run(self) -> str:
        """Serve the channel; returns why it ended. Closes the socket."""
        why = "dropped"
        with self._sock, self._scope:
            async with trio.open_nursery() as nursery:

                async def end_with(part: Callable[[], Awaitable[str]]) -> None:
                    nonlocal why
                    why = await part()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(end_with, self._hear)
                nursery.start_soon(end_with, self._speak)
        return why

    async def _hear(self) -> str:
        with FdBag() as bag:
            try:
                data = await self._sock.receive_some(1, bag)
            except BadDescriptors as bad:
                return str(bad)
        return "the front end answered a message that asked for no answer" if data else "closed by the front end"

    async def _speak(self) -> str:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            try:
                with trio.fail_after(self._send_s):
                    await self._sock.send(_CONFIG_CHANGE)
            except (PeerGone, trio.TooSlowError):
                return "the front end does not read it"
