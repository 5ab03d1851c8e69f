"""Owns the shell that runs inside guests: pieces of a job that several tests share.

A job runs under `set -eu`: any program that fails ends it, and the test with it.
"""

from __future__ import annotations

# fio's exit code tells a failed verification; its report and its progress line would only clutter the console.
FIO = "fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0"
FIO += " --eta=never --output=/tmp/fio"


def make_file_system(device: str = "/dev/vda") -> str:
    """ext4 on *device*, mounted on /mnt."""
    return f"""
/sbin/mke2fs -q -t ext4 -F -E lazy_itable_init=0 {device}
mount -t ext4 {device} /mnt
"""


def fill(percent: int) -> str:
    """Write /mnt/data, *percent* of the free space, sequentially; its size stays in $size_kib."""
    return f"""
size_kib=$(df -k /mnt | awk 'END {{ print int($4 * {percent} / 100 / 128) * 128 }}')
{FIO} --name=fill --filename=/mnt/data --size=${{size_kib}}k --rw=write --bs=128k --iodepth=8 --do_verify=0
"""


def churn(mib: int) -> str:
    """Overwrite *mib* MiB of /mnt/data in random 4 KiB writes, verifying each soon after it was written."""
    return f"""
{FIO} --name=churn --filename=/mnt/data --size=${{size_kib}}k --io_size={mib}M --rw=randwrite --bs=4k --iodepth=32 \\
    --verify_backlog=1024
"""


def check_file_system(device: str = "/dev/vda") -> str:
    """Unmount, and require that e2fsck finds nothing to mend."""
    return f"""
umount /mnt
/sbin/e2fsck -fn {device}
"""
