"""Owns how a log line looks: ``event key=value …``, one line each, on stderr.

Modules log with the standard library, ``log.warning(kv("nbd.refused", peer=peer, reason="tls"))``; event
names are stable. A line that a peer can provoke carries ``extra=per(peer, reason)`` and is then written at
most once in ``QUIET_S`` for that pair, with the number of lines left out: a hostile peer cannot fill the
disk. Nothing logs per I/O.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

QUIET_S = 5.0
PAIRS_REMEMBERED = 1024  # more pairs than this and the oldest are forgotten: memory stays bounded
PRIORITIES = {"DEBUG": "<7>", "INFO": "<6>", "WARNING": "<4>", "ERROR": "<3>", "CRITICAL": "<2>"}
LEVELS = ("debug", "info", "warning", "error")


def kv(event: str, **fields: Any) -> str:
    """One log message: the event's name and its fields."""
    return " ".join([event, *(f"{name}={_quoted(value)}" for name, value in fields.items())])


def _quoted(value: Any) -> str:
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def per(peer: object, reason: str) -> dict[str, Any]:
    """``extra`` of a line that *peer* can provoke at will."""
    return {"limit": (str(peer), reason)}


class RateLimit(logging.Filter):
    """Lets one line per (peer, reason) through in QUIET_S and counts the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, str], list[float]] = {}  # pair → [last written, left out since]

    def filter(self, record: logging.LogRecord) -> bool:
        pair = getattr(record, "limit", None)
        if pair is None:
            return True
        now = self._clock()
        seen = self._seen.pop(pair, [-QUIET_S, 0])
        self._seen[pair] = seen
        if len(self._seen) > PAIRS_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if now - seen[0] < QUIET_S:
            seen[1] += 1
            return False
        if seen[1]:
            record.msg = f"{record.getMessage()} left_out={int(seen[1])}"
            record.args = ()
        seen[:] = [now, 0]
        return True


class Renderer(logging.Formatter):
    """``12:00:00.123 info event key=value``; for systemd's journal, which has the time, a priority prefix."""

    def __init__(self, journal: bool) -> None:
        plain = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
        super().__init__("%(message)s" if journal else plain, "%H:%M:%S")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if self._journal:
            return PRIORITIES[record.levelname] + line
        return line.replace(record.levelname, record.levelname.lower(), 1)


def configure(level: str, *, journal: bool) -> None:
    """Send everything of *level* and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Renderer(journal))
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
