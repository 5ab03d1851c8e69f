"""Owns how a life of named steps is lived: up in order, down in reverse, each logged with its duration.

A step's ``down`` runs also when its own ``up`` failed half-way, so it must cope with what is not there. All
downs are shielded from cancellation and have a time limit, so that one that hangs cannot keep the others
from cleaning up. Knows nothing of what the steps do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import trio

from ocssd_daemon.log import kv

log = logging.getLogger(__name__)

STEP_DOWN_S = 60.0  # a step that takes longer to take down is left behind


class Step(NamedTuple):
    """One thing that is brought up and taken down."""

    name: str
    up: Callable[[Any], Awaitable[None]]
    down: Callable[[Any], Awaitable[None]]


async def live(subject: Any, steps: Sequence[Step], stopping: trio.Event) -> None:
    """Bring *subject* up step by step, wait for *stopping*, take it down. Raises what a step's up raises."""
    begun: list[Step] = []
    try:
        for step in steps:
            if stopping.is_set():
                break
            begun.append(step)
            await _timed("start.step", step.name, step.up(subject))
        await stopping.wait()
    finally:
        for step in reversed(begun):
            await _take_down(step, subject)


async def _take_down(step: Step, subject: Any) -> None:
    with trio.CancelScope(deadline=trio.current_time() + STEP_DOWN_S, shield=True) as scope:
        await _timed("stop.step", step.name, step.down(subject))
    if scope.cancelled_caught:
        log.warning(kv("stop.left_behind", step=step.name, s=STEP_DOWN_S))


async def _timed(event: str, name: str, work: Awaitable[None]) -> None:
    started_s = time.monotonic()
    await work
    log.debug(kv(event, step=name, ms=1e3 * (time.monotonic() - started_s)))


class Tasks:
    """Background tasks in named groups, each group ended as a whole."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._groups: dict[str, list[tuple[trio.CancelScope, trio.Event]]] = {}

    async def start(self, group: str, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start a task; returns when it calls ``task_status.started()``, or raises what it raised before."""
        scope, finished = trio.CancelScope(), trio.Event()

        async def body(*, task_status: trio.TaskStatus[Any]) -> None:
            try:
                with scope:
                    await function(*args, task_status=task_status)
            finally:
                finished.set()

        self._groups.setdefault(group, []).append((scope, finished))
        await self._nursery.start(body)

    async def end(self, group: str) -> None:
        """Cancel the tasks of *group*, all at the same time, and wait until they have cleaned up."""
        tasks = self._groups.pop(group, [])
        for scope, _ in tasks:
            scope.cancel()
        for _, finished in tasks:
            await finished.wait()
