"""Owns daemons under test: start one as a service manager does, ask it, end it, and see what it left behind.

Ready is what the daemon itself says (READY=1), never a sleep or a socket file. Every wait has a limit.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DAEMON = (sys.executable, "-m", "ocssd_daemon.cli.daemon")
CLIENT = (sys.executable, "-m", "ocssd_daemon.cli.client")
READY_S = 30.0
STOP_S = 30.0


def environment(**more: str) -> dict[str, str]:
    """Ours, with this checkout importable from any directory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


class NotReady(AssertionError):
    """The daemon ended, or said nothing, instead of becoming ready; carries its output."""


@dataclass
class Daemon:
    """A running daemon. *notify* is the manager's end of its readiness socket."""

    process: subprocess.Popen[bytes]
    notify: socket.socket
    log: Path
    control: Path | None

    def said(self) -> str:
        """What it wrote so far, on stdout and stderr."""
        return self.log.read_text(errors="replace")

    def state(self, timeout_s: float = READY_S) -> dict[str, str]:
        """The next thing that it tells its manager. Raises NotReady if it ends first."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            readable, _, _ = select.select([self.notify.fileno(), pidfd], [], [], timeout_s)
        finally:
            os.close(pidfd)
        if self.notify.fileno() not in readable:
            raise NotReady(f"said nothing and {'ended' if readable else 'hangs'}:\n{self.said()}")
        return dict(line.split("=", 1) for line in self.notify.recv(65536).decode().splitlines())

    def ask(self, method: str) -> Any:
        """What ``ocssd METHOD -o json`` says."""
        return json.loads(run_client("--control", str(self.control), method, "-o", "json").stdout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextmanager
def daemon(
    directory: Path,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    wrapper: Sequence[str] = (),
    ready: bool = True,
) -> Iterator[Daemon]:
    """A daemon with *arguments*, ready unless *ready* is false. At the end it must have stopped or stop cleanly."""
    control = directory / "control.ctl"
    given = [str(argument) for argument in arguments]
    if "--control" not in given:
        given += ["--control", str(control)]
    log = directory / "daemon.log"
    address = f"\0ocssd-test-{os.getpid()}-{id(given)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(log, "wb") as output:
        notify.bind(address)
        process = subprocess.Popen(
            [*wrapper, *DAEMON, *given],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(NOTIFY_SOCKET="@" + address[1:], **(env or {})),
            pass_fds=pass_fds,
        )
        running = Daemon(process, notify, log, control)
        try:
            if ready and "READY" not in running.state():
                process.wait(STOP_S)
                raise NotReady(running.said())
            yield running
            if process.poll() is None:
                assert running.stop() == 0, running.said()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def run_daemon(
    *arguments: str | Path, wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A daemon that ends by itself: what it said and its exit code."""
    return _run([*wrapper, *DAEMON, *map(str, arguments)], env, **options)


def run_client(
    *arguments: str, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """One call of ``ocssd``."""
    return _run([*CLIENT, *arguments], env, **options)


def _run(command: Sequence[str], env: Mapping[str, str] | None, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"stdin": subprocess.DEVNULL, "timeout": READY_S, "capture_output": True, **options}
    return subprocess.run(command, text=True, check=False, env=environment(**(env or {})), **options)
