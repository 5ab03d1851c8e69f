"""Owns the command lines that a user pastes to attach the disk. Each works as it stands."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

GUEST_MEMORY = "1G"


def qemu_line(socket: str) -> str:
    """A stock QEMU with the disk as /dev/vda: vhost-user needs the guest's memory to be shared with us."""
    path = socket.replace(",", ",,")  # QEMU's way to quote a comma inside an option
    return " ".join(
        [
            "qemu-system-x86_64",
            "-machine q35,accel=kvm:tcg,memory-backend=mem",
            f"-m {GUEST_MEMORY} -object memory-backend-memfd,id=mem,size={GUEST_MEMORY},share=on",
            f"-chardev {shlex.quote(f'socket,id=ocssd,path={path}')}",
            "-device vhost-user-blk-pci,chardev=ocssd",
            "-nographic",
        ]
    )


def vfio_line(socket: str) -> str:
    """QEMU 10.1 or newer with the controller as a PCI device; guest memory must be shared to be fast."""
    device = json.dumps({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": socket}})
    return " ".join(
        [
            "qemu-system-x86_64",
            "-machine q35,accel=kvm:tcg,memory-backend=mem",
            f"-m {GUEST_MEMORY} -object memory-backend-memfd,id=mem,size={GUEST_MEMORY},share=on",
            f"-device {shlex.quote(device)}",
            "-nographic",
        ]
    )


def client() -> str:
    """How this shell starts ``ocssd``: with its directory when that is not on the PATH, as in a virtual environment."""
    beside = Path(sys.executable).with_name("ocssd")
    return shlex.quote(str(beside)) if shutil.which("ocssd") is None and beside.exists() else "ocssd"


# By the names that --run exports; the order is the order on the screen.
SECTIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "socket": ("QEMU (add your guest's own -drive, -cdrom or -kernel):", qemu_line),
    "uri": ("NBD clients (nbdinfo, nbdcopy, qemu-img, fio, nbd-client):", shlex.quote),
    "vfio": ("QEMU 10.1 or newer, for the NVMe controller:", vfio_line),
    "ctl": ("ocssd:", lambda path: f"{client()} --control {shlex.quote(path)} stats"),
}


def attach_text(environment: dict[str, str]) -> str:
    """All lines, under headings."""
    parts = [
        f"{heading}\n  {line(environment[name])}" for name, (heading, line) in SECTIONS.items() if name in environment
    ]
    return "\n\n" + "\n\n".join(parts) + "\n\nCtrl-C stops it.\n"
