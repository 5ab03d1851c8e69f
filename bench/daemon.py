"""Owns the daemon under test: start, readiness by sd_notify, counters by ``ocssd stats``, memory.

Ready is what the daemon itself says (READY=1), not what its sockets look like. Sizes are bytes.
Knows no case.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.programs import end

DAEMON = (sys.executable, "-m", "ocssd_daemon.cli.daemon")
CLIENT = (sys.executable, "-m", "ocssd_daemon.cli.client")


@dataclass(frozen=True)
class Daemon:
    """A running daemon: its pid, its sockets and how long it took from exec to READY=1."""

    pid: int
    directory: Path
    ready_s: float

    @property
    def vhost(self) -> Path:
        return self.directory / "vhost.sock"

    @property
    def vfio(self) -> Path:
        return self.directory / "nvme.sock"

    @property
    def nbd(self) -> Path:
        return self.directory / "nbd.sock"

    def ask(self, what: str) -> dict[str, Any]:
        """What ``ocssd stats -o json`` (or ``info``) says now."""
        command = [*CLIENT, "--control", str(self.directory / "control.sock"), what, "-o", "json"]
        answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return answer

    def stats(self) -> dict[str, Any]:
        """All counters."""
        return self.ask("stats")

    def ftl(self) -> dict[str, Any]:
        """The FTL's counters, without the ``ftl.`` of a flat listing."""
        counters = self.stats()
        if "ftl" in counters:
            nested: dict[str, Any] = counters["ftl"]
            return nested
        return {name.removeprefix("ftl."): value for name, value in counters.items() if name.startswith("ftl.")}

    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return 1024 * int(rollup.partition("Rss:")[2].split()[0])


@contextlib.contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        try:
            yield listener
        finally:
            path.unlink()


def _wait_ready(listener: socket.socket, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    listener.settimeout(0.1)
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in listener.recv(4096).split(b"\n"):
                return
        if process.poll() is not None:
            raise RuntimeError(f"the daemon ended with {process.returncode}, see its log")
    raise RuntimeError("the daemon did not say READY=1")


def _block_doors(directory: Path) -> list[str]:
    return ["--socket", str(directory / "vhost.sock"), "--nbd", f"unix:{directory / 'nbd.sock'}"]


def nvme_door(directory: Path) -> list[str]:
    """Arguments that serve NVMe in *directory*, as ``Daemon.vfio``."""
    return ["--vfio-user", str(directory / "nvme.sock")]


@contextlib.contextmanager
def daemon(
    directory: Path,
    size: str = "4G",
    extra: Sequence[str] = (),
    timeout_s: float = 60,
    doors: Callable[[Path], list[str]] = _block_doors,
) -> Iterator[Daemon]:
    """A daemon with flash in RAM that serves both block transports in *directory*, or *doors*; stopped at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [*DAEMON, *doors(directory), "--control", str(directory / "control.sock"), "--size", size, *extra]
    with _notify_socket(directory / "notify.sock") as listener, (directory / "log").open("a") as log:
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify.sock")}
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        try:
            _wait_ready(listener, process, timeout_s)
            yield Daemon(process.pid, directory, time.monotonic() - began)
        finally:
            end(process)
