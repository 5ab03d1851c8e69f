"""Readiness: what the service manager is told. The test plays the manager on a datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ocssd_daemon.transport.notify import Notifier


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    path = str(tmp_path / "notify") if request.param == "file" else f"@ocssd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + path[1:] if path.startswith("@") else path)
        yield path, sock


def test_a_state_is_one_datagram(manager: tuple[str, socket.socket]) -> None:
    path, sock = manager
    Notifier({"NOTIFY_SOCKET": path}).send(READY=1, STATUS="serving")
    assert sock.recv(4096) == b"READY=1\nSTATUS=serving"


def test_the_variables_are_not_passed_on() -> None:
    environ = {
        "NOTIFY_SOCKET": "/none",
        "WATCHDOG_USEC": "1000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    Notifier(environ)
    assert environ == {"HOME": "/"}


def test_without_a_manager_nothing_happens() -> None:
    Notifier({}).send(READY=1)


def test_a_manager_that_cannot_be_reached_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/none/notify"})
    notifier.send(READY=1)
    notifier.send(STOPPING=1)
    assert [r.getMessage() for r in caplog.records] == [
        'notify.failed socket=/none/notify error="No such file or directory"'
    ]


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [
        ("30000000", None, 15.0),
        ("30000000", "1", None),
        ("", None, None),
        ("soon", None, None),
        ("0", None, None),
    ],
)
def test_the_watchdog_is_fed_twice_per_period(usec: str, pid: str | None, interval_s: float | None) -> None:
    environ = {"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid or str(os.getpid())}
    assert Notifier(environ).watchdog_interval_s == interval_s
