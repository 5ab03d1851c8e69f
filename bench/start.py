"""Start-to-ready time and memory besides data.

Memory besides data is the resident size less the flash itself: the mapping that holds the sectors is the
largest one. The other estimate, resident size less the bytes written, knows no mapping and is shown too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare import Row, value_at_most
from bench.daemon import Daemon, daemon
from bench.settings import Settings
from bench.vhost import fill, run_client

GROUP = "start and memory"
READY_S = 0.6
FIXED_BYTES = 60 << 20
BYTES_PER_SECTOR = 6
SECTOR_BYTES = 4096
MIB = 2**20


def resident(ours: Daemon) -> tuple[int, int]:
    """(all of it, all but the largest mapping), in bytes."""
    mappings = ours.mappings()
    total = sum(rss for _, rss in mappings)
    return total, total - max(mappings)[1]


def start_row(settings: Settings) -> Row:
    times = []
    for _ in range(settings.rounds + 2):
        with daemon(settings.directory / "start", settings.size) as ours:
            times.append(ours.ready_s)
    return Row(
        GROUP,
        "exec to READY=1",
        "s",
        statistics.median(times),
        goal=value_at_most(READY_S),
        samples={"ours": [{"seconds": t} for t in times]},
    )


def memory_rows(settings: Settings) -> Iterator[Row]:
    with daemon(settings.directory / "start", settings.size) as ours:
        yield Row(
            GROUP,
            "resident besides data, nothing written",
            "MiB",
            resident(ours)[1] / MIB,
            goal=value_at_most(60),
        )
        fill(ours.vhost)
        written = int(run_client(ours.vhost, requests=1, depth=1)["device_bytes"])
        total, besides = resident(ours)
        allowed = (FIXED_BYTES + BYTES_PER_SECTOR * written // SECTOR_BYTES) / MIB
        goal = value_at_most(round(allowed, 1))
        yield Row(
            GROUP,
            f"resident besides data, {written / 2**30:.2f} GiB written",
            "MiB",
            besides / MIB,
            goal=goal,
        )
        yield Row(GROUP, "the same as total less bytes written", "MiB", (total - written) / MIB, goal=goal)


def rows(settings: Settings) -> Iterator[Row]:
    yield start_row(settings)
    yield from memory_rows(settings)
