"""Owns what the daemon tells its service manager: one datagram per state, as sd_notify(3) describes.

Without ``NOTIFY_SOCKET`` everything here does nothing; a socket that cannot be reached is logged once and
forgotten, as a missing listener must not stop a disk. Times are microseconds, as in the protocol.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

from ocssd_daemon.log import kv

log = logging.getLogger(__name__)


class Notifier:
    """The way to the service manager. Takes its variables out of *environ*: children must not see them."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._path = environ.pop("NOTIFY_SOCKET", "")
        self._watchdog_us = _watchdog_us(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))

    @property
    def watched(self) -> bool:
        """Whether somebody listens."""
        return bool(self._path)

    @property
    def watchdog_interval_s(self) -> float | None:
        """Seconds between signs of life: half the watchdog's time, as sd_watchdog_enabled(3) advises."""
        return self._watchdog_us / 2e6 if self._watchdog_us else None

    def send(self, **fields: object) -> None:
        """Send e.g. ``READY=1`` and ``STATUS=…`` in one datagram."""
        if not self._path:
            return
        state = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode(), _address(self._path))
        except OSError as error:
            log.warning(kv("notify.failed", socket=self._path, error=error.strerror))
            self._path = ""


def _address(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


def _watchdog_us(usec: str, pid: str) -> int:
    """The watchdog's time, or 0 if there is none or it is meant for another process."""
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return 0
    return int(usec)
