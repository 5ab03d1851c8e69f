"""Start-to-ready time and memory besides data.

Data is what the flash holds: the sectors that were programmed, and their out-of-band bytes. What is resident besides is
the process, the map and the state of the chunks. The stricter sum, out-of-band bytes included, is shown too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare import Row, value_at_most
from bench.daemon import daemon
from bench.settings import Settings
from bench.vhost import fill

GROUP = "start and memory"
READY_S = 0.6
FIXED_MIB = 60
BYTES_PER_SECTOR = 6
SECTOR_BYTES = 4096
OOB_BYTES = 16
MIB = 2**20


def start_row(settings: Settings) -> Row:
    times = []
    for _ in range(settings.rounds + 2):
        with daemon(settings.directory / "start", settings.size) as ours:
            times.append(ours.ready_s)
    samples = {"ours": [{"seconds": t} for t in times]}
    return Row(GROUP, "exec to READY=1", "s", statistics.median(times), goal=value_at_most(READY_S), samples=samples)


def memory_rows(settings: Settings) -> Iterator[Row]:
    with daemon(settings.directory / "start", settings.size) as ours:
        empty = ours.resident_bytes() / MIB
        yield Row(GROUP, "resident, nothing written", "MiB", empty, goal=value_at_most(FIXED_MIB))
        fill(ours.vhost)
        sectors = int(ours.ftl()["flash_sectors_written"])
        total = ours.resident_bytes()
        goal = value_at_most(round(FIXED_MIB + BYTES_PER_SECTOR * sectors / MIB, 1))
        besides = (total - sectors * (SECTOR_BYTES + OOB_BYTES)) / MIB
        yield Row(GROUP, f"resident besides data, {sectors} sectors written", "MiB", besides, goal=goal)
        yield Row(GROUP, "the same, out-of-band bytes included", "MiB", (total - sectors * SECTOR_BYTES) / MIB)


def rows(settings: Settings) -> Iterator[Row]:
    yield start_row(settings)
    yield from memory_rows(settings)
