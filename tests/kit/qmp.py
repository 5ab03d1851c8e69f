"""Owns QMP, QEMU's control protocol (docs/interop/qmp-spec): one JSON object per line, events in between."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT_S = 30.0


class Qmp:
    """A QMP session on *path*; a context manager that closes the socket."""

    def __init__(self, path: Path) -> None:
        self._socket = _connect(path, time.monotonic() + TIMEOUT_S)
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run *command*; returns its "return" value. AssertionError with QEMU's words if it fails."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while "event" in (answer := self._receive()):
            self._events.append(answer)
        assert "return" in answer, f"{command}: {answer['error']['desc']}"
        return answer["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The data of the next event *name*, consuming what comes before it."""
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            if event.get("event") == name:
                return event.get("data", {})  # type: ignore[no-any-return]

    def save_state(self, path: Path) -> None:
        """Migrate the running guest into the file *path*; it is stopped then."""
        self.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.execute("migrate", uri=f"exec:cat > {path}")
        while (status := self.wait_event("MIGRATION")["status"]) != "completed":
            assert status not in ("failed", "cancelled"), self.execute("query-migrate")

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU closed its QMP socket"
        return json.loads(line)  # type: ignore[no-any-return]


def _connect(path: Path, deadline_s: float) -> socket.socket:
    """Connect as soon as QEMU listens: it makes the socket before it is ready, but after it was started."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
