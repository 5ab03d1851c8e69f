"""The latency model against its closed forms, in virtual and in real time.

The device has numbers for which the answer is known: an unloaded read takes sense + transfer, a saturated parallel unit
reads 1 / sense, a saturated channel carries its bandwidth, steady writes run at PUs x sectors / program time. In real
time the client polls, so that what is added to the model is the daemon's own time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bench.compare import (
    IOPS,
    LATENCY,
    Row,
    alternate,
    at_least,
    at_most,
    value_at_most,
)
from bench.daemon import daemon
from bench.programs import Result
from bench.settings import Settings
from bench.vhost import fill, run_client

GROUP = "latency model"
SENSE_NS, PROGRAM_NS, TRANSFER_NS = 40_000, 800_000, 5_000
WS_OPT = 8
NUMBERS = {
    "latency.sense_ns": SENSE_NS,
    "latency.program_ns": PROGRAM_NS,
    "latency.erase_ns": 2_000_000,
    "latency.transfer_ns_per_sector": TRANSFER_NS,
}


@dataclass(frozen=True)
class Case:
    """One closed form: the shape, the load, and the rate that must come out."""

    what: str
    groups: int
    pus: int
    op: str
    depth: int
    expected: float  # IOPS


CASES = (
    Case("unloaded read", 1, 1, "read", 1, 1e9 / (SENSE_NS + TRANSFER_NS)),
    Case("read, one PU saturated", 1, 1, "read", 16, 1e9 / SENSE_NS),
    Case("read, channel saturated", 1, 16, "read", 40, 1e9 / TRANSFER_NS),
)
STEADY = Case("steady write", 2, 4, "write", 40, 2 * 4 * WS_OPT * 1e9 / PROGRAM_NS)


def assignments(case: Case) -> dict[str, Any]:
    return {**NUMBERS, "geometry.groups": case.groups, "geometry.pus": case.pus, "ftl.op": 1.0}


def virtual(case: Case) -> float:
    """IOPS of *case* in virtual time."""
    from ocssd_daemon import settings as sets
    from ocssd_daemon.sim import run, workloads

    layer = {key: sets.Given(value, "bench") for key, value in assignments(case).items()}
    shape = {"geometry.chunks": sets.Given(64, "bench"), "geometry.sectors": sets.Given(512, "bench")}
    name = "randread" if case.op == "read" else "seqwrite"
    plan = run.Plan(
        workload=workloads.parse(name),
        depth=case.depth,
        ios=40_000,
        warmup=0,
        fill=1.0 if case.op == "read" else 0.0,
    )
    return float(run.simulate(sets.build(layer, shape), plan)["iops"])


def virtual_rows() -> Iterator[Row]:
    for case in (*CASES, STEADY):
        ours = virtual(case)
        what = f"{case.what}, virtual time"
        yield Row(GROUP, what, "IOPS", ours, "closed form", case.expected, at_least(0.99))
        yield Row(GROUP, f"{what} (upper bound)", "IOPS", ours, "closed form", case.expected, at_most(1.01))


def real_rows(settings: Settings, case: Case) -> Iterator[Row]:
    """The same over vhost-user-blk: IOPS, the median for the unloaded case, and how late completions were.

    The disk is filled twice, so that all memory of the flash was touched. Steady writes go on in order, which leaves
    lines without valid data: collecting costs erases only, and those take no time here.
    """
    flags = [f"--set={key}={value}" for key, value in assignments(case).items()]
    client: dict[str, object] = {"op": case.op, "depth": case.depth, "mode": "poll"}
    if case.op == "write":
        client |= {"pattern": "sequential"}
        flags.append("--set=latency.erase_ns=0")
    with ExitStack() as stack:
        name = case.what.replace(" ", "-").replace(",", "")
        ours = stack.enter_context(
            daemon(settings.directory / name, "256M", [*flags, "--set=reactor.poll_us=1000"])
        )
        for _ in range(2):
            fill(ours.vhost)
        side = {"ours": lambda: run_client(ours.vhost, seconds=settings.seconds, **client)}
        samples = alternate(side, settings.rounds)["ours"]
        late = float(ours.stats()["reactor"]["late_p99_ns"])
    yield _real_row(case, samples)
    yield Row(GROUP, f"{case.what}: lateness p99", "µs", late / 1e3, goal=value_at_most(50))


def _real_row(case: Case, samples: list[Result]) -> Row:
    unloaded = case.depth == 1
    metric = LATENCY if unloaded else IOPS
    expected = 1e6 / case.expected if unloaded else case.expected
    goal = at_most(1.03) if unloaded else at_least(0.97)
    what = f"{case.what}, real time" + (", p50" if unloaded else "")
    return Row(
        GROUP,
        what,
        metric.unit,
        metric.median(samples),
        "closed form",
        expected,
        goal,
        samples={"ours": samples},
    )


def rows(settings: Settings) -> Iterator[Row]:
    """All rows of the group; needs no root."""
    settings.say("latency model: virtual time")
    yield from virtual_rows()
    for case in (*CASES, STEADY):
        settings.say(f"latency model: {case.what}")
        yield from real_rows(settings, case)
