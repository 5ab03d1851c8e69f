"""Owns one running ocssd-daemon for end-to-end tests: started as users start it, asked through `ocssd`,
killed by pid.

Ready is what the daemon tells its service manager (READY=1); tests wait for counters, not for time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_S = 30.0
STOP_S = 30.0
PROGRESS_S = 60.0


class Served:
    """A daemon with its sockets below *directory*; `kill` and `start` may be called in turn."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        self.vhost = directory / "vhost.sock"
        self._nbd = directory / "nbd.sock"
        self._control = directory / "ctl.sock"
        self._notify = directory / "notify.sock"
        self._log = directory / "daemon.log"
        self.nbd_port = _free_port()
        doors = ["--socket", self.vhost, "--nbd", f"unix:{self._nbd}", "--nbd", f"tcp:127.0.0.1:{self.nbd_port}"]
        self._argv = [sys.executable, "-m", "ocssd_daemon.cli.daemon", *map(str, doors)]
        self._argv += ["--control", str(self._control), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def nbd_uri(self) -> str:
        return f"nbd+unix:///?socket={self._nbd}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        self._notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(self._log, "ab") as log:
            notify.bind(str(self._notify))
            environment = {**os.environ, "NOTIFY_SOCKET": str(self._notify)}
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=log, env=environment)
            self._wait_ready(notify, time.monotonic() + READY_S)

    def stop(self) -> None:
        """End it as a service manager does, and require a clean exit."""
        assert self._process is not None
        self._process.terminate()
        code = self._process.wait(STOP_S)
        assert code == 0, f"daemon ended with {code}:\n{self.log}"

    def kill(self) -> None:
        """SIGKILL: nothing of the process gets to run again."""
        assert self._process is not None
        assert self._process.poll() is None, f"daemon died by itself:\n{self.log}"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """End it in whatever state it is, without a check: for the way out of a test that failed."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stats(self) -> dict[str, Any]:
        """What `ocssd stats -o json` says."""
        ask = [sys.executable, "-m", "ocssd_daemon.cli.client", "--control", str(self._control)]
        done = subprocess.run([*ask, "stats", "-o", "json"], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{self.log}"
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def wait_for_sectors_written(self, sectors: int) -> None:
        """Wait until the flash has taken *sectors* more user sectors."""
        goal = self.stats()["ftl"]["user_sectors_written"] + sectors
        deadline_s = time.monotonic() + PROGRESS_S
        while self.stats()["ftl"]["user_sectors_written"] < goal:
            assert time.monotonic() < deadline_s, f"no progress within {PROGRESS_S:g} s:\n{self.log}"

    def _wait_ready(self, notify: socket.socket, deadline_s: float) -> None:
        assert self._process is not None
        notify.settimeout(0.1)
        while True:
            try:
                if b"READY=1" in notify.recv(4096):
                    return
            except TimeoutError:
                pass
            assert self._process.poll() is None, f"daemon ended with {self._process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline_s, f"daemon not ready within {READY_S:g} s:\n{self.log}"


@contextmanager
def serve(directory: Path, *arguments: str) -> Iterator[Served]:
    """A running daemon with a vhost-user socket, an NBD socket and port; it must stop cleanly at the end."""
    daemon = Served(directory, list(arguments))
    try:
        daemon.start()
        yield daemon
        daemon.stop()
    finally:
        daemon.end()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
