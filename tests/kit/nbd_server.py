"""A device served over NBD inside the test's process: the reactor on its thread, trio on another.

For tests that need to look inside (counters, descriptors, tasks) or to break something while a client is connected. The
daemon as a process is what ``tests/e2e`` starts.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from ocssd_daemon.device import Device
from ocssd_daemon.settings import Given, build, from_preset
from ocssd_daemon.transport.listen import TcpAddress, UnixAddress, open_listener
from ocssd_daemon.transport.nbd import serve_nbd
from tests.kit.nbd_client import NbdClient

DEADLINE_S = 10.0


@dataclass
class NbdServer:
    """One device behind a Unix socket and, when asked for, a TCP port."""

    device: Device
    path: str
    host: str | None = None
    port: int = 0
    authority: Any = None  # of TLS tests: who signed the certificate, and somebody who did not
    stranger: Any = None
    _trio_token: Any = None
    _stop: Any = None
    _failures: list[BaseException] = field(default_factory=list)
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def client(self) -> NbdClient:
        return NbdClient.unix(self.path)

    def connect(self, **agreed: Any) -> NbdClient:
        """A client in the transmission phase; see NbdClient.negotiate."""
        client = self.client()
        client.negotiate(**agreed)
        return client

    def stats(self) -> dict[str, int]:
        return self.device.stats()["transports"]["nbd"]  # type: ignore[no-any-return]

    def call(self, function: Any, *args: Any) -> Any:
        """Run *function* in the server's trio thread."""
        return trio.from_thread.run_sync(function, *args, trio_token=self._trio_token)

    def task_count(self) -> int:
        return int(self.call(self.tasks_now))

    @staticmethod
    def tasks_now() -> int:
        """Living tasks; to be called in the trio thread, as a condition of ``wait``."""
        return trio.lowlevel.current_statistics().tasks_living

    def stop(self) -> None:
        """Stop serving, as the daemon does when it ends; the reactor goes on."""
        self.call(self._stop.cancel)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Look, in the server's trio thread, until *condition* is true."""
        end = time.monotonic() + DEADLINE_S
        while not self.call(condition):
            assert time.monotonic() < end, f"{what}: not within {DEADLINE_S} s"
            time.sleep(0.001)

    # --- its threads ---

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._trio_token = trio.lowlevel.current_trio_token()
        listeners = [open_listener(UnixAddress(self.path))]
        if self.host is not None:
            listeners.append(open_listener(TcpAddress(self.host, 0)))
            self.port = listeners[1].sockets[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(self._dispatch)
            async with trio.open_nursery() as doors:
                self._stop = doors.cancel_scope
                for listener in listeners:
                    await doors.start(serve_nbd, listener, self.device)
                self._ready.set()
            nursery.cancel_scope.cancel()
        for listener in listeners:
            listener.close()

    async def _dispatch(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self.device.reactor.event_fd)
            self.device.dispatch()


@contextlib.contextmanager
def nbd_server(
    directory: Path, *, preset: str = "tiny", host: str | None = None, **settings: Any
) -> Iterator[NbdServer]:
    """Serve a fresh device; *settings* are keys with ``__`` for the dot, as in ``nbd__max_connections=2``."""
    layer = {key.replace("__", "."): Given(value, "test") for key, value in settings.items()}
    device = Device(build(from_preset(preset), layer))
    device.start()
    server = NbdServer(device, str(directory / "nbd.sock"), host)
    thread = threading.Thread(target=server._run, name="nbd-server")
    thread.start()
    try:
        assert server._ready.wait(DEADLINE_S)
        if server._failures:
            raise server._failures[0]
        yield server
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            server.stop()
        thread.join(DEADLINE_S)
        device.stop()
        device.close()
    assert not thread.is_alive()
    assert not server._failures, server._failures


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
