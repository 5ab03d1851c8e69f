"""An unmodified QEMU shows our controller as PCI 1d1d:1f1f; the guest's lightnvm, pblk and NVMe driver judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import FIO, check_file_system, churn, fill, make_file_system
from tests.e2e.serve import wait_for_counter
from tests.kit.daemon import daemon
from tests.kit.guest import Guest, lightnvm_guest, run_guest, stock_guest, vfio_user
from tests.kit.qemu import current_qemu

VERSIONS = pytest.mark.parametrize("preset", ["pblk-20", "pblk-12"])
GUEST = {"memory_mib": 768}
PBLK = "/dev/pblk0"


def create(*, factory: bool) -> str:
    """pblk over all eight PUs, as a new disk or, if not *factory*, from what the flash holds."""
    return f"nvme lnvm create -d nvme0n1 -n pblk0 -t pblk -b 0 -e 7 {'-f' if factory else ''}; test -b {PBLK}\n"


def remove() -> str:
    return "nvme lnvm remove -n pblk0\n"


@VERSIONS
def test_pblk_makes_a_disk_verifies_data_on_it_and_finds_it_again(tmp_path: Path, preset: str) -> None:
    socket, qemu = tmp_path / "vfio.sock", current_qemu()
    job = f"""
nvme lnvm list | grep nvme0n1
nvme lnvm id-ns /dev/nvme0n1
cat /sys/bus/pci/drivers/nvme/*/vendor /sys/bus/pci/drivers/nvme/*/device
{create(factory=True)}
{make_file_system(PBLK)} {fill(percent=4)} {churn(mib=16)}
dd if=/dev/urandom of=/mnt/kept bs=1M count=8; md5sum /mnt/kept > /tmp/sum
{check_file_system(PBLK)}
{remove()} {create(factory=False)}
mount -t ext4 {PBLK} /mnt; md5sum -c /tmp/sum
{check_file_system(PBLK)}
{remove()}
"""
    with daemon(tmp_path, "--vfio-user", socket, "--preset", preset):
        said = run_guest(job, vfio_user(socket), qemu=qemu, image=lightnvm_guest(), **GUEST)
    assert "0x1d1d" in said
    assert "0x1f1f" in said
    assert "/mnt/kept: OK" in said


@VERSIONS
def test_a_guest_killed_in_the_middle_of_writes_leaves_a_pblk_that_the_next_guest_recovers(
    tmp_path: Path, preset: str
) -> None:
    socket, qemu, image = tmp_path / "vfio.sock", current_qemu(), lightnvm_guest()
    load = f"""
{create(factory=True)} {make_file_system(PBLK)}
dd if=/dev/urandom of=/mnt/kept bs=1M count=8; md5sum < /mnt/kept; sync; echo LOADED
{FIO} --name=load --directory=/mnt --size=32M --rw=randwrite --bs=4k --iodepth=32 --do_verify=0 --loops=100
"""
    recover = f"""
{create(factory=False)}
/sbin/e2fsck -fp {PBLK} || test $? = 1
mount -t ext4 {PBLK} /mnt; md5sum < /mnt/kept
"""
    with daemon(tmp_path, "--vfio-user", socket, "--preset", preset) as running:
        with Guest(load, vfio_user(socket), qemu=qemu, image=image, **GUEST) as guest:
            before = guest.wait_for("LOADED").split()[-2]
            wait_for_counter(running, "media", "sectors_written", 4096)
        assert before in run_guest(recover, vfio_user(socket), qemu=qemu, image=image, **GUEST)


def test_a_current_kernel_uses_the_block_namespace_as_an_ordinary_nvme_disk(tmp_path: Path) -> None:
    socket, qemu = tmp_path / "vfio.sock", current_qemu()
    job = f"""
nvme id-ctrl /dev/nvme0 | grep '^vid.*0x1d1d'
{make_file_system("/dev/nvme0n1")} {fill(percent=40)} {churn(mib=24)}
rm /mnt/data; fstrim /mnt
{check_file_system("/dev/nvme0n1")}
"""
    arguments = ["--vfio-user", socket, "--size", "256M", "--set", "nvme.namespaces=block"]
    with daemon(tmp_path, *arguments) as running:
        run_guest(job, vfio_user(socket), qemu=qemu, image=stock_guest(), memory_mib=1024)
        assert running.ask("stats")["ftl"]["user_sectors_written"] > 24 * 256
