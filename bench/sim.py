"""The simulator's speed: how many sectors it places, and how many I/Os it times, per second of one core.

A core's time is what counts, so that a machine that does other things too changes little but the caches.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.compare import Metric, Row, alternate, value_at_least
from bench.programs import Result
from bench.settings import Settings

GROUP = "ocssd simulate"
PLACEMENTS = Metric("placements_per_cpu_second", "/s")
TIMED = Metric("ios_per_cpu_second", "/s")


def simulator(*texts: str, workload: str) -> Result:
    """One simulation of 4 GiB of flash, warmed up so that garbage collection is steady."""
    from ocssd_daemon import settings as sets
    from ocssd_daemon.sim import run, workloads

    plan = run.Plan(workload=workloads.parse(workload), ios=3_000_000, warmup=2)
    done = run.simulate(sets.build(sets.from_assignments(texts)), plan)
    return {
        "placements_per_cpu_second": done["flash_sectors_written"] / done["cpu_seconds"],
        "ios_per_cpu_second": done["ios"] / done["cpu_seconds"],
        **{name: done[name] for name in ("waf", "placements_per_second", "ios_per_wall_second", "cpu_seconds")},
    }


CASES = {
    "placements, greedy, random writes": (PLACEMENTS, 10e6, ("randwrite",)),
    "placements, plain greedy, one frontier": (PLACEMENTS, 10e6, ("randwrite", "ftl.frontiers=1")),
    "timed I/Os, slc, 70 % reads": (TIMED, 3e6, ("mix:70", "latency.profile=slc", "ftl.op=0.28")),
    "timed I/Os, tlc with suspension, 70 % reads": (
        TIMED,
        3e6,
        ("mix:70", "latency.profile=tlc", "latency.suspend=true", "ftl.op=0.28"),
    ),
}


def rows(settings: Settings) -> Iterator[Row]:
    settings.say("ocssd simulate: speed")
    sides = {what: lambda a=a: simulator(*a[1:], workload=a[0]) for what, (_, _, a) in CASES.items()}  # type: ignore[misc]
    for what, samples in alternate(sides, settings.rounds).items():
        metric, goal, _ = CASES[what]
        yield Row(GROUP, what, "/s", metric.median(samples), goal=value_at_least(goal), samples={"ours": samples})
