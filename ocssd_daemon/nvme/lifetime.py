"""Owns what the drive counts over all of its sessions. A session's queues have counters that end with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any


class Lifetime:
    """Counters of queues that are gone, and of the ones in use. *now_s* is a clock that never goes back."""

    def __init__(self, now_s: Callable[[], float] = lambda: 0.0) -> None:
        self._now_s = now_s
        self._began_s = now_s()
        self._before: Counter[str] = Counter()
        self._queues: Any = None

    def attach(self, queues: Any) -> None:
        """A session begins; the one before has ended."""
        if self._queues is not None:
            self._before.update(self._queues.counters())
        self._queues = queues

    def counters(self) -> Counter[str]:
        return self._before + Counter(self._queues.counters() if self._queues is not None else {})

    @property
    def hours(self) -> int:
        return int((self._now_s() - self._began_s) // 3600)
