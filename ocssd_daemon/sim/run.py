"""Owns one experiment: precondition a device, run a workload or a trace in virtual time, and what is reported of it.

fill        the first share of the disk, in order, in no time
warm-up     so many overwrites with the same workload, the last of them timed, so that queues and buffer are full
measured    overwrites x sectors, or so many requests, or the trace
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ocssd_daemon._fast import Ftl
from ocssd_daemon._sim import Host
from ocssd_daemon.device import Device, DeviceError
from ocssd_daemon.settings import Settings
from ocssd_daemon.sim import traces, workloads

PIECES = 100  # of the measured part: samples over time, and progress
TIMED_LEAD_IN = 20  # write buffers' worth of requests at the end of the warm-up that run with time

Progress = Callable[[float], None]


class Plan(NamedTuple):
    """What to run. Exactly one of *workload* and *trace*; *ios* wins over *overwrites*."""

    workload: workloads.Spec | None = None
    trace: str | None = None
    depth: int = 32
    fill: float = 1.0
    overwrites: float = 10.0
    ios: int | None = None
    warmup: float = 5.0
    seed: int = 7


class NoSpaceError(RuntimeError):
    """The disk became read-only while the experiment ran; one line."""


class Sample(NamedTuple):
    """Counters at one moment."""

    virtual_ns: int
    ios: int
    user_sectors_written: int
    user_sectors_read: int
    gc_sectors_moved: int
    flash_sectors_written: int


def _ftl(device: Device) -> Ftl:
    if device.ftl is None:
        raise DeviceError("ftl.pus: a simulation needs the host FTL to own parallel units")
    return device.ftl


def _sample(device: Device, host: Host) -> Sample:
    ftl = _ftl(device).stats()
    return Sample(host.now_ns, host.ios, *(ftl[name] for name in Sample._fields[2:]))


def simulate(
    settings: Settings, plan: Plan, named: frozenset[str] = frozenset(), progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Run *plan* on a device of *settings* and report.

    Raises DeviceError for settings that make no device, TraceError, WorkloadError and NoSpaceError.
    """
    trace = traces.load(plan.trace) if plan.trace else None
    device = Device(settings, named, clock="virtual")
    try:
        _ftl(device)
        if trace is not None:
            return _replay(device, plan, trace, progress)
        return _run(device, plan, progress)
    finally:
        device.close()


def _span(device: Device, plan: Plan) -> int:
    """Fill the disk as planned. Returns the sectors that the workload works on."""
    filled = round(plan.fill * _ftl(device).capacity_sectors)
    if filled:
        device.physics.take_time(False)
        _ftl(device).fill(0, filled)
        device.physics.take_time(True)
    return filled or _ftl(device).capacity_sectors


def _run(device: Device, plan: Plan, progress: Progress) -> dict[str, Any]:
    assert plan.workload is not None
    span = _span(device, plan)
    host = Host(device.disk, plan.depth)
    workload = plan.workload.start(span, plan.seed)
    total = plan.ios if plan.ios is not None else round(plan.overwrites * span)
    warm = round(plan.warmup * span) if plan.workload.reads < 1 else 0
    lead_in = TIMED_LEAD_IN * _buffer_sectors(device) if device.physics.timing else 0

    def work(ios: int) -> None:
        if host.run(workload, ios) < ios:
            raise NoSpaceError(
                "the disk became read-only: no spare space is left; more ftl.op or fewer faults"
            )

    device.physics.take_time(False)
    for part in _parts(max(0, warm - lead_in)):
        work(part)
        progress(host.ios / (warm + total))
    device.physics.take_time(True)
    work(min(lead_in, max(warm, total // 10)))
    return _measure(device, host, plan, _parts(total), work, progress)


def _replay(device: Device, plan: Plan, trace: traces.Trace, progress: Progress) -> dict[str, Any]:
    assert plan.trace is not None
    at = traces.to_sectors(trace, plan.trace, device.disk.sector_bytes, _ftl(device).capacity_sectors)
    _span(device, plan)
    host = Host(device.disk, plan.depth)
    done = 0

    def work(ios: int) -> None:
        nonlocal done
        piece = slice(done, done + ios)
        if host.replay(at.at_ns[piece], at.ops[piece], at.lbas[piece], at.counts[piece], trace.timed) < ios:
            raise NoSpaceError("the disk became read-only: no spare space is left; more ftl.op")
        done += ios

    return _measure(device, host, plan, _parts(len(at.ops)), work, progress)


def _buffer_sectors(device: Device) -> int:
    return (
        max(device.physics.timing.latency.buffer_sectors or 0, device.geometry.total_pus * device.geometry.ws_opt)
        if device.physics.timing
        else 0
    )


def _parts(total: int) -> list[int]:
    cuts = [total * i // PIECES for i in range(PIECES + 1)]
    return [b - a for a, b in itertools.pairwise(cuts) if b > a]


def _measure(
    device: Device, host: Host, plan: Plan, parts: list[int], work: Callable[[int], None], progress: Progress
) -> dict[str, Any]:
    host.record()
    samples = [_sample(device, host)]
    busy = device.physics.timing.stats() if device.physics.timing else {}
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    for i, part in enumerate(parts):
        work(part)
        samples.append(_sample(device, host))
        progress(0.5 + 0.5 * (i + 1) / len(parts))
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_started_s
    return _report(device, host, plan, samples, busy, wall_s) | {"cpu_seconds": cpu_s}


def _report(
    device: Device, host: Host, plan: Plan, samples: list[Sample], busy: dict[str, int], wall_s: float
) -> dict[str, Any]:
    first, last = samples[0], samples[-1]
    delta = {name: getattr(last, name) - getattr(first, name) for name in Sample._fields}
    virtual_s = delta.pop("virtual_ns") / 1e9
    ios = delta.pop("ios")
    user, flash = delta["user_sectors_written"], delta["flash_sectors_written"]
    timed = device.physics.timing is not None
    return {
        "workload": plan.workload.text if plan.workload else None,
        "trace": plan.trace,
        "seed": plan.seed,
        "depth": plan.depth,
        "capacity_sectors": _ftl(device).capacity_sectors,
        "sector_bytes": device.disk.sector_bytes,
        "ios": ios,
        "waf": flash / user if user else None,
        "gc_share": delta["gc_sectors_moved"] / flash if flash else 0.0,
        **delta,
        "iops": ios / virtual_s if virtual_s else None,
        "virtual_seconds": virtual_s if timed else 0.0,
        "wall_seconds": wall_s,
        "placements_per_second": flash / wall_s if wall_s else None,
        "ios_per_wall_second": ios / wall_s if wall_s else None,
        "latency_ns": {op: host.latency(op) if timed else None for op in ("read", "write")},
        "busy": _busy(device, busy, delta, virtual_s),
        "wear": _wear(device),
        "over_time": _over_time(samples, device.disk.sector_bytes),
    }


def _busy(
    device: Device, before: dict[str, int], delta: dict[str, int], virtual_s: float
) -> dict[str, float] | None:
    """How busy PUs and channels were, as shares of the time."""
    if device.physics.timing is None or not virtual_s:
        return None
    after = device.physics.timing.stats()
    spent = {
        name: (after[name] - before[name]) / 1e9 / virtual_s for name in after if name.endswith("_busy_ns")
    }
    channels = spent.pop("channel_busy_ns") / device.geometry.groups
    pus = {name.removesuffix("_busy_ns"): value / device.geometry.total_pus for name, value in spent.items()}
    return {**pus, "channel": channels}


def _wear(device: Device) -> dict[str, float]:
    cycles = device.media.chunks["pe_cycles"]
    return {
        "min": int(cycles.min()),
        "mean": float(cycles.mean()),
        "max": int(cycles.max()),
        "stddev": float(np.std(cycles)),
    }


def _over_time(samples: list[Sample], sector_bytes: int) -> list[dict[str, float | None]]:
    """One row per piece of the measured part."""
    rows: list[dict[str, float | None]] = []
    for a, b in itertools.pairwise(samples):
        user = b.user_sectors_written - a.user_sectors_written
        read = b.user_sectors_read - a.user_sectors_read
        flash = b.flash_sectors_written - a.flash_sectors_written
        seconds = (b.virtual_ns - a.virtual_ns) / 1e9
        rows.append(
            {
                "virtual_s": (b.virtual_ns - samples[0].virtual_ns) / 1e9,
                "ios": b.ios - samples[0].ios,
                "iops": (b.ios - a.ios) / seconds if seconds else None,
                "bytes_per_second": (user + read) * sector_bytes / seconds if seconds else None,
                "waf": flash / user if user else None,
                "gc_share": (b.gc_sectors_moved - a.gc_sectors_moved) / flash if flash else 0.0,
            }
        )
    return rows
