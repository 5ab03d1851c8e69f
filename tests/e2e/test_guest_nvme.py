"""An unmodified QEMU (10.1 or newer) sees the controller over vfio-user; the guest's lightnvm, pblk and fio judge."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.guest import Guest, lightnvm_guest, run_guest
from tests.kit.qemu import current_qemu

READY_S = 30.0
FIO = "fio --eta=never --direct=1 --ioengine=libaio --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/fio"
MAKE_PBLK = "nvme lnvm create -d nvme0n1 -n p0 -t pblk -b 0 -e 7"
VERSIONS = pytest.mark.parametrize("preset", ["pblk-20", "pblk-12"])


class Daemon:
    """A daemon with only a vfio-user door; ``start`` and ``kill`` may be called in turn."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.socket = directory / "nvme.sock"
        self._argv = [sys.executable, "-m", "ocssd_daemon.cli.daemon", "--vfio-user", str(self.socket), *arguments]

    def start(self) -> None:
        self._process = subprocess.Popen(self._argv)
        deadline = time.monotonic() + READY_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._ask("info") is not None:
                return
        raise AssertionError("the daemon is not ready")

    def _ask(self, command: str) -> dict | None:
        ask = [sys.executable, "-m", "ocssd_daemon.cli.client", "--control", f"{self.socket}.ctl", command, "-o",
               "json"]
        done = subprocess.run(ask, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def stats(self) -> dict:
        found = self._ask("stats")
        assert found is not None
        return found

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.wait(30) == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[Daemon]:
    daemon = Daemon(directory, *arguments)
    daemon.start()
    try:
        yield daemon
        daemon.stop()
    finally:
        daemon.kill()


def device(daemon: Daemon) -> list[str]:
    return ["-device", json.dumps({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(daemon.socket)}})]


def run(job: str, daemon: Daemon, **options: object) -> str:
    return run_guest(job, device(daemon), qemu=current_qemu(), image=lightnvm_guest(), timeout_s=240, memory_mib=768,
                     **options)


@VERSIONS
def test_nvme_cli_shows_the_device_and_pblk_makes_a_disk_that_verifies(tmp_path: Path, preset: str) -> None:
    show = {"pblk-20": "nvme lnvm chunk-log /dev/nvme0n1 | head -3", "pblk-12": "nvme lnvm diag-bbtbl /dev/nvme0n1"}
    job = f"""
nvme lnvm list
nvme lnvm id-ns /dev/nvme0n1
{show[preset]}
{MAKE_PBLK} -f
/sbin/mke2fs -q /dev/p0
mkdir -p /mnt; mount /dev/p0 /mnt
{FIO} --name=v --filename=/mnt/v --size=24m --rw=randwrite --bs=4k --iodepth=16
umount /mnt
/sbin/e2fsck -fn /dev/p0
"""
    with serving(tmp_path, "--preset", preset) as daemon:
        said = run(job, daemon)
        stats = daemon.stats()
    assert "nvme0n1" in said
    assert {"pblk-20": "SEQWRITE_REQ", "pblk-12": "tblks"}[preset] in said
    assert stats["media"]["sectors_written"] > 24 * 256


@VERSIONS
def test_a_pblk_disk_survives_removal_a_reboot_and_the_death_of_its_guest(tmp_path: Path, preset: str) -> None:
    """Written, removed, made again; then a guest that is killed in the middle of writes; then a new one recovers."""
    write = f"""
{MAKE_PBLK} -f
dd if=/dev/urandom of=/dev/p0 bs=64k count=64 conv=fsync
sum=$(dd if=/dev/p0 bs=64k count=64 | md5sum); echo "SUM $sum"
nvme lnvm remove -n p0
{MAKE_PBLK}
test "$(dd if=/dev/p0 bs=64k count=64 | md5sum)" = "$sum"
echo WRITING
while :; do dd if=/dev/zero of=/dev/p0 bs=64k seek=64 count=256; done
"""
    check = f"""
{MAKE_PBLK}
echo "SUM $(dd if=/dev/p0 bs=64k count=64 | md5sum)"
"""
    with serving(tmp_path, "--preset", preset) as daemon:
        with Guest(write, device(daemon), qemu=current_qemu(), image=lightnvm_guest(), memory_mib=768) as guest:
            guest.wait_for("WRITING", 240)
            before = _sums(guest.console)
        assert _sums(run(check, daemon)) == before


def _sums(console: str) -> list[str]:
    return [line for line in console.splitlines() if line.startswith("SUM ")]


def test_a_block_namespace_is_an_ordinary_nvme_disk_and_its_controller_can_be_reset(tmp_path: Path) -> None:
    job = f"""
nvme id-ctrl /dev/nvme0 | grep -i ocssd
{FIO} --name=a --filename=/dev/nvme0n1 --size=32m --rw=randwrite --bs=4k --iodepth=32
nvme reset /dev/nvme0
{FIO} --name=b --filename=/dev/nvme0n1 --size=8m --offset=32m --rw=write --bs=128k --iodepth=4
echo 1 > /sys/bus/pci/devices/$(basename $(readlink /sys/class/nvme/nvme0/device))/reset
{FIO} --name=c --filename=/dev/nvme0n1 --size=8m --offset=48m --rw=randwrite --bs=512 --iodepth=8
"""
    with serving(tmp_path, "--set", "nvme.namespaces=block", "--size", "512M") as daemon:
        run(job, daemon)
        assert daemon.stats()["transports"]["vfio-user"]["errors"] == 0


def test_flash_and_its_disk_are_shared_out_by_parallel_units(tmp_path: Path) -> None:
    """The host FTL has PUs 0–3 and serves them as namespace 2; pblk in the guest runs on the others."""
    job = f"""
nvme lnvm create -d nvme0n1 -n p0 -t pblk -b 4 -e 7 -f
{FIO} --name=a --filename=/dev/p0 --size=8m --rw=randwrite --bs=4k --iodepth=8
{FIO} --name=b --filename=/dev/nvme0n2 --size=8m --rw=randwrite --bs=4k --iodepth=8
"""
    shared = ("--preset", "pblk-20", "--set", "nvme.namespaces=ocssd20,block", "--set", "ftl.pus=0-3")
    with serving(tmp_path, *shared) as daemon:
        run(job, daemon)
        assert daemon.stats()["ftl"]["user_sectors_written"] >= 2048
