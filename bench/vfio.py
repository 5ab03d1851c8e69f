"""The vfio-user numbers: the NVMe block namespace beside our own vhost-user-blk, vector reads beside memcpy, a guest.

Both doors of the block cases lead to the same disk, filled and overwritten at random until garbage collection is in
steady state. The vector cases run on raw flash that was written by vector commands. What a guest sees is in
``vfio_guest``; where there is no QEMU for it, its rows say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import vfio_guest, vhost
from bench.compare import IOPS, LATENCY, THROUGHPUT, Goal, Metric, Row, alternate, at_least
from bench.daemon import Daemon, daemon, nvme_door
from bench.programs import Result, Unavailable, compiled, cpu_seconds, options, run_json
from bench.settings import Settings

GROUP = "vfio-user"
OWN = "our vhost-user-blk"
VECTOR_BYTES = 256 << 10        # 64 sectors
VECTOR = {"vector": 1, "block_bytes": VECTOR_BYTES, "pattern": "sequential", "depth": 8, "span_bytes": "1G"}
NEAR = at_least(0.8)


@dataclass(frozen=True)
class Case:
    """What both clients do, which doorbells ours uses, which result counts, and the goal against the other door."""

    what: str
    client: Mapping[str, object]
    goal: Goal | None = None
    doorbells: str = "shadow"
    metric: Metric = IOPS


READ, WRITE, ONE, POLL = vhost.READ, vhost.WRITE, vhost.ONE, vhost.POLL

CASES = (
    Case("read, depth 32", READ, NEAR),
    Case("read, depth 32, polling", {**READ, **POLL}, NEAR),
    Case("write under GC, depth 32", WRITE, NEAR),
    Case("write under GC, depth 32, polling", {**WRITE, **POLL}, NEAR),
    Case("read, depth 1, p50", {**READ, **ONE}, metric=LATENCY),
    Case("read, depth 1, both polling, p50", {**READ, **ONE, **POLL}, metric=LATENCY),
    Case("read, depth 32, trapped doorbells", READ, doorbells="trapped"),
    Case("read, depth 32, trapped doorbells, polling", {**READ, **POLL}, doorbells="trapped"),
    Case("read, depth 1, trapped doorbells, p50", {**READ, **ONE}, doorbells="trapped", metric=LATENCY),
)
MAPPED_CASES = (
    Case("read, depth 32, mapped doorbells", READ, doorbells="mapped"),
    Case("read, depth 32, mapped doorbells, polling", {**READ, **POLL}, doorbells="mapped"),
    Case("read, depth 1, mapped doorbells, p50", {**READ, **ONE}, doorbells="mapped", metric=LATENCY),
)


def run_client(socket: Path, **values: object) -> Result:
    return run_json([compiled("vfio_client"), *options(socket=socket, **values)])


class Block:
    """One daemon that serves its disk through both doors, ready to be measured."""

    def __init__(self, settings: Settings, stack: ExitStack, name: str, doorbells: str) -> None:
        self.settings = settings
        directory = settings.directory / name
        extra = [*nvme_door(directory), "--set", "nvme.namespaces=block", "--set", f"nvme.doorbells={doorbells}"]
        self.ours: Daemon = stack.enter_context(daemon(directory, settings.size, extra))
        settings.say(f"{name}: verify, fill")
        for how in ("trapped", "mapped" if doorbells == "mapped" else "shadow"):
            run_client(self.ours.vfio, verify=1, requests=50_000, span_bytes="64M", doorbells=how)
        vhost.fill(self.ours.vhost)

    def _measure(self, case: Case, own: bool) -> Result:
        before = cpu_seconds(self.ours.pid)
        common = {"seconds": self.settings.seconds, **case.client}
        if own:
            result = vhost.run_client(self.ours.vhost, **common)
        else:
            result = run_client(self.ours.vfio, doorbells=case.doorbells, **common)
        return {**result, "server_cpu_s": round(cpu_seconds(self.ours.pid) - before, 2)}

    def row(self, case: Case) -> Row:
        sides = {"ours": lambda: self._measure(case, False), OWN: lambda: self._measure(case, True)}
        samples = alternate(sides, self.settings.rounds)
        ours, own = (case.metric.median(samples[name]) for name in ("ours", OWN))
        return Row(GROUP, case.what, case.metric.unit, ours, OWN, own, case.goal, samples=samples)


def block_rows(settings: Settings) -> Iterator[Row]:
    with ExitStack() as stack:
        block = Block(settings, stack, "nvme", "trapped")
        vhost.precondition(block.ours, settings.say)
        yield from map(block.row, CASES)
    with ExitStack() as stack:
        block = Block(settings, stack, "nvme-mapped", "mapped")
        yield from map(block.row, MAPPED_CASES)


def vector_rows(settings: Settings) -> Iterator[Row]:
    """Vector reads of 64 sectors from raw flash, beside copies of the same size."""
    copies = [compiled("memcpy"), *options(seconds=settings.seconds, pattern="sequential", block_bytes=VECTOR_BYTES)]
    with daemon(settings.directory / "raw", "2G", ["--preset", "pblk-20"], doors=nvme_door) as ours:
        settings.say("vector: write 1 GiB")
        run_client(ours.vfio, op="write", requests=(1 << 30) // VECTOR_BYTES, **VECTOR)
        for mode, goal in (("poll", at_least(0.5)), ("sleep", None)):
            reads = {**VECTOR, **READ, "mode": mode, "seconds": settings.seconds}
            sides = {"ours": lambda reads=reads: run_client(ours.vfio, **reads), "memcpy": lambda: run_json(copies)}
            samples = alternate(sides, settings.rounds)
            value, copied = (THROUGHPUT.median(samples[name]) for name in ("ours", "memcpy"))
            what = "vector read of 64 sectors, depth 8" + (", polling" if mode == "poll" else "")
            yield Row(GROUP, what, THROUGHPUT.unit, value, "memcpy", copied, goal, samples=samples)


def rows(settings: Settings) -> Iterator[Row]:
    """All rows of the group; needs no root."""
    yield from block_rows(settings)
    yield from vector_rows(settings)
    try:
        yield from vfio_guest.rows(settings)
    except (Unavailable, RuntimeError) as reason:
        yield Row(vfio_guest.GROUP, "not measured", "", note=str(reason))
