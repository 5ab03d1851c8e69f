"""What a guest sees over vfio-user: fio on our block namespace beside QEMU's own NVMe device, and pblk on raw flash.

One boot has both devices; they are measured in turn. QEMU's has a raw file on tmpfs, fully allocated, O_DIRECT and
io_uring; ours was written twice over before, so that neither pays for fresh memory of the host. The
processor is emulated where KVM is missing: then the guest's own work is most of every request.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.compare import Row, at_least
from bench.daemon import Daemon, daemon, nvme_door
from bench.peers import TMPFS
from bench.programs import Unavailable, compiled, options, run_json
from bench.settings import Settings
from tests.kit.guest import GuestFailure, lightnvm_guest, run_guest, vfio_user
from tests.kit.qemu import current_qemu

GROUP = "vfio-user in a guest"
PEER = "QEMU -device nvme"
OURS_SERIAL, PEER_SERIAL = "ours", "peer"
CASES = (("randread", 1), ("randread", 32), ("randwrite", 1), ("randwrite", 32))
SPAN_MIB = 64
MEMORY_MIB = 512
BOOT_S = 120.0
FLASH = "512M"
WARM_WRITES = 2 * (512 << 20) // 4096      # to the blocks that fio uses: all of the flash has been programmed then
# In the terse format of fio, version 3, these fields are IOPS.
FIO = """fio --minimal --name=job --size={span}m --direct=1 --ioengine=libaio --bs=4k --eta=never --output=/tmp/out \
--runtime={seconds:g} --time_based --filename=$2 --rw=$3 --iodepth=$4
echo "RESULT $1 $3 $4 $(($(cut -d';' -f8 /tmp/out) + $(cut -d';' -f49 /tmp/out)))"
"""
RESULT = re.compile(r"RESULT (\S+) (\S+) (\d+) (\d+)")
Samples = dict[tuple[str, str, int], list[int]]


def _measure(settings: Settings) -> str:
    return "measure() {\n" + FIO.format(span=SPAN_MIB, seconds=max(settings.seconds, 1.0)) + "}\n"


def comparison_job(settings: Settings) -> str:
    cases = "\n".join(f"  for d in $devices; do measure $d $(path $d) {rw} {depth}; done" for rw, depth in CASES)
    return f"""
path() {{ for c in /sys/class/nvme/nvme*; do
  [ "$(tr -d ' ' < $c/serial)" != "$1" ] || echo /dev/$(basename $c)n1; done; }}
{_measure(settings)}
devices="{OURS_SERIAL} {PEER_SERIAL}"
for d in $devices; do dd if=/dev/zero of=$(path $d) bs=1M count={SPAN_MIB} conv=fsync; done
for round in $(seq {settings.rounds}); do
{cases}
done
"""


def pblk_job(settings: Settings) -> str:
    return f"""
nvme lnvm create -d nvme0n1 -n p0 -t pblk -b 0 -e 7 -f
{_measure(settings)}
dd if=/dev/zero of=/dev/p0 bs=1M count={SPAN_MIB} conv=fsync
for round in $(seq {settings.rounds}); do measure p0 /dev/p0 randwrite 32; measure p0 /dev/p0 randread 32; done
"""


@contextlib.contextmanager
def _tmpfs_image() -> Iterator[Path]:
    image = TMPFS / f"ocssd-bench-nvme-{os.getpid()}.img"
    try:
        with image.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, 2 * SPAN_MIB << 20)
        yield image
    finally:
        image.unlink(missing_ok=True)


def _peer(image: Path) -> list[str]:
    drive = f"if=none,id=peer,file={image},format=raw,cache=none,aio=io_uring"
    return ["-drive", drive, "-device", f"nvme,serial={PEER_SERIAL},drive=peer"]


def _guest(job: str, devices: list[str], settings: Settings, runs: int) -> Samples:
    """IOPS by (device, workload, depth)."""
    timeout_s = BOOT_S + 4 * runs * max(settings.seconds, 1.0)
    try:
        said = run_guest(job, devices, timeout_s, qemu=current_qemu(), image=lightnvm_guest(), memory_mib=MEMORY_MIB)
    except pytest.skip.Exception as missing:
        raise Unavailable(str(missing)) from None
    except GuestFailure as failure:
        raise RuntimeError(str(failure)) from None
    found: Samples = defaultdict(list)
    for device, workload, depth, iops in RESULT.findall(said):
        found[device, workload, int(depth)].append(int(iops))
    return found


def _block_daemon(settings: Settings) -> contextlib.AbstractContextManager[Daemon]:
    extra = ["--set", "nvme.namespaces=block", "--set", f"nvme.serial={OURS_SERIAL}"]
    return daemon(settings.directory / "guest", FLASH, extra, doors=nvme_door)


def _row(what: str, ours: list[int], peer: list[int] | None = None) -> Row:
    samples = {"ours": [{"iops": v} for v in ours], **({PEER: [{"iops": v} for v in peer]} if peer else {})}
    return Row(GROUP, what, "IOPS", statistics.median(ours), PEER if peer else "",
               statistics.median(peer) if peer else None, at_least(1.0) if peer else None, samples=samples)


def rows(settings: Settings) -> Iterator[Row]:
    """Needs no root. Raises Unavailable without a QEMU ≥ 10.1 or a guest kernel with pblk."""
    settings.say("guest: block namespace beside QEMU's own device")
    with _block_daemon(settings) as ours, _tmpfs_image() as image:
        warm = options(socket=ours.vfio, op="write", requests=WARM_WRITES, span_bytes=SPAN_MIB << 20)
        run_json([compiled("vfio_client"), *warm])
        devices = [*vfio_user(ours.vfio), *_peer(image)]
        found = _guest(comparison_job(settings), devices, settings, 2 * len(CASES) * settings.rounds)
    for workload, depth in CASES:
        yield _row(f"fio {workload}, depth {depth}", found[OURS_SERIAL, workload, depth],
                   found[PEER_SERIAL, workload, depth])
    settings.say("guest: pblk on raw flash")
    with daemon(settings.directory / "pblk", "2G", ["--preset", "pblk-20"], doors=nvme_door) as ours:
        found = _guest(pblk_job(settings), vfio_user(ours.vfio), settings, 2 * settings.rounds)
    for workload in ("randwrite", "randread"):
        yield _row(f"pblk on the 2.0 device, fio {workload}, depth 32", found["p0", workload, 32])
