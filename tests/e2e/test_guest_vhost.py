"""An unmodified QEMU boots Linux with our disk as vhost-user-blk; the guest's kernel and programs judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.store import open_file
from tests.e2e.jobs import FIO, check_file_system, churn, fill, make_file_system
from tests.e2e.serve import Served, serve
from tests.kit.guest import Guest, GuestImage, any_guest, run_guest, stock_guest, vhost_user_blk
from tests.kit.qemu import Qemu, current_qemu, host_qemu

QEMUS = pytest.mark.parametrize(
    ("find_qemu", "packed"), [(host_qemu, False), (current_qemu, True)], ids=["host-split", "current-packed"]
)
FLASH_MIB = 256


def disk(daemon: Served, qemu: Qemu, **options: object) -> list[str]:
    return vhost_user_blk(qemu, daemon.vhost, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("find_qemu", "find_image", "packed"),
    [(host_qemu, any_guest, False), (current_qemu, stock_guest, True)],
    ids=["host-split", "current-packed-made-from-packages"],
)
def test_data_verifies_on_a_disk_90_percent_full_while_garbage_collection_runs(
    tmp_path: Path, find_qemu: Callable[[], Qemu], find_image: Callable[[], GuestImage], packed: bool
) -> None:
    qemu = find_qemu()
    job = f"""
{make_file_system()} {fill(percent=98)}
sync; echo FILLED; read go
{churn(mib=96)} {check_file_system()}
"""
    options = {"qemu": qemu, "image": find_image(), "memory_mib": 768}
    with (
        serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon,
        Guest(job, disk(daemon, qemu, packed=packed), **options) as guest,  # type: ignore[arg-type]
    ):
        guest.wait_for("FILLED")
        before = daemon.stats()["ftl"]
        guest.send("go")
        guest.finish()
        ftl = daemon.stats()["ftl"]
    assert before["mapped_sectors"] >= 0.9 * before["capacity_sectors"]
    assert ftl["gc_sectors_moved"] > before["gc_sectors_moved"]
    assert ftl["user_sectors_written"] - before["user_sectors_written"] >= 96 * 256
    assert ftl["flash_sectors_written"] >= ftl["user_sectors_written"] + ftl["gc_sectors_moved"]
    assert 1.0 < ftl["waf"] < 10.0


def test_every_vcpu_gets_a_queue_and_io_from_all_of_them_verifies(tmp_path: Path) -> None:
    qemu = host_qemu()
    job = f"""
test "$(ls /sys/block/vda/mq | wc -l)" = 4
test "$(cat /sys/block/vda/serial)" = "drive 7"
test "$(cat /sys/block/vda/queue/logical_block_size)" = 512
test "$(cat /sys/block/vda/queue/physical_block_size)" = 4096
{FIO} --filename=/dev/vda --size=8M --rw=randwrite --bsrange=512-64k --iodepth=16 --cpus_allowed=0-3 \\
    --cpus_allowed_policy=split --offset_increment=8M --numjobs=4 --name=jobs
"""
    with serve(tmp_path, "--size", f"{FLASH_MIB}M", "--set", "vhost.serial=drive 7") as daemon:
        run_guest(job, disk(daemon, qemu, queues=6), qemu=qemu, vcpus=4)  # more queues than the guest has vCPUs
        assert daemon.stats()["transports"]["vhost-user"]["errors"] == 0


def test_discarded_space_goes_back_to_the_flash(tmp_path: Path) -> None:
    qemu = host_qemu()
    job = (
        make_file_system()
        + fill(percent=50)
        + """
sync; echo FILLED; read go
rm /mnt/data; sync; fstrim -v /mnt
echo TRIMMED; read go
umount /mnt; blkdiscard /dev/vda
test "$(blockdev --getro /dev/vda)" = 0
"""
    )
    with serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon, Guest(job, disk(daemon, qemu), qemu=qemu) as guest:
        guest.wait_for("FILLED")
        filled = daemon.stats()["ftl"]["mapped_sectors"]
        guest.send("go")
        guest.wait_for("TRIMMED")
        trimmed = daemon.stats()["ftl"]["mapped_sectors"]
        guest.send("go")
        guest.finish()
        assert filled > 100 * 256
        assert trimmed < 20 * 256
        assert daemon.stats()["ftl"]["mapped_sectors"] == 0


def test_a_read_only_disk_is_read_only_in_the_guest(tmp_path: Path) -> None:
    qemu = host_qemu()
    job = """
test "$(blockdev --getro /dev/vda)" = 1
dd if=/dev/vda of=/dev/null bs=1M count=8
! dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync
"""
    with serve(tmp_path, "--size", "64M", "--read-only") as daemon:
        run_guest(job, disk(daemon, qemu), qemu=qemu)
        assert daemon.stats()["ftl"]["user_sectors_written"] == 0


def test_data_is_there_after_the_guest_reboots(tmp_path: Path) -> None:
    qemu = host_qemu()
    job = """
if [ "$(dd if=/dev/vda bs=6 count=1)" = BOOTED ]; then
    dd if=/dev/vda bs=1M skip=1 count=16 | md5sum; echo SECOND-BOOT; exit 0
fi
dd if=/dev/urandom of=/tmp/data bs=1M count=16; md5sum < /tmp/data; echo FIRST-BOOT
dd if=/tmp/data of=/dev/vda bs=1M seek=1 conv=notrunc
printf BOOTED | dd of=/dev/vda conv=notrunc
sync; reboot -f
"""
    with (
        serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon,
        Guest(job, disk(daemon, qemu), qemu=qemu, reboots=True) as guest,
    ):
        first = guest.wait_for("FIRST-BOOT").split()[-2]
        second = guest.wait_for("SECOND-BOOT").split()[-2]
        guest.wait_until_off()
    assert first == second


def test_a_guest_killed_in_the_middle_of_writes_leaves_a_file_system_that_the_next_guest_mends(
    tmp_path: Path,
) -> None:
    qemu = host_qemu()
    load = f"""
dd if=/dev/urandom of=/mnt/kept bs=1M count=8; md5sum < /mnt/kept; sync; echo LOADED
{FIO} --name=load --directory=/mnt --size=64M --rw=randwrite --bs=4k --iodepth=32 --do_verify=0 --loops=100
"""
    after = """
/sbin/e2fsck -fp /dev/vda || test $? = 1
mount -t ext4 /dev/vda /mnt; md5sum < /mnt/kept
"""
    with serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon:
        with Guest(make_file_system() + load, disk(daemon, qemu), qemu=qemu) as guest:
            before = guest.wait_for("LOADED").split()[-2]
            daemon.wait_for_sectors_written(4096)
        assert before in run_guest(after, disk(daemon, qemu), qemu=qemu)


@QEMUS
def test_io_goes_on_and_verifies_when_the_daemon_is_killed_and_started_again(
    tmp_path: Path, find_qemu: object, packed: bool
) -> None:
    qemu = find_qemu()  # type: ignore[operator]
    load = f"{FIO} --name=load --filename=/dev/vda --size=64M --rw=randwrite --bs=4k --iodepth=32 --fsync=512"
    job = f"""
echo "write through" > /sys/block/vda/cache_type
echo LOAD-STARTS
{load} --rate_iops=2500 --do_verify=0
echo WRITTEN; read go
{load} --verify_only
"""
    with (
        serve(tmp_path, "--size", f"{FLASH_MIB}M", "--store", str(tmp_path / "flash.img")) as daemon,
        Guest(job, disk(daemon, qemu, packed=packed, reconnect=True), qemu=qemu) as guest,
    ):
        guest.wait_for("LOAD-STARTS")
        for _ in range(3):
            daemon.wait_for_sectors_written(2000)
            daemon.kill()
            daemon.start()
        guest.wait_for("WRITTEN")
        daemon.stop()
        daemon.start()
        guest.send("go")
        guest.finish()
        assert daemon.stats()["transports"]["vhost-user"]["errors"] == 0
        daemon.stop()
        assert kept_write_cache(tmp_path / "flash.img") is False  # each daemon went on as the guest had chosen
        daemon.start()


def kept_write_cache(image: Path) -> bool:
    store = open_file(str(image), Geometry())
    try:
        return store.superblock.write_cache
    finally:
        store.close()


def test_a_guest_sees_at_once_that_the_disk_has_another_size_after_a_restart(tmp_path: Path) -> None:
    qemu = host_qemu()
    job = """
small=$(cat /sys/block/vda/size); echo "IS $small"
while test "$(cat /sys/block/vda/size)" = "$small"; do sleep 0.1; done
echo "BECAME $(cat /sys/block/vda/size)"
dd if=/dev/zero of=/dev/vda bs=512 count=8 seek=$(($(cat /sys/block/vda/size) - 8)) conv=fsync
"""
    with (
        serve(tmp_path, "--size", "64M") as daemon,
        Guest(job, disk(daemon, qemu, reconnect=True), qemu=qemu) as guest,
    ):
        guest.wait_for("IS ")
        daemon.kill()
        daemon.start("--size", "128M")
        guest.finish()


def test_memory_that_is_plugged_in_while_the_disk_works_is_mapped(tmp_path: Path) -> None:
    qemu = current_qemu()
    load = f"{FIO} --name=load --filename=/dev/vda --size=24M --rw=randwrite --bs=4k --iodepth=32 --rate_iops=1000"
    job = f"echo LOAD-STARTS; {load} --do_verify=0; {load} --verify_only"
    with (
        serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon,
        Guest(job, [*disk(daemon, qemu), "-m", "slots=2,maxmem=2G"], qemu=qemu) as guest,
        guest.qmp() as qmp,
    ):
        guest.wait_for("LOAD-STARTS")
        daemon.wait_for_sectors_written(1000)
        backend = {"qom-type": "memory-backend-memfd", "id": "more", "share": True, "size": 128 << 20}
        qmp.execute("object-add", **backend)
        qmp.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
        guest.finish()
        assert daemon.stats()["transports"]["vhost-user"]["errors"] == 0


@pytest.mark.parametrize(
    ("find_qemu", "options"),
    [(host_qemu, {}), (current_qemu, {"packed": True, "properties": "inflight-migration=on"})],
    ids=["host", "current-with-inflight-region"],
)
def test_a_guest_saved_under_load_goes_on_in_another_qemu(
    tmp_path: Path, find_qemu: object, options: dict[str, object]
) -> None:
    qemu, state = find_qemu(), tmp_path / "state"  # type: ignore[operator]
    load = f"{FIO} --name=load --filename=/dev/vda --size=24M --rw=randwrite --bs=4k --iodepth=32 --rate_iops=1000"
    job = f"echo LOAD-STARTS; {load} --do_verify=0; {load} --verify_only; echo VERIFIED"
    with serve(tmp_path, "--size", f"{FLASH_MIB}M") as daemon:
        with Guest(job, disk(daemon, qemu, **options), qemu=qemu) as source, source.qmp() as qmp:
            source.wait_for("LOAD-STARTS")
            daemon.wait_for_sectors_written(1000)
            qmp.save_state(state)
            assert "VERIFIED" not in source.console
            qmp.execute("quit")
            source.wait_until_off()
        with Guest(job, disk(daemon, qemu, **options), qemu=qemu, resume_from=state) as target:
            target.finish()
            assert "LOAD-STARTS" not in target.console


def test_a_stock_debian_kernel_uses_the_disk(tmp_path: Path) -> None:
    qemu = current_qemu()
    job = """
/sbin/mkfs.xfs -q -f /dev/vda; mount -t xfs /dev/vda /mnt
dd if=/dev/urandom of=/tmp/data bs=1M count=32; cp /tmp/data /mnt/data; sync
umount /mnt; mount -t xfs /dev/vda /mnt; cmp /tmp/data /mnt/data; umount /mnt
"""
    with serve(tmp_path, "--size", "512M") as daemon:
        run_guest(job, disk(daemon, qemu), qemu=qemu, image=stock_guest(), memory_mib=1024)
