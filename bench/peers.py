"""Owns the peers: how each stock server is started so that the comparison is fair. Knows no goal."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.programs import find, server

TMPFS = Path("/dev/shm")
QUEUES = 4


def _storage_daemon(blockdev: str, socket: Path) -> list[str]:
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={QUEUES}"
    program = find("qemu-storage-daemon", "qemu-system-common")
    return [
        program,
        "--blockdev",
        f"{blockdev},node-name=disk",
        "--export",
        f"{export},addr.type=unix,addr.path={socket}",
    ]


@contextlib.contextmanager
def null_co(directory: Path, size_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-storage-daemon on null-co: answers every request and moves no data."""
    socket = directory / "null-co.sock"
    blockdev = f"driver=null-co,size={size_bytes},read-zeroes=off"
    with server(_storage_daemon(blockdev, socket), socket) as process:
        yield process


@contextlib.contextmanager
def tmpfs_file(directory: Path, size_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-storage-daemon on a fully allocated tmpfs file with io_uring; the file goes at the end."""
    socket = directory / "tmpfs.sock"
    file = TMPFS / f"ocssd-bench-{os.getpid()}.img"
    try:
        with file.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, size_bytes)
        with server(_storage_daemon(f"driver=file,filename={file},aio=io_uring", socket), socket) as process:
            yield process
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def nbdkit_memory(directory: Path, size_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit's memory plugin on a Unix socket."""
    socket = directory / "nbdkit.sock"
    command = [find("nbdkit", "nbdkit"), "--foreground", "--unix", str(socket), "memory", str(size_bytes)]
    with server(command, socket) as process:
        yield process
