"""Owns the choice of QEMU: which binary, what its version can do, which accelerator works here.

Two are used: the host's own, whatever the distribution ships (7.2 on Debian 12), and a current one of 10.1 or
newer (vfio-user-pci), which `tools/make-qemu-root` makes from Debian packages when the host's is older.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.kit.requires import missing, requires

PROJECT = Path(__file__).resolve().parents[2]
VFIO_USER_SINCE = (10, 1)
RECONNECT_MS_SINCE = (9, 2)
KVM_PROBE_SECONDS = 5
KERNEL_ALIVE = b"Linux version"


@dataclass(frozen=True)
class Qemu:
    """One qemu-system-x86_64 binary."""

    path: str
    version: tuple[int, ...]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version[:2]))

    def sibling(self, program: str) -> str:
        """Another program of the same build, such as qemu-img."""
        return str(Path(self.path).with_name(program))

    def socket_chardev(self, name: str, path: Path, reconnect: bool = False) -> list[str]:
        """A chardev that connects to *path*, and again once a second after a loss if *reconnect*."""
        spelling = "reconnect-ms=1000" if self.version >= RECONNECT_MS_SINCE else "reconnect=1"
        return ["-chardev", f"socket,id={name},path={path}" + (f",{spelling}" if reconnect else "")]


def host_qemu() -> Qemu:
    """The distribution's QEMU, or skip."""
    return _probe(requires("qemu-system-x86_64", "qemu-system-x86"))


@functools.cache
def current_qemu() -> Qemu:
    """A QEMU with vfio-user-pci and reconnect-ms: the host's if new enough, else one from Debian packages."""
    own = shutil.which("qemu-system-x86_64")
    if own and _probe(own).version >= VFIO_USER_SINCE:
        return _probe(own)
    root = os.environ.get("OCSSD_QEMU_ROOT") or _make_root()
    return _probe(f"{root}/bin-host/qemu-system-x86_64")


def _make_root() -> str:
    done = subprocess.run([PROJECT / "tools" / "make-qemu-root"], capture_output=True, text=True)
    if done.returncode:
        missing("QEMU 10.1 or newer", f"tools/make-qemu-root, which failed here: {done.stderr.strip()}")
    return done.stdout.strip()


@functools.cache
def _probe(path: str) -> Qemu:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", text)
    assert match, text
    return Qemu(path, tuple(map(int, match.groups())))


@functools.cache
def accelerator(qemu: Qemu, kernel: Path) -> str:
    """The value for -accel: kvm if it boots *kernel* as far as its first line, else tcg.

    /dev/kvm may be there, and open, and yet not run a guest; only trying tells. $OCSSD_ACCEL decides without
    a trial.
    """
    chosen = os.environ.get("OCSSD_ACCEL")
    if chosen is None:
        chosen = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and _kvm_boots(qemu, kernel) else "tcg"
    return "tcg,thread=multi" if chosen == "tcg" else chosen


def _kvm_boots(qemu: Qemu, kernel: Path) -> bool:
    argv = [qemu.path, "-accel", "kvm", "-cpu", "max", "-machine", "q35", "-nodefaults", "-no-reboot"]
    argv += ["-nographic", "-serial", "stdio", "-kernel", str(kernel)]
    argv += ["-append", "console=ttyS0 earlyprintk=serial"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        try:
            return _says(process, KERNEL_ALIVE, time.monotonic() + KVM_PROBE_SECONDS)
        finally:
            process.kill()


def _says(process: subprocess.Popen[bytes], marker: bytes, deadline_s: float) -> bool:
    assert process.stdout is not None
    seen = b""
    while marker not in seen and time.monotonic() < deadline_s and process.poll() is None:
        seen += process.stdout.read() or b""
        time.sleep(0.02)
    return marker in seen
