"""The controller is a working NVMe device to a current kernel (Debian's 6.12) and its nvme-cli, over vfio-user."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ocssd_daemon.nvme.raw20 import DESCRIPTOR
from ocssd_daemon.protocol.nvme import ocssd20
from ocssd_daemon.protocol.nvme.identify import IdentifyController, IdentifyNamespace
from ocssd_daemon.protocol.nvme.logs import EffectsLog, ErrorEntry, SmartLog
from ocssd_daemon.protocol.nvme.ocssd20 import ChunkState
from tests.e2e.jobs import (
    FIO,
    PBLK,
    appear,
    check_file_system,
    churn,
    create_pblk,
    fill,
    make_file_system,
    remove_pblk,
    show,
    shown,
)
from tests.e2e.serve import serve_nvme
from tests.kit.guest import GuestImage, lightnvm_guest, run_guest, stock_guest, vfio_user
from tests.kit.qemu import current_qemu

# Namespaces 1 and 2 of a device with both. The kernel looks for them in parallel, so the names may be swapped.
RAW, DISK = "$raw", "$disk"
FIND = """
of() { for name in $(grep -lx $1 /sys/block/nvme0n*/nsid); do echo /dev/$(basename $(dirname $name)); done; }
until raw=$(of 1); disk=$(of 2); test -b "$raw" && test -b "$disk"; do sleep 0.05; done
"""
BOTH = ("--set", "nvme.namespaces=ocssd20,block", "--set", "ftl.pus=4-7")
OUT_OF_ORDER = 0x42F2  # write not at the write pointer, Do Not Retry
MISCOMPARE = 0x4285
TEMPERATURE_KELVIN = 0x150


def vector(opcode: int, lba: int, data: str = "") -> str:
    """One OCSSD 2.0 vector command (90h reset, 91h write, 92h read) with one address, from user space."""
    return f"nvme io-passthru {RAW} --opcode={opcode:#x} --namespace-id=1 --cdw10={lba} --cdw12=0 {data}"


WRITE = "--write --data-len=4096 --input-file="
READ = "--read --data-len=4096 --raw-binary"
OOB = "--metadata-len=16 --metadata="
COMMANDS = f"""{FIND}
{show("controller", "nvme id-ctrl /dev/nvme0 -b")}
{show("raw", f"nvme id-ns {RAW} -b")}
{show("disk", f"nvme id-ns {DISK} -b")}
nvme list-ns /dev/nvme0; nvme list
{show("geometry", "nvme admin-passthru /dev/nvme0 --opcode=0xe2 --namespace-id=1 --data-len=4096 --read -b")}

yes one | head -c 4096 > /tmp/one; yes two | head -c 4096 > /tmp/two; yes oob | head -c 16 > /tmp/oob
{vector(0x91, 0, WRITE + "/tmp/one " + OOB + "/tmp/oob")}
{vector(0x91, 1, WRITE + "/tmp/two")}
{vector(0x92, 0, READ + " " + OOB + "/tmp/oob-back")} > /tmp/back; cmp /tmp/back /tmp/one
{vector(0x92, 1, READ)} > /tmp/back; cmp /tmp/back /tmp/two
! {vector(0x91, 9, WRITE + "/tmp/one")} 2> /tmp/refused
{show("refused", "cat /tmp/refused")}
{show("chunks-written", "nvme get-log /dev/nvme0 --namespace-id=1 --log-id=0xca --log-len=64 -b")}
{vector(0x90, 0)}
{vector(0x92, 0, READ)} > /tmp/back; head -c 4096 /dev/zero | cmp /tmp/back -
{show("chunks-reset", "nvme get-log /dev/nvme0 --namespace-id=1 --log-id=0xca --log-len=64 -b")}

! nvme compare {DISK} --namespace-id=2 -s 0 -c 0 -z 512 -d /tmp/one
{show("smart", "nvme smart-log /dev/nvme0 -b")}
{show("errors", "nvme error-log /dev/nvme0 -e 2 -b")}
nvme fw-log /dev/nvme0
{show("effects", "nvme get-log /dev/nvme0 --log-id=5 --log-len=4096 -b")}
nvme effects-log /dev/nvme0 --csi=0
nvme set-feature /dev/nvme0 -f 4 --value={TEMPERATURE_KELVIN:#x}
nvme get-feature /dev/nvme0 -f 4
nvme set-feature /dev/nvme0 -n 1 -f 5 --value=0x10000
nvme get-feature /dev/nvme0 -n 1 -f 5; nvme get-feature /dev/nvme0 -n 2 -f 5
! {vector(0x92, 0, READ)}
nvme set-feature /dev/nvme0 -n 1 -f 5 --value=0

dd if=/tmp/one of={DISK} oflag=direct bs=4k; nvme flush {DISK} -n 2
nvme compare {DISK} --namespace-id=2 -s 0 -c 7 -z 4096 -d /tmp/one
nvme format {DISK} --force
dd if={DISK} iflag=direct bs=4k count=1 > /tmp/back; head -c 4096 /dev/zero | cmp /tmp/back -
nvme reset /dev/nvme0
{FIND}
! nvme subsystem-reset /dev/nvme0
nvme verify {DISK} -n 2 -s 0 -c 7; nvme write-zeroes {DISK} -n 2 -s 0 -c 7; nvme dsm {DISK} -n 2 -d -s 0 -b 8
"""


def test_nvme_cli_of_a_current_kernel_gets_true_answers_and_the_block_namespace_is_a_disk(tmp_path: Path) -> None:
    job = f"""
{COMMANDS}
{make_file_system(DISK)} {fill(percent=40)} {churn(mib=8)}
rm /mnt/data; fstrim /mnt
{check_file_system(DISK)}
blkdiscard {DISK}
"""
    # ws_min 1: a list of several addresses lies at a bus address, which user space cannot know.
    arguments = ("--size", "256M", "--set", "geometry.ws_min=1", "--set", "geometry.mw_cunits=0", *BOTH)
    with serve_nvme(tmp_path, *arguments) as daemon:
        said = run_guest(job, vfio_user(daemon.vfio), qemu=current_qemu(), image=stock_guest(), memory_mib=1024)
        info, stats = daemon.info(), daemon.stats()
    g, nvme = info["geometry"], info["settings"]["nvme"]

    controller = IdentifyController.parse(shown(said, "controller"))
    assert (controller.vid, controller.nn, controller.mdts) == (nvme["vid"], 2, nvme["mdts"])
    assert (controller.sn.decode().strip(), controller.mn.decode().strip()) == (nvme["serial"], nvme["model"])
    raw, disk = (IdentifyNamespace.parse(shown(said, name)) for name in ("raw", "disk"))
    assert (raw.vs0, 1 << raw.lbaf[0].lbads, raw.lbaf[0].ms) == (1, g["sector_bytes"], g["oob_bytes"])
    assert (disk.vs0, 1 << disk.lbaf[0].lbads, disk.nsze) == (0, 512, info["disk"]["size_bytes"] // 512)

    geometry = ocssd20.Geometry.parse(shown(said, "geometry"))
    assert (geometry.major, geometry.num_grp, geometry.num_pu, geometry.num_chk, geometry.clba, geometry.ws_min) == (
        2, g["groups"], g["pus"], g["chunks"], g["sectors"], 1)  # fmt: skip
    assert f"{OUT_OF_ORDER:#x}" in shown(said, "refused").decode()
    written, reset = (np.frombuffer(shown(said, name), DESCRIPTOR) for name in ("chunks-written", "chunks-reset"))
    assert [(c["state"], c["wp"]) for c in written] == [(ChunkState.OPEN, 2), (ChunkState.FREE, 0)]
    assert (reset[0]["state"], reset[0]["wp"]) == (ChunkState.FREE, 0)

    smart = SmartLog.parse(shown(said, "smart"))
    assert smart.host_writes >= 2
    assert smart.error_entries == 2
    errors = [ErrorEntry.parse(shown(said, "errors")[at : at + 64]) for at in (0, 64)]
    assert [entry.status_phase >> 1 for entry in errors] == [MISCOMPARE, OUT_OF_ORDER]
    assert (errors[1].lba, errors[1].nsid) == (9, 1)

    effects = EffectsLog.parse(shown(said, "effects"))
    assert {opcode for opcode, bits in enumerate(effects.io) if bits} >= {0x00, 0x01, 0x02, 0x90, 0x91, 0x92, 0x93}

    assert f"Current value:{TEMPERATURE_KELVIN:#010x}" in said
    assert re.findall(r"get-feature:0x05 .*value:(?:0x)?(\w+)", said) == ["00010000", "00000000"]
    assert stats["ftl"]["user_sectors_written"] > 8 * 256
    assert stats["ftl"]["mapped_sectors"] == 0, "blkdiscard has taken all"


# Resets, interrupts, doorbells.

VARIANTS = pytest.mark.parametrize(
    ("find_image", "settings", "kernel_args", "interrupts"),
    [
        (stock_guest, (), "", "PCI-MSI"),
        (lightnvm_guest, ("nvme.shadow_doorbells=false",), "pci=nomsi", "IO-APIC"),
        (lightnvm_guest, ("nvme.doorbells=mapped",), "", "PCI-MSI"),
    ],
    ids=["6.12-shadow-msix", "5.10-trapped-intx", "5.10-mapped-msix"],
)
LOAD = f"{FIO} --name=load --filename=/dev/nvme0n1 --size=8m --bs=4k --iodepth=32"


def hot_job(interrupts: str) -> str:
    return f"""
{appear("/dev/nvme0n1")}
bus=/sys/bus/pci; address=$(basename $(readlink /sys/class/nvme/nvme0/device))
uses_right_interrupts() {{ grep nvme0q /proc/interrupts > /tmp/lines; ! grep -v {interrupts} /tmp/lines; }}
writes() {{ read _ _ _ _ count _ < /sys/block/nvme0n1/stat; }}
start_load() {{ {LOAD} --rw=randwrite --time_based --runtime=3600 --do_verify=0 > /tmp/load 2>&1 & load=$!; }}
go_on() {{ # until 256 more writes are done
    writes; goal=$((count + 256))
    while writes; test $count -lt $goal; do kill -0 $load; sleep 0.05; done
}}
verify() {{
    {FIO} --name=mixed --filename=/dev/nvme0n1 --offset=16m --size=4m --rw=randwrite --bsrange=512-64k --iodepth=16
}}

uses_right_interrupts
{LOAD} --rw=write --do_verify=0
start_load
for kind in bus controller bus controller; do
    go_on
    case $kind in
    bus) echo 1 > $bus/devices/$address/reset;;
    controller) nvme reset /dev/nvme0;;
    esac
done
go_on
kill $load; wait $load || true
grep 'err= 0' /tmp/fio
{LOAD} --rw=read
verify

start_load; go_on
echo 1 > $bus/devices/$address/remove # under the load, which loses its disk
wait $load || true
! test -e /dev/nvme0n1
echo 1 > $bus/rescan
{appear("/dev/nvme0n1")}
{LOAD} --rw=read
verify
uses_right_interrupts
"""


@VARIANTS
def test_resets_and_hot_removal_under_io_lose_nothing(
    tmp_path: Path,
    find_image: Callable[[], GuestImage],
    settings: Sequence[str],
    kernel_args: str,
    interrupts: str,
) -> None:
    assignments = [word for setting in ("nvme.namespaces=block", *settings) for word in ("--set", setting)]
    with serve_nvme(tmp_path, "--size", "64M", *assignments) as daemon:
        options = {"qemu": current_qemu(), "image": find_image(), "kernel_args": kernel_args, "memory_mib": 768}
        run_guest(hot_job(interrupts), vfio_user(daemon.vfio), **options)
        assert daemon.stats()["transports"]["vfio-user"]["errors"] == 0


# A guest whose memory is its own: every transfer is a message.


def test_a_current_kernel_without_shared_memory_has_a_disk(tmp_path: Path) -> None:
    job = f"""
{appear("/dev/nvme0n1")}
{make_file_system("/dev/nvme0n1")} {fill(percent=20)} {churn(mib=2)} {check_file_system("/dev/nvme0n1")}
"""
    with serve_nvme(tmp_path, "--size", "64M", "--set", "nvme.namespaces=block") as daemon:
        options = {"qemu": current_qemu(), "image": stock_guest(), "memory_mib": 768, "shares_memory": False}
        run_guest(job, vfio_user(daemon.vfio), **options)
        stats = daemon.stats()
    assert stats["ftl"]["user_sectors_written"] > 2 * 256
    assert stats["transports"]["vfio-user"]["errors"] == 0


def test_lightnvm_without_shared_memory_has_pblk_beside_the_disk(tmp_path: Path) -> None:
    """Also two owners of one flash in one guest: the host FTL has PUs 0 to 3 and serves namespace 2, pblk the rest."""
    job = f"""
{appear("/dev/nvme0n2")}
{create_pblk(factory=True, first_pu=4)}
{FIO} --name=pblk --filename={PBLK} --size=4m --rw=randwrite --bs=4k --iodepth=8
{FIO} --name=disk --filename=/dev/nvme0n2 --size=4m --rw=randwrite --bs=4k --iodepth=8
{remove_pblk()} {create_pblk(factory=False, first_pu=4)}
{FIO} --name=pblk --filename={PBLK} --size=4m --rw=randwrite --bs=4k --iodepth=8 --verify_only
"""
    arguments = ("--preset", "pblk-20", "--set", "nvme.namespaces=ocssd20,block", "--set", "ftl.pus=0-3")
    with serve_nvme(tmp_path, *arguments) as daemon:
        options = {"qemu": current_qemu(), "image": lightnvm_guest(), "memory_mib": 512, "shares_memory": False}
        run_guest(job, vfio_user(daemon.vfio), **options)
        stats = daemon.stats()
    assert stats["ftl"]["user_sectors_written"] >= 1024
    assert stats["media"]["sectors_written"] >= stats["ftl"]["flash_sectors_written"] + 1024
