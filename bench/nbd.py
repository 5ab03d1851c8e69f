"""The NBD numbers over a Unix socket: our daemon beside nbdkit's memory plugin, with three clients.

The lean client is the one that counts; fio's nbd engine is itself the limit and is shown for orientation;
nbdcopy is what people use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import peers
from bench.compare import ELAPSED, IOPS, Goal, Metric, Row, alternate, at_least, at_most
from bench.daemon import daemon
from bench.programs import Result, compiled, cpu_seconds, find, options, run_json
from bench.settings import Settings

GROUP = "NBD, Unix socket"
PEER = "nbdkit memory"
CHECK_EVERY = 64
COPY_SIZE = "1160M"


@dataclass(frozen=True)
class Case:
    """As for vhost-user-blk; *run* measures one server by its socket."""

    what: str
    run: Callable[[Path, Settings], Result]
    goal: Goal | None
    metric: Metric = IOPS


def run_client(socket: Path, **values: object) -> Result:
    return run_json([compiled("nbd_client"), *options(socket=socket, **values)])


def uri(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"


def lean(**values: object) -> Callable[[Path, Settings], Result]:
    return lambda socket, settings: run_client(socket, seconds=settings.seconds, **values)


def fio(rw: str) -> Callable[[Path, Settings], Result]:
    """fio's nbd engine at depth 32."""

    def run(socket: Path, settings: Settings) -> Result:
        command = [
            find("fio", "fio"),
            "--name=bench",
            "--ioengine=nbd",
            f"--uri={uri(socket)}",
            f"--rw={rw}",
            "--bs=4k",
            "--iodepth=32",
            "--time_based",
            f"--runtime={max(2, round(settings.seconds))}",
            "--output-format=json",
        ]
        job = run_json(command)["jobs"][0]
        return {"iops": job["write" if "write" in rw else "read"]["iops"], "fio_user_percent": job["usr_cpu"]}

    return run


def timed_copy(source: str, target: str) -> Result:
    began = time.monotonic()
    find("nbdcopy", "libnbd-bin")
    status = os.spawnlp(os.P_WAIT, "nbdcopy", "nbdcopy", source, target)
    if status:
        raise RuntimeError(f"nbdcopy {source} {target} ended with {status}")
    return {"seconds": time.monotonic() - began}


READ = {"op": "read", "check_every": CHECK_EVERY}
CASES = (
    Case("read, depth 32", lean(**READ), at_least(2.0)),
    Case("write, depth 32", lean(op="write"), at_least(2.0)),
    Case("read, depth 32, structured replies", lean(**READ, structured=1), at_least(2.0)),
    Case("read, depth 1", lean(**READ, depth=1), at_least(1.0)),
    Case("write, depth 1", lean(op="write", depth=1), at_least(1.0)),
    Case("fio nbd engine (client-bound) read, depth 32", fio("randread"), None),
    Case("fio nbd engine (client-bound) write, depth 32", fio("randwrite"), None),
)


def with_server_cpu(run: Callable[[], Result], pid: int) -> Result:
    before = cpu_seconds(pid)
    result = run()
    return {**result, "server_cpu_s": round(cpu_seconds(pid) - before, 2)}


def compare(case: Case, sockets: Mapping[str, tuple[Path, int]], settings: Settings) -> Row:
    sides = {
        name: lambda socket=socket, pid=pid: with_server_cpu(lambda: case.run(socket, settings), pid)
        for name, (socket, pid) in sockets.items()
    }
    samples = alternate(sides, settings.rounds)
    ours, peer = (case.metric.median(samples[name]) for name in ("ours", PEER))
    return Row(GROUP, case.what, case.metric.unit, ours, PEER, peer, case.goal, samples=samples)


@contextmanager
def both(settings: Settings, size: str) -> Iterator[dict[str, tuple[Path, int]]]:
    """Our daemon and an nbdkit of the same size, each with every block written."""
    with ExitStack() as stack:
        ours = stack.enter_context(daemon(settings.directory / "nbd", size))
        size_bytes = int(run_client(ours.nbd, requests=1, depth=1)["device_bytes"])
        nbdkit = stack.enter_context(peers.nbdkit_memory(settings.directory, size_bytes))
        sockets = {"ours": (ours.nbd, ours.pid), PEER: (settings.directory / "nbdkit.sock", nbdkit.pid)}
        for socket, _ in sockets.values():
            run_client(socket, verify=1, requests=50_000, span_bytes="64M")
            run_client(
                socket,
                op="write",
                pattern="sequential",
                block_bytes="128K",
                depth=8,
                requests=size_bytes >> 17,
            )
        yield sockets


def copy_rows(settings: Settings) -> Iterator[Row]:
    """nbdcopy of about 1 GiB out of each server and into it, from and to memory."""
    with both(settings, COPY_SIZE) as sockets:
        size_bytes = int(run_client(sockets["ours"][0], requests=1, depth=1)["device_bytes"])
        file = peers.TMPFS / f"ocssd-bench-copy-{os.getpid()}.img"
        try:
            file.write_bytes((os.urandom(1 << 20) * (size_bytes // (1 << 20) + 1))[:size_bytes])
            gib = f"{size_bytes / 2**30:.2f} GiB"
            goal = at_most(1.0)
            out = Case(f"nbdcopy {gib} out", lambda s, _: timed_copy(uri(s), "null:"), goal, ELAPSED)
            into = Case(f"nbdcopy {gib} in", lambda s, _: timed_copy(str(file), uri(s)), goal, ELAPSED)
            for case in (out, into):
                yield compare(case, sockets, settings)
        finally:
            file.unlink(missing_ok=True)


def rows(settings: Settings) -> Iterator[Row]:
    with both(settings, settings.size) as sockets:
        for case in CASES:
            yield compare(case, sockets, settings)
    yield from copy_rows(settings)
