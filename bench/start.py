"""Start-to-ready time and memory besides data.

Data is what the flash holds: the sectors that were programmed, and their out-of-band bytes. What is resident besides is
the process, the map and the state of the chunks. The stricter sum, out-of-band bytes included, is shown too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from bench.compare import Goal, Row, value_at_most
from bench.daemon import Daemon, daemon
from bench.nbd import run_client
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


def raw_sectors(ours: Daemon) -> int:
    shape = ours.ask("info")["geometry"]
    return math.prod(int(shape[field]) for field in ("groups", "pus", "chunks", "sectors"))


def budget_mib(sectors: int) -> Goal:
    """What may be resident besides the data of *sectors* sectors of flash that were touched."""
    return value_at_most(round(FIXED_MIB + BYTES_PER_SECTOR * sectors / MIB, 1))


def memory_rows(settings: Settings) -> Iterator[Row]:
    """Strictly, out-of-band bytes are not data: the budget has 6 bytes for a sector, they alone are 16."""
    with daemon(settings.directory / "start", settings.size) as ours:
        empty = ours.resident_bytes() / MIB
        yield Row(GROUP, "resident, nothing written", "MiB", empty, goal=value_at_most(FIXED_MIB))
        fill(ours.vhost)
        sectors = int(ours.ftl()["flash_sectors_written"])
        total = ours.resident_bytes()
        besides = (total - sectors * (SECTOR_BYTES + OOB_BYTES)) / MIB
        yield Row(GROUP, f"resident besides data, {sectors} sectors written", "MiB", besides, goal=budget_mib(sectors))
        strictly = (total - sectors * SECTOR_BYTES) / MIB
        yield Row(GROUP, "the same, out-of-band bytes included", "MiB", strictly, goal=budget_mib(sectors))
        run_client(ours.nbd, op="write", requests=sectors // 2)  # as many lines are opened anew
        raw = raw_sectors(ours)
        strictly = (ours.resident_bytes() - raw * SECTOR_BYTES) / MIB
        yield Row(GROUP, f"the same, all {raw} sectors touched", "MiB", strictly, goal=budget_mib(raw))


def rows(settings: Settings) -> Iterator[Row]:
    yield start_row(settings)
    yield from memory_rows(settings)
