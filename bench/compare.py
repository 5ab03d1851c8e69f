"""Owns the comparison itself: alternate the sides, take medians, set the ratio against the goal.

Sides are measured A B C, A B C, … so that a change in the machine's mood hits all of them. A ratio is always
ours ÷ peer. Knows no server and no program.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.programs import Result

Measure = Callable[[], Result]


def number(value: float | None) -> str:
    """The digits that matter: 873.3 k, 1.24 M, 8.31."""
    if value is None:
        return "-"
    for limit, unit, suffix in ((1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if abs(value) >= limit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio to a peer, or on our own value if *absolute*."""

    bound: float
    at_most: bool = False
    absolute: bool = False

    def met(self, ours: float, peer: float | None) -> bool | None:
        value = ours if self.absolute else ours / peer if peer else None
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {number(self.bound)}{'' if self.absolute else ' ×'}"


def at_least(ratio: float) -> Goal:
    return Goal(ratio)


def at_most(ratio: float) -> Goal:
    return Goal(ratio, at_most=True)


def value_at_least(bound: float) -> Goal:
    return Goal(bound, absolute=True)


def value_at_most(bound: float) -> Goal:
    return Goal(bound, at_most=True, absolute=True)


@dataclass(frozen=True)
class Metric:
    """Which member of a result counts, and how it is shown."""

    key: str
    unit: str
    scale: float = 1.0

    def median(self, samples: list[Result]) -> float:
        return statistics.median(float(sample[self.key]) for sample in samples) * self.scale


IOPS = Metric("iops", "IOPS")
LATENCY = Metric("p50_ns", "µs", 1e-3)
THROUGHPUT = Metric("mb_per_s", "GB/s", 1e-3)
ELAPSED = Metric("seconds", "s")


@dataclass(frozen=True)
class Row:
    """One line of the table: our median beside one peer's."""

    group: str
    what: str
    unit: str
    ours: float | None = None
    peer_name: str = ""
    peer: float | None = None
    goal: Goal | None = None
    note: str = ""
    samples: Mapping[str, list[Result]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.ours is not None and self.peer else None

    @property
    def met(self) -> bool | None:
        return self.goal.met(self.ours, self.peer) if self.goal and self.ours is not None else None

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "goal": str(self.goal) if self.goal else None,
            "ratio": self.ratio,
            "met": self.met,
        }


def alternate(sides: Mapping[str, Measure], rounds: int) -> dict[str, list[Result]]:
    """Each side's results, one of each per round."""
    samples: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            samples[name].append(measure())
    return samples
