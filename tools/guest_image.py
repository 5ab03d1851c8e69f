"""Owns the guest's initramfs: which programs it holds, its /init, and the modules that /init loads.

Everything is picked out of a directory of unpacked Debian packages: programs with the libraries that the
directory's own dynamic linker names, kernel modules with the modules that their .modinfo names. Result:
`bzImage` and `initrd.gz`, the pair that tests/kit/guest.py boots.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from debian_packages import PackagesError
from newc import tree

PACKAGES = ("busybox-static", "fio", "e2fsprogs", "xfsprogs", "nbd-client", "nvme-cli")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
# ceph: where librbd, which fio links, looks for its own libraries.
LIBRARY_FOLDERS = (".", "ceph")
LOADER = "ld-linux-x86-64.so.2"

# Place in the guest: where Debian has it, below /usr.
PROGRAMS = {
    "bin/busybox": "bin/busybox",
    "usr/bin/fio": "bin/fio",
    "sbin/mke2fs": "sbin/mke2fs",
    "sbin/e2fsck": "sbin/e2fsck",
    "sbin/mkfs.xfs": "sbin/mkfs.xfs",
    "sbin/nbd-client": "sbin/nbd-client",
    "usr/sbin/nvme": "sbin/nvme",
}

# What a test attaches. A name that the kernel has built in has no file and needs none.
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "nbd",
    "nvme",
    "nvme-tcp",
    "ext4",
    "crc32c_generic",
    "xfs",
)

INIT = """#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
stty -onlcr
[ ! -e /modules/order ] || while read module; do insmod /modules/$module; done < /modules/order
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
fi
echo GUEST-UP; sh /job.sh; echo "GUEST-DONE rc=$?"
sync; poweroff -f
"""
DIRECTORIES = (
    "bin",
    "sbin",
    "usr/bin",
    "usr/sbin",
    "proc",
    "sys",
    "dev",
    "tmp",
    "mnt",
    "lib64",
    "modules",
    "etc",
)


def make_image(packages: Path, kernel: Path, modules: Path | None, target: Path) -> None:
    """Write bzImage and initrd.gz into *target*; *modules* is None for a kernel that has all built in."""
    staging = target / "initrd"
    for name in (*DIRECTORIES, LIBRARIES):
        (staging / name).mkdir(parents=True, exist_ok=True)
    (staging / "init").write_text(INIT)
    (staging / "init").chmod(0o755)
    _copy_programs(packages, staging)
    if modules is not None:
        _copy_modules(modules, staging / "modules")
    shutil.copy(kernel, target / "bzImage")
    (target / "initrd.gz").write_bytes(gzip.compress(b"".join(tree(staging)), compresslevel=6))
    shutil.rmtree(staging)


def _copy_programs(packages: Path, staging: Path) -> None:
    needed: set[Path] = set()
    for place, origin in PROGRAMS.items():
        program = packages / "usr" / origin
        shutil.copy(program, staging / place)
        needed |= _libraries_of(packages, program)
    for library in needed:
        (staging / LIBRARIES / library).parent.mkdir(exist_ok=True)
        shutil.copy(packages / LIBRARIES / library, staging / LIBRARIES / library)
    shutil.copy(_loader(packages), staging / "lib64" / LOADER)


def _loader(packages: Path) -> Path:
    return (packages / LIBRARIES / LOADER).resolve()


def _libraries_of(packages: Path, program: Path) -> set[Path]:
    """The shared libraries that *program* loads, relative to LIBRARIES; a static program has none."""
    search = ":".join(str(packages / LIBRARIES / folder) for folder in LIBRARY_FOLDERS)
    listing = [str(_loader(packages)), "--library-path", search, "--list", str(program)]
    text = subprocess.run(listing, capture_output=True, text=True).stdout
    if "not found" in text:
        raise PackagesError(f"{program.name} lacks a library: {text.strip()}")
    paths = map(Path, re.findall(r"=> (/\S+)", text))
    return {path.relative_to(packages / LIBRARIES) for path in paths if path.name != LOADER}


def _copy_modules(modules: Path, target: Path) -> None:
    """Copy MODULES and what they depend on, uncompressed, and write the order in which to load them."""
    by_name = {_module_name(path): path for path in modules.rglob("*.ko*")}
    order: list[str] = []
    for name in MODULES:
        _add_module(name.replace("-", "_"), by_name, target, order)
    (target / "order").write_text("".join(f"{name}.ko\n" for name in order))


def _add_module(name: str, by_name: dict[str, Path], target: Path, order: list[str]) -> None:
    if name in order or name not in by_name:
        return
    data = _uncompressed(by_name[name])
    for dependency in _dependencies(data):
        _add_module(dependency, by_name, target, order)
    (target / f"{name}.ko").write_bytes(data)
    order.append(name)


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _uncompressed(path: Path) -> bytes:
    return lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()


def _dependencies(module: bytes) -> Sequence[str]:
    """Module names in the "depends=" entry of the .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [] if match is None else [name.replace("-", "_") for name in _names(match.group(1))]


def _names(comma_separated: bytes) -> Iterable[str]:
    return filter(None, comma_separated.decode().split(","))
