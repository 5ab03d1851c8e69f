"""Owns the shell that runs inside guests: pieces of a job that several tests share.

A job runs under `set -eu`: any program that fails ends it, and the test with it.
"""

from __future__ import annotations

import gzip
import hashlib
import re

# fio's exit code tells a failed verification; its report and its progress line would only clutter the console.
FIO = "fio --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --verify_state_save=0"
FIO += " --eta=never --output=/tmp/fio"


def appear(device: str) -> str:
    """Wait for *device*: drivers look for their disks in the background."""
    return f"until test -b {device}; do sleep 0.05; done\n"


def make_file_system(device: str = "/dev/vda") -> str:
    """ext4 on *device*, mounted on /mnt; no blocks are kept for root, so that it can be filled."""
    return f"""
/sbin/mke2fs -q -t ext4 -F -m 0 -E lazy_itable_init=0 {device}
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


# pblk, Linux's FTL in the guest, over the flash of an Open-Channel namespace.

PBLK = "/dev/pblk0"


def create_pblk(*, factory: bool, first_pu: int = 0, last_pu: int = 7) -> str:
    """A disk over these parallel units: a new one or, if not *factory*, the one that the flash holds."""
    which = f"-b {first_pu} -e {last_pu} {'-f' if factory else ''}"
    return f"{appear('/dev/nvme0n1')}nvme lnvm create -d nvme0n1 -n pblk0 -t pblk {which}\ntest -b {PBLK}\n"


def remove_pblk() -> str:
    return "nvme lnvm remove -n pblk0\n"


# What a guest has read comes to the host, byte by byte, as one line of the console.


def show(name: str, command: str) -> str:
    """Run *command*; its output goes to the host, which takes it out of the console with `shown`."""
    return f"""
{command} > /tmp/shown
echo "<{name} $(gzip -c /tmp/shown | hexdump -v -e '1/1 "%02x"')>"
"""


def shown(console: str, name: str) -> bytes:
    """What the job showed as *name*."""
    found = re.search(rf"<{name} ([0-9a-f]+)>", console)
    assert found, f"{name} is not on the console:\n{console[-2000:]}"
    return gzip.decompress(bytes.fromhex(found.group(1)))


# A ledger: blocks whose content is their number, each synced before the guest says so. It tells after a crash
# whether what was promised is there.

LEDGER_BYTES = 64 << 10
_SYNCED = re.compile(r"SYNCED (\d+)\n")


def keep_ledger(path: str, first: int | str = 0) -> str:
    """Append blocks to *path* for ever, from number *first* on (a number or a shell variable)."""
    return f"""
n={first}
while :; do
    yes $n | head -c {LEDGER_BYTES} > /tmp/block
    dd if=/tmp/block of={path} bs={LEDGER_BYTES} seek=$n conv=fsync,notrunc
    n=$((n + 1)); echo "SYNCED $n"
done
"""


def sum_ledger(path: str, blocks: int | str) -> str:
    """Say the checksum of the first *blocks* (a number or a shell variable) of the ledger."""
    return f'echo "LEDGER $(dd if={path} bs={LEDGER_BYTES} count={blocks} | md5sum)"\n'


def synced(console: str) -> int:
    """How many blocks the guest has promised."""
    return max((int(number) for number in _SYNCED.findall(console)), default=0)


def ledger_line(blocks: int) -> str:
    """The line that `sum_ledger` prints if the first *blocks* are as they were written."""
    digest = hashlib.md5()
    for number in range(blocks):
        line = f"{number}\n".encode()
        digest.update((line * (LEDGER_BYTES // len(line) + 1))[:LEDGER_BYTES])
    return f"LEDGER {digest.hexdigest()}"
