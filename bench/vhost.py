"""The vhost-user-blk numbers: ours beside qemu-storage-daemon on null-co and on a tmpfs file, and memcpy.

Sequential cases run on a freshly filled device; random ones after it was overwritten at random until garbage
collection is in steady state. The tmpfs file has our size and is filled too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import peers
from bench.compare import (
    IOPS,
    LATENCY,
    THROUGHPUT,
    Goal,
    Measure,
    Metric,
    Row,
    alternate,
    at_least,
    at_most,
    value_at_most,
)
from bench.daemon import Daemon, daemon
from bench.programs import Result, compiled, cpu_seconds, options, run_json
from bench.settings import Settings

GROUP = "vhost-user-blk"
CHECK_EVERY = 64
STEADY_ROUNDS_MAX = 12
STEADY_CHANGE = 0.05


@dataclass(frozen=True)
class Case:
    """What the client does, which of its results counts, and the goal against each peer (None: show only)."""

    what: str
    client: Mapping[str, object]
    goals: Mapping[str, Goal | None]
    metric: Metric = IOPS


READ = {"op": "read", "check_every": CHECK_EVERY}
WRITE = {"op": "write"}
ONE = {"depth": 1}
POLL = {"mode": "poll"}
STREAM_BYTES = 128 << 10
STREAM = {"pattern": "sequential", "block_bytes": STREAM_BYTES, "depth": 8}
COPIES: dict[str, dict[str, object]] = {
    "memcpy": STREAM,
    "random memcpy": {"pattern": "random", "block_bytes": 4096, "depth": 32},
}
HALF_OF_BOTH = {"null-co": at_most(0.5), "tmpfs file": at_most(0.5)}
COPY = {"memcpy": at_least(0.6), "tmpfs file": None}

SEQUENTIAL = (
    Case("read 128 KiB sequential, depth 8, polling", {**READ, **STREAM, **POLL}, COPY, THROUGHPUT),
    Case("read 128 KiB sequential, depth 8", {**READ, **STREAM}, {"memcpy": None, "tmpfs file": None}, THROUGHPUT),
)
RANDOM = (
    Case("read, depth 32", READ, {"null-co": at_least(1.0), "tmpfs file": at_least(4.0)}),
    Case("write under GC, depth 32", WRITE, {"tmpfs file": at_least(3.0), "null-co": None}),
    Case("read, depth 1, p50", {**READ, **ONE}, HALF_OF_BOTH, LATENCY),
    Case("write under GC, depth 1, p50", {**WRITE, **ONE}, HALF_OF_BOTH, LATENCY),
    Case("read, depth 32, polling", {**READ, **POLL}, {"null-co": at_least(0.5), "random memcpy": None}),
    Case("read, depth 1, both polling, p50", {**READ, **ONE, **POLL}, {"": value_at_most(2.0)}, LATENCY),
    Case("read, depth 32, 2 queues", {**READ, "queues": 2}, {"null-co": None, "tmpfs file": None}),
)


def run_client(socket: Path, **values: object) -> Result:
    return run_json([compiled("vub_client"), *options(socket=socket, **values)])


def device_bytes(socket: Path) -> int:
    return int(run_client(socket, requests=1, depth=1)["device_bytes"])


def fill(socket: Path) -> None:
    """Writes every block once, in order."""
    blocks = device_bytes(socket) // STREAM_BYTES
    run_client(socket, op="write", requests=blocks, **STREAM)


def write_amplification(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    user = after["user_sectors_written"] - before["user_sectors_written"]
    moved = after["gc_sectors_moved"] - before["gc_sectors_moved"]
    return 1 + moved / max(user, 1)


def precondition(ours: Daemon, say: Callable[[str], None]) -> float:
    """Overwrites at random, half a device at a time, until write amplification stays put; returns it."""
    half = device_bytes(ours.vhost) // 4096 // 2
    last, overwritten = 0.0, 0.0
    for seed in range(STEADY_ROUNDS_MAX):
        before = ours.ftl()
        run_client(ours.vhost, op="write", requests=half, seed=100 + seed)
        waf = write_amplification(before, ours.ftl())
        overwritten += 0.5
        say(f"preconditioning: {overwritten:.1f} x overwritten, WAF {waf:.3f}")
        if overwritten >= 1.5 and waf > 1.05 and abs(waf - last) <= STEADY_CHANGE * waf:
            return waf
        last = waf
    return last


class Bench:
    """The servers of this group, up at the same time, and how to measure each."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self.settings = settings
        self.ours = stack.enter_context(daemon(settings.directory / "vhost", settings.size))
        size_bytes = device_bytes(self.ours.vhost)
        null_co = stack.enter_context(peers.null_co(settings.directory, size_bytes))
        tmpfs = stack.enter_context(peers.tmpfs_file(settings.directory, size_bytes))
        self.sockets = {
            "ours": self.ours.vhost,
            "null-co": settings.directory / "null-co.sock",
            "tmpfs file": settings.directory / "tmpfs.sock",
        }
        self.pids = {"ours": self.ours.pid, "null-co": null_co.pid, "tmpfs file": tmpfs.pid}

    def _measure(self, side: str, client: Mapping[str, object]) -> Result:
        # null-co returns nothing that could be compared.
        checked = {**client, "check_every": 0} if side == "null-co" else client
        before = cpu_seconds(self.pids[side])
        result = run_client(self.sockets[side], seconds=self.settings.seconds, **checked)
        return {**result, "server_cpu_s": round(cpu_seconds(self.pids[side]) - before, 2)}

    def _side(self, side: str, client: Mapping[str, object]) -> Measure:
        if side in COPIES:
            return lambda: run_json([compiled("memcpy"), *options(seconds=self.settings.seconds, **COPIES[side])])
        return lambda: self._measure(side, client)

    def rows(self, case: Case) -> Iterator[Row]:
        names = ["ours", *(name for name in case.goals if name)]
        samples = alternate({name: self._side(name, case.client) for name in names}, self.settings.rounds)
        medians = {name: case.metric.median(samples[name]) for name in names}
        for peer, goal in case.goals.items():
            yield Row(
                GROUP,
                case.what,
                case.metric.unit,
                medians["ours"],
                peer,
                medians.get(peer),
                goal,
                samples=samples,
            )


def rows(settings: Settings) -> Iterator[Row]:
    """All rows of the group; needs no root."""
    with ExitStack() as stack:
        bench = Bench(settings, stack)
        for name in ("ours", "tmpfs file"):
            settings.say(f"{name}: verify, fill")
            run_client(bench.sockets[name], verify=1, requests=50_000, span_bytes="64M")
            fill(bench.sockets[name])
        for case in SEQUENTIAL:
            yield from bench.rows(case)
        waf = precondition(bench.ours, settings.say)
        yield Row(GROUP, "write amplification in steady state", "", waf)
        for case in RANDOM:
            yield from bench.rows(case)
