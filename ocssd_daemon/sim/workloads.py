"""Owns the names of the built-in workloads and what they mean.

    randwrite  randread  seqwrite  seqread
    mix:70                  70 % random reads, the rest random writes
    zipf:1.1                writes by Zipf's law with this skew
    hotcold:0.05/0.95       5 % of the sectors get 95 % of the writes

Two may be joined with ``+``, one for the addresses and a mix for the reads: ``zipf:1.1+mix:70``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ocssd_daemon._sim import Workload


class WorkloadError(ValueError):
    """A workload that cannot be; one line."""


class Spec(msgspec.Struct, frozen=True):
    """What to do: arguments of ``_sim.Workload``."""

    text: str
    pattern: str = "uniform"
    reads: float = 0.0
    skew: float = 1.0
    hot: float = 0.2
    heat: float = 0.8

    def start(self, span: int, seed: int) -> Workload:
        return Workload(self.pattern, span, self.reads, self.skew, self.hot, self.heat, seed)


PLAIN: dict[str, dict[str, Any]] = {
    "randwrite": {"pattern": "uniform"},
    "randread": {"pattern": "uniform", "reads": 1.0},
    "seqwrite": {"pattern": "sequential"},
    "seqread": {"pattern": "sequential", "reads": 1.0},
}

FORMS = "randwrite, randread, seqwrite, seqread, mix:70, zipf:1.1 or hotcold:0.05/0.95"


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise WorkloadError(f"{what} is {text or 'missing'}: must be a number from {low:g} to {high:g}")
    return value


def _mix(text: str) -> dict[str, Any]:
    return {"reads": _number(text, 0, 100, "percentage of reads") / 100}


def _zipf(text: str) -> dict[str, Any]:
    return {"pattern": "zipf", "skew": _number(text, 0.01, 10, "skew")}


def _hotcold(text: str) -> dict[str, Any]:
    hot, _, heat = text.partition("/")
    return {
        "pattern": "hotcold",
        "hot": _number(hot, 0, 1, "share of hot sectors"),
        "heat": _number(heat, 0, 1, "share of the I/O that they get"),
    }


WITH_NUMBERS = {"mix": _mix, "zipf": _zipf, "hotcold": _hotcold}


def _part(text: str) -> dict[str, Any]:
    name, _, numbers = text.partition(":")
    if text in PLAIN:
        return PLAIN[text]
    if name not in WITH_NUMBERS:
        raise WorkloadError(f"must be {FORMS}")
    return WITH_NUMBERS[name](numbers)


def parse(text: str) -> Spec:
    """The workload of that name. Raises WorkloadError."""
    fields: dict[str, Any] = {}
    try:
        for part in text.split("+"):
            given = _part(part)
            if fields.keys() & given.keys():
                raise WorkloadError("joins two of the same kind")
            fields |= given
    except WorkloadError as error:
        raise WorkloadError(f"workload {text}: {error}") from None
    return Spec(text, **fields)
