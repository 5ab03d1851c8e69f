"""A device in virtual time for tests: flash without data, FTL, disk, and a host that keeps a queue full."""

from __future__ import annotations

from typing import Any, NamedTuple

from ocssd_daemon._fast import Disk, Ftl, Media

from ocssd_daemon._physics import Timing, attach_timing
from ocssd_daemon._sim import Host, Workload
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.latency import resolve
from ocssd_daemon.nand.store import open_ram

SENSE_NS = 40_000
PROGRAM_NS = 800_000
ERASE_NS = 2_000_000
TRANSFER_NS = 5_000
NUMBERS = {
    "sense_ns": (SENSE_NS,),
    "program_ns": (PROGRAM_NS,),
    "erase_ns": ERASE_NS,
    "transfer_ns_per_sector": TRANSFER_NS,
}


class Rig(NamedTuple):
    geometry: Geometry
    media: Media
    ftl: Ftl
    disk: Disk
    timing: Timing


def rig(op: float = 0.28, numbers: dict[str, Any] | None = None, **shape: int) -> Rig:
    """A filled device of *shape* whose time starts at 0."""
    geometry = validate(
        Geometry(**{"groups": 1, "pus": 1, "chunks": 64, "sectors": 512, "mw_cunits": 0, **shape})
    )
    media = Media(open_ram(geometry, keep_data=False))
    ftl = Ftl(media, int(geometry.total_sectors / (1 + op)), wear_spread=0)
    ftl.load(0)
    ftl.fill()
    ftl.program_buffers()
    latency = resolve("none", NUMBERS if numbers is None else numbers, geometry)
    assert latency is not None
    timing = Timing(geometry, latency)
    attach_timing(media, timing, virtual=True)
    return Rig(geometry, media, ftl, Disk(ftl, 4096), timing)


class Measured(NamedTuple):
    ios: int
    iops: float
    reads: dict[str, float] | None
    writes: dict[str, float] | None


def measure(device: Rig, workload: Workload, ios: int, depth: int, lead_in: int = 0) -> Measured:
    """Issue *ios* requests at *depth* after a *lead_in* that is not measured."""
    host = Host(device.disk, depth)
    host.run(workload, lead_in)
    host.record()
    start_ns = host.now_ns
    done = host.run(workload, ios)
    iops = done * 1e9 / max(1, host.now_ns - start_ns)
    return Measured(done, iops, host.latency("read"), host.latency("write"))
