"""Owns the traffic of the front end that has the device: its messages in, our answers out, in this order.

A message, once begun, must be complete within `Limits.message_s`. While an answer cannot be sent nothing is
read, so a peer that does not read its answers stops itself. What a message means is decided by `Session`;
what is done about the rings, by the backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from ocssd_daemon.log import kv
from ocssd_daemon.protocol.vhost_user.backend import Backend
from ocssd_daemon.protocol.vhost_user.messages import Header, Violation, decode_header
from ocssd_daemon.protocol.vhost_user.session import Answer, Session
from ocssd_daemon.protocol.vhost_user.wire import HEADER_BYTES
from ocssd_daemon.transport.fdsocket import BadDescriptors, FdBag, FdSocket, PeerGone, close_all
from ocssd_daemon.transport.statefd import StateFd, write_state
from ocssd_daemon.transport.vhost_user_channel import BackendChannel, channel_socket

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how many; they bound what a hostile front end can hold."""

    message_s: float = 5.0
    takeover_s: float = 1.0
    channel_send_s: float = 1.0
    waiting_max: int = 16


DEFAULT_LIMITS = Limits()


class WriteCacheMode(Protocol):
    """Where the mode that the driver chose is kept: 1 write back, 0 write through."""

    wce: int


class LiveSession:
    """One front end that has the device: moves messages between its socket and the session."""

    def __init__(
        self,
        conn: FdSocket,
        backend: Backend,
        num_queues: int,
        known_config: bytes | None,
        mode: WriteCacheMode,
        *,
        warn: Callable[..., None],
        limits: Limits,
    ) -> None:
        self.conn = conn
        self.backend = backend
        self.limits = limits
        self.session = Session(backend, num_queues, self, known_config=known_config, known_wce=mode.wce)
        self._mode = mode
        self._state_fd = StateFd()
        self._warn = warn
        self._channel: BackendChannel | None = None
        self._nursery: trio.Nursery | None = None
        self._fault = ""

    async def run(self) -> str:
        """Serve the front end until it leaves or breaks the rules; returns the rule, or nothing."""
        reason = ""
        with self._state_fd:
            async with trio.open_nursery() as self._nursery:
                reason = await self._converse()
                self._nursery.cancel_scope.cancel()
        return self._fault or reason

    async def _converse(self) -> str:
        try:
            while True:
                answer = await self._next_answer()
                if answer is None:
                    return ""
                await self._act(answer)
                if answer.close:
                    return answer.refused
                self.announce_if_news()
        except (Violation, BadDescriptors, PeerGone) as why:
            return str(why)
        except trio.TooSlowError:
            return f"a message was not complete after {self.limits.message_s} s"

    async def _next_answer(self) -> Answer | None:
        with FdBag() as bag:
            received = await self._receive(bag)
            return received and self.session.receive(*received, bag.fds)

    async def _receive(self, bag: FdBag) -> tuple[Header, bytes] | None:
        """The next message, or nothing if the front end has left.

        Descriptors may come with the first byte only, so what the rest brings is a violation.
        """
        head = await self.conn.receive_some(HEADER_BYTES, bag)
        if not head:
            return None
        with trio.fail_after(self.limits.message_s):
            header = decode_header(await self.conn.receive_rest(HEADER_BYTES, head, bag))
            return header, await self.conn.receive_rest(header.size_bytes, b"", bag)

    async def _act(self, answer: Answer) -> None:
        if answer.refused:
            self._warn("vhost.message_refused", peer=self.conn.peer(), reason=answer.refused)
        try:
            await self.conn.send(answer.data, answer.fds)
        finally:
            close_all(answer.fds)

    # What the session asks of its host.

    def open_channel(self, fd: int) -> None:
        assert self._nursery is not None
        channel = BackendChannel(channel_socket(fd), self.limits.channel_send_s)
        if self._channel is not None:
            self._channel.drop()
        self._channel = channel
        self._nursery.start_soon(self._run_channel, channel)

    def keep_wce(self, wce: int) -> None:
        self._mode.wce = wce

    def save_state(self, fd: int, data: bytes) -> None:
        write_state(fd, data)

    def hold_state(self, fd: int) -> None:
        self._state_fd.hold(fd)

    def load_state(self) -> bytes:
        return self._state_fd.read()

    async def _run_channel(self, channel: BackendChannel) -> None:
        why = await channel.run()
        log.info(kv("vhost.channel_ended", reason=why))

    def announce_if_news(self) -> None:
        if self.session.config_is_news() and self._channel is not None:
            self._channel.announce_config()

    def ring_broke(self, index: int, memory_lost: bool) -> None:
        """The reactor stopped a ring, for good or (the file behind guest memory shrank) with the session."""
        why = self.backend.fault(index)
        self._warn("vhost.ring_broken", peer=self.conn.peer(), ring=index, reason=why)
        if memory_lost and self._nursery is not None:
            self._fault = "guest memory went away under a mapping"
            self._nursery.cancel_scope.cancel()
        elif self._channel is not None:
            # The status now says DEVICE_NEEDS_RESET; a configuration change makes the front end look at it.
            self._channel.announce_config()
