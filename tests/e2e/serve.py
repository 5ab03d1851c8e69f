"""Owns one device under end-to-end test: a daemon that can be killed and started again on the same flash.

Tests wait for the daemon's counters, not for time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ocssd_daemon.cli.rpc import call
from tests.kit.daemon import Daemon, daemon

PROGRESS_S = 240.0  # a limit for what hangs
POLL_S = 0.02

AnyLives = TypeVar("AnyLives", bound="Lives")


class Lives:
    """A daemon with *arguments*, working in *directory*; kill, stop and start may be called in turn."""

    def __init__(self, directory: Path, arguments: tuple[str | Path, ...]) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        self._arguments = arguments
        self._life = ExitStack()
        self._daemon: Daemon

    @property
    def nbd_uri(self) -> str:
        return f"nbd+unix:///?socket={self._nbd}"

    def start(self, *more: str) -> None:
        """Start it, with *more* arguments than before, which may contradict earlier ones."""
        self._daemon = self._life.enter_context(daemon(self._directory, *self._arguments, *more))

    def stop(self) -> None:
        """End it as a service manager does, and require a clean exit."""
        self._life.close()

    def kill(self) -> None:
        """SIGKILL: nothing of the process gets to run again."""
        process = self._daemon.process
        assert process.poll() is None, f"it died by itself:\n{self._daemon.said()}"
        process.kill()
        process.wait()
        self._life.close()

    def info(self) -> Any:
        """What `ocssd info -o json` says."""
        return self._daemon.ask("info")

    def stats(self) -> Any:
        """What `ocssd stats -o json` says."""
        return self._daemon.ask("stats")

    def wait_for_counter(self, part: str, name: str, more: int) -> None:
        """Wait until a counter of `ocssd stats` has grown by *more*."""
        wait_for_counter(self._daemon, part, name, more)

    def said(self) -> str:
        """What it wrote in this life, on stdout and stderr."""
        return self._daemon.said()


class Served(Lives):
    """A vhost-user socket, an NBD socket and an NBD port below *directory*."""

    def __init__(self, directory: Path, arguments: tuple[str | Path, ...]) -> None:
        self.vhost = directory / "vhost.sock"
        self.nbd_port = _free_port()
        self._nbd = directory / "nbd.sock"
        doors = ("--socket", self.vhost, "--nbd", f"unix:{self._nbd}", "--nbd", f"tcp:127.0.0.1:{self.nbd_port}")
        super().__init__(directory, (*doors, *arguments))

    @property
    def nbd_uri(self) -> str:
        return f"nbd+unix:///?socket={self._nbd}"

    def wait_for_sectors_written(self, sectors: int) -> None:
        """Wait until the guest has written *sectors* more."""
        self.wait_for_counter("ftl", "user_sectors_written", sectors)


class ServedNvme(Lives):
    """A vfio-user socket below *directory*."""

    def __init__(self, directory: Path, arguments: tuple[str | Path, ...]) -> None:
        self.vfio = directory / "vfio.sock"
        super().__init__(directory, ("--vfio-user", self.vfio, *arguments))


def wait_for_counter(running: Daemon, part: str, name: str, more: int) -> None:
    """Wait until a counter of `ocssd stats` has grown by *more*, without starting a client each time."""
    control = str(running.control)
    goal = call(control, "stats")[part][name] + more
    deadline_s = time.monotonic() + PROGRESS_S
    while call(control, "stats")[part][name] < goal:
        assert time.monotonic() < deadline_s, f"no progress within {PROGRESS_S:g} s:\n{running.said()}"
        time.sleep(POLL_S)


def serve(directory: Path, *arguments: str) -> AbstractContextManager[Served]:
    """A disk, running; see `_alive`."""
    return _alive(Served(directory, arguments))


def serve_nvme(directory: Path, *arguments: str | Path) -> AbstractContextManager[ServedNvme]:
    """An NVMe controller, running; see `_alive`."""
    return _alive(ServedNvme(directory, arguments))


@contextmanager
def _alive(served: AnyLives) -> Iterator[AnyLives]:
    """Started; unless the test fails, the daemon must stop cleanly at the end."""
    served.start()
    try:
        yield served
    except BaseException:
        served.kill()
        raise
    served.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
