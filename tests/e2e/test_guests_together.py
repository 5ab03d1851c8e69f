"""Two guests at the same time: with a device each, and with two doors to the same flash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ocssd_daemon.nvme.raw20 import DESCRIPTOR
from ocssd_daemon.protocol.nvme.ocssd20 import ChunkState
from tests.e2e.jobs import FIO, PBLK, appear, create_pblk, remove_pblk, show, shown
from tests.e2e.serve import serve_nvme
from tests.kit.guest import Guest, lightnvm_guest, vfio_user, vhost_user_blk
from tests.kit.qemu import current_qemu

pytestmark = pytest.mark.timeout(900)  # several guests share the machine
AREA_MIB = 16


def verified(disk: str, seed: int) -> str:
    """Write random data of *seed*, wait for the host's word, and require that it is still there."""
    fio = f"{FIO} --name=area --filename={disk} --size={AREA_MIB}m --rw=randwrite --bs=4k --iodepth=16"
    fio += f" --randseed={seed}"
    return f"""
dd if=/dev/urandom of=/tmp/mine bs=1M count=4; dd if=/tmp/mine of={disk} bs=1M seek={AREA_MIB} conv=fsync,notrunc
{fio} --do_verify=0
echo WRITTEN; read go
{fio} --verify_only
dd if={disk} bs=1M skip={AREA_MIB} count=4 | cmp - /tmp/mine
"""


def test_two_guests_with_two_daemons_have_nothing_of_each_other(tmp_path: Path) -> None:
    """Raw 2.0 in one, 1.2 in the other; both write the same addresses, one daemon dies, the other goes on."""
    options = {"qemu": current_qemu(), "image": lightnvm_guest(), "memory_mib": 512}
    job = create_pblk(factory=True) + verified(PBLK, 1) + "sync; echo VERIFIED; read go\n" + verified(PBLK, 2)
    longer = f"nvme id-ctrl /dev/nvme0 | grep '^sn *: two'\n{job}{remove_pblk()}"
    with (
        serve_nvme(tmp_path / "one", "--preset", "pblk-20", "--set", "nvme.serial=one") as one,
        serve_nvme(tmp_path / "two", "--preset", "pblk-12", "--set", "nvme.serial=two") as two,
        Guest(job, vfio_user(one.vfio), **options) as first,  # type: ignore[arg-type]
        Guest(longer, vfio_user(two.vfio), **options) as second,  # type: ignore[arg-type]
    ):
        for guest in (first, second):
            guest.wait_for("WRITTEN")
        for guest in (first, second):
            guest.send("go")
        for guest in (first, second):
            guest.wait_for("VERIFIED")
        written = [daemon.stats()["media"]["sectors_written"] for daemon in (one, two)]
        assert min(written) > AREA_MIB * 256

        first.kill()
        one.kill()
        second.send("go")
        second.wait_for("WRITTEN", times=2)
        second.send("go")
        second.finish()
        assert two.stats()["media"]["sectors_written"] > written[1]
        one.start()  # in RAM: a fresh device, which another guest's end does not touch
        assert one.stats()["media"]["sectors_written"] == 0


def test_one_daemon_serves_a_disk_to_one_guest_and_raw_flash_to_another(tmp_path: Path) -> None:
    """The host FTL has PUs 0 to 3; the other guest sees them OFFLINE, cannot take them, and runs pblk on 4 to 7."""
    vhost = tmp_path / "vhost.sock"
    options = {"qemu": current_qemu(), "image": lightnvm_guest(), "memory_mib": 512}
    raw = f"""
{appear("/dev/nvme0n1")}
{show("chunks", "nvme lnvm chunk-log /dev/nvme0n1 -o binary")}
! nvme lnvm create -d nvme0n1 -n theirs -t pblk -b 0 -e 3 -f
! test -e /dev/theirs
{create_pblk(factory=True, first_pu=4)}
{verified(PBLK, 1)}
{remove_pblk()}
"""
    arguments = ("--socket", vhost, "--preset", "pblk-20", "--set", "ftl.pus=0-3")
    with (
        serve_nvme(tmp_path, *arguments) as daemon,
        Guest(verified("/dev/vda", 2), vhost_user_blk(current_qemu(), vhost), **options) as disk,  # type: ignore[arg-type]
        Guest(raw, vfio_user(daemon.vfio), **options) as flash,  # type: ignore[arg-type]
    ):
        for guest in (disk, flash):
            guest.wait_for("WRITTEN")
        for guest in (disk, flash):
            guest.send("go")
        disk.finish()
        said = flash.finish()
        g, stats = daemon.info()["geometry"], daemon.stats()
    states = np.frombuffer(shown(said, "chunks"), DESCRIPTOR)["state"].reshape(g["groups"] * g["pus"], g["chunks"])
    assert (states[:4] == ChunkState.OFFLINE).all()
    assert (states[4:] == ChunkState.FREE).all()
    assert stats["ftl"]["user_sectors_written"] >= AREA_MIB * 256
    assert stats["media"]["sectors_written"] >= stats["ftl"]["flash_sectors_written"] + AREA_MIB * 256
