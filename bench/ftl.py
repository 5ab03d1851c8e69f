"""The FTL alone: random 4 KiB writes in steady state, no transport and no data copied.

A placement is one sector given a place on the flash, by the user or by garbage collection. The larger device has the
same lines per gigabyte, only more of them: the cost of a placement may grow by cache misses alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.compare import Metric, Row, alternate, at_most, value_at_least
from bench.programs import Result
from bench.settings import Settings

GROUP = "FTL alone"
GIB = 1 << 30
SMALL, LARGE = "4 GiB", "256 GiB"
SIZES = {SMALL: 4 * GIB, LARGE: 256 * GIB}
OVER_PROVISIONING = 0.11
MEASURED_SECTORS = 4_000_000
PLACEMENTS = Metric("placements_per_s", "/s")
COST = Metric("ns_per_placement", "ns")


class Workload:
    """An FTL over flash without data, overwritten at random until garbage collection is steady."""

    def __init__(self, raw_bytes: int) -> None:
        from ocssd_daemon._fast import Ftl, Media

        from ocssd_daemon.nand.geometry import Geometry, with_size
        from ocssd_daemon.nand.store import open_ram

        geometry = with_size(Geometry(), raw_bytes)
        self.ftl = Ftl(
            Media(open_ram(geometry, keep_data=False)), int(geometry.total_sectors * (1 - OVER_PROVISIONING))
        )
        self.ftl.load(0)
        self.ftl.fill()
        self.ftl.random_writes(2 * self.ftl.capacity_sectors, seed=2)
        self.seed = 3

    def placed(self) -> int:
        counters = self.ftl.stats()
        return int(counters["user_sectors_written"] + counters["gc_sectors_moved"])

    def measure(self) -> Result:
        before = self.placed()
        began = time.perf_counter()
        self.ftl.random_writes(MEASURED_SECTORS, seed=self.seed)
        seconds = time.perf_counter() - began
        self.seed += 1
        placed = self.placed() - before
        return {
            "placements_per_s": placed / seconds,
            "ns_per_placement": seconds * 1e9 / placed,
            "waf": placed / MEASURED_SECTORS,
            "seconds": seconds,
        }


def rows(settings: Settings) -> Iterator[Row]:
    sides = {}
    for name, raw_bytes in SIZES.items():
        settings.say(f"FTL alone: preconditioning {name}")
        sides[name] = Workload(raw_bytes).measure
    samples = alternate(sides, settings.rounds)
    small, large = samples[SMALL], samples[LARGE]
    what = "placements, random 4 KiB writes, steady state"
    yield Row(
        GROUP, f"{what}, {SMALL}", "/s", PLACEMENTS.median(small), goal=value_at_least(10e6), samples={"ours": small}
    )
    yield Row(GROUP, f"{what}, {LARGE}", "/s", PLACEMENTS.median(large), samples={"ours": large})
    yield Row(
        GROUP,
        f"cost of a placement at {LARGE}",
        "ns",
        COST.median(large),
        f"at {SMALL}",
        COST.median(small),
        at_most(4),
    )
