"""Owns one running guest: a kernel, an initramfs with a job script appended, a QEMU, its console.

The guest image is a directory with `bzImage` and `initrd.gz`, whose /init mounts the usual, brings eth0 up as
10.0.2.15, prints GUEST-UP, runs /job.sh and prints GUEST-DONE rc=N. It holds busybox, fio, mke2fs, e2fsck,
mkfs.xfs, nbd-client and nvme-cli. Any block device under test is the caller's: he passes the QEMU arguments
that attach it.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.kit.qemu import PROJECT, Qemu, accelerator, host_qemu
from tests.kit.qmp import Qmp
from tests.kit.requires import missing
from tools.newc import member, trailer

UP = "GUEST-UP"
DONE = re.compile(r"GUEST-DONE rc=(\d+)\n")
TAIL_LINES = 40
DEFAULT_TIMEOUT_S = 240.0  # a limit for what hangs: an emulated guest on a busy machine takes its time

# The applets of busybox have no links of their own in every image. What the job says on stderr, each of its commands,
# and what the kernel says come to the console only if the job fails: tests read its stdout.
PREAMBLE = """#!/bin/sh
/bin/busybox --install -s /bin 2>/dev/null
dmesg -n 1
exec 2>/tmp/trace
trap 'rc=$?; set +x; [ $rc = 0 ] || { dmesg | tail -n 10; tail -n 30 /tmp/trace; }; exit $rc' EXIT
set -eux
"""


@dataclass(frozen=True)
class GuestImage:
    kernel: Path
    initramfs: Path


class GuestFailure(AssertionError):
    """The guest died, hung, or its job failed; carries the end of the console."""


@functools.cache
def stock_guest() -> GuestImage:
    """An image made from Debian packages, with Debian's own kernel; made on first use, or skip."""
    done = subprocess.run([PROJECT / "tools" / "make-guest"], capture_output=True, text=True)
    if done.returncode:
        missing("a guest image", f"tools/make-guest, which failed here: {done.stderr.strip()}")
    return _image(Path(done.stdout.strip()))


@functools.cache
def any_guest() -> GuestImage:
    """The image that boots quickest: a ready one ($OCSSD_GUEST_DIR, ../shared/guest), else a stock one."""
    return next(filter(None, map(_image_if_there, _ready_directories())), None) or stock_guest()


def lightnvm_guest() -> GuestImage:
    """An image whose kernel has lightnvm and pblk, or skip: making one takes a kernel build."""
    image = next(filter(None, map(_image_if_there, _ready_directories())), None)
    if image is None:
        missing("a guest with lightnvm", "tools/make-lightnvm-guest (a kernel build: 6 to 15 minutes)")
        raise AssertionError("unreachable")
    return image


def _ready_directories() -> list[Path]:
    cache = Path(os.environ.get("OCSSD_CACHE", PROJECT / ".cache"))
    named = os.environ.get("OCSSD_GUEST_DIR")
    return [*([Path(named)] if named else []), PROJECT.parent / "shared" / "guest", cache / "lightnvm-guest"]


def _image(directory: Path) -> GuestImage:
    return GuestImage(directory / "bzImage", directory / "initrd.gz")


def _image_if_there(directory: Path) -> GuestImage | None:
    image = _image(directory)
    return image if image.kernel.exists() and image.initramfs.exists() else None


class Guest:
    """A guest that runs *job*, a shell script, from entry of the context to its exit; the exit kills it by
    its pid.

    *devices* are QEMU arguments. *resume_from* is a state that `Qmp.save_state` made: the guest goes on where
    it was saved, in a machine that must be made alike. Guest memory is a shared memfd, so vhost-user and
    vfio-user peers can map it; not so if *shares_memory* is false.
    """

    def __init__(
        self,
        job: str,
        devices: Sequence[str] = (),
        *,
        qemu: Qemu | None = None,
        image: GuestImage | None = None,
        vcpus: int = 2,
        memory_mib: int = 512,
        network: bool = False,
        reboots: bool = False,
        shares_memory: bool = True,
        resume_from: Path | None = None,
        kernel_args: str = "",
    ) -> None:
        self.qemu = qemu or host_qemu()
        self.image = image or any_guest()
        self._directory = tempfile.TemporaryDirectory(prefix="ocssd-guest-")
        self._devices = [*devices, *(["-nic", "user,model=virtio-net-pci"] if network else [])]
        if resume_from is not None:
            self._devices += ["-incoming", f"exec:cat {resume_from}"]
        self._job = job
        self._qmp_path = Path(self._directory.name) / "qmp"
        self._machine = [
            *("-accel", accelerator(self.qemu, self.image.kernel), "-cpu", "max", "-smp", str(vcpus)),
            *_memory_arguments(memory_mib, shares_memory),
            *("-nodefaults", "-nographic", "-serial", "stdio", *(() if reboots else ("-no-reboot",))),
            *("-kernel", str(self.image.kernel)),
            *("-append", f"console=ttyS0 quiet panic=-1 {kernel_args}".rstrip()),
        ]
        self._console = bytearray()
        self._changed = threading.Condition()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def qmp(self) -> Qmp:
        """A QMP session with this guest's QEMU."""
        return Qmp(self._qmp_path)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def console(self) -> str:
        with self._changed:
            return self._console.decode(errors="replace").replace("\r", "")

    def __enter__(self) -> Guest:
        initramfs = self._initramfs_with_job()
        argv = [self.qemu.path, *self._machine, "-initrd", str(initramfs), *self._devices]
        argv += ["-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._pump = threading.Thread(target=self._read_console, daemon=True)
        self._pump.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._pump.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._directory.cleanup()

    def wait_for(self, text: str, timeout_s: float = DEFAULT_TIMEOUT_S, *, times: int = 1) -> str:
        """Wait until *text* is on the console, *times* times; returns what is before the first of them. A guest that
        ends before that fails.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self._console.count(text.encode()) < times:
                if self._closed:
                    raise self._failure(f"ended before it said {text!r}")
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise self._failure(f"did not say {text!r} within {timeout_s:g} s")
        return self.console.partition(text)[0]

    def send(self, line: str) -> None:
        """Type *line* on the console: the job gets it with `read`."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def finish(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
        """Wait for the job's end and require rc=0; returns what the job printed."""
        before = self.wait_for("GUEST-DONE rc=", timeout_s)
        self.wait_until_off(timeout_s)
        done = DONE.search(self.console)
        if done is None or done.group(1) != "0":
            raise self._failure("the job failed")
        return before.rpartition(UP)[2].strip("\n")

    def kill(self) -> None:
        """SIGKILL for QEMU: the guest's power goes, in the middle of whatever it does."""
        assert self._process is not None
        assert self._process.poll() is None, "it ended by itself"
        self._process.kill()
        self._process.wait()

    def wait_until_off(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Wait for QEMU's exit; returns its exit code."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._failure(f"is not off after {timeout_s:g} s") from None

    def _initramfs_with_job(self) -> Path:
        job = member("job.sh", stat.S_IFREG | 0o755, (PREAMBLE + self._job).encode()) + trailer()
        path = Path(self._directory.name) / "initrd.gz"
        path.write_bytes(self.image.initramfs.read_bytes() + gzip.compress(job))
        return path

    def _read_console(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while chunk := self._process.stdout.read1(65536):  # type: ignore[attr-defined]
            with self._changed:
                self._console += chunk
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _failure(self, what: str) -> GuestFailure:
        tail = "\n".join(self.console.splitlines()[-TAIL_LINES:])
        return GuestFailure(f"guest {what}; the end of its console:\n{tail}")


def _memory_arguments(memory_mib: int, shared: bool) -> list[str]:
    if not shared:
        return ["-m", str(memory_mib), "-machine", "q35"]
    backend = f"memory-backend-memfd,id=mem,size={memory_mib}M,share=on"
    return ["-object", backend, "-m", str(memory_mib), "-machine", "q35,memory-backend=mem"]


def run_guest(job: str, devices: Sequence[str] = (), timeout_s: float = DEFAULT_TIMEOUT_S, **options: object) -> str:
    """Run *job* in a guest to its end; returns what it printed. GuestFailure if it fails or hangs."""
    with Guest(job, devices, **options) as guest:  # type: ignore[arg-type]
        return guest.finish(timeout_s)


def vhost_user_blk(
    qemu: Qemu,
    socket: Path,
    *,
    queues: int = 2,
    packed: bool = False,
    reconnect: bool = False,
    name: str = "disk0",
    properties: str = "",
) -> list[str]:
    """QEMU arguments that attach the vhost-user-blk device served at *socket*; *properties* as QEMU spells them."""
    device = f"vhost-user-blk-pci,id={name},chardev={name}-socket,num-queues={queues}{properties and ','}{properties}"
    chardev = qemu.socket_chardev(f"{name}-socket", socket, reconnect)
    return [*chardev, "-device", device + (",packed=on" if packed else "")]


def vfio_user(socket: Path) -> list[str]:
    """QEMU arguments (10.1 or newer) that attach the PCI device served at *socket*.

    QEMU takes a reply that comes after 5 s for nonsense and gives the device up: too soon on a machine that is busy.
    """
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(socket)}, "x-msg-timeout": 60_000}
    return ["-device", json.dumps(device)]
