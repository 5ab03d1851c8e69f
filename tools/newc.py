"""Owns one format: the "newc" cpio archive that Linux takes as initramfs (kernel Documentation,
driver-api/early-userspace/buffer-format).

Archives may be appended to each other: the kernel unpacks all of them in order.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

TRAILER = "TRAILER!!!"
ALIGN_BYTES = 4


def member(name: str, mode: int, data: bytes = b"", inode: int = 0) -> bytes:
    """One archive member; *mode* holds the file type as st_mode does; a symlink's *data* is its target."""
    path = name.encode() + b"\0"
    #         ino    mode  uid gid nlink mtime size       devmajor/minor, rdevmajor/minor, namesize, check
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(data)


def trailer() -> bytes:
    return member(TRAILER, 0)


def tree(root: Path) -> Iterable[bytes]:
    """The members of everything below *root*, in an order in which parents come first."""
    for inode, path in enumerate(sorted(root.rglob("*")), start=1):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            data = str(path.readlink()).encode()
        elif stat.S_ISREG(status.st_mode):
            data = path.read_bytes()
        else:
            data = b""
        yield member(str(path.relative_to(root)), status.st_mode, data, inode)
    yield trailer()


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGN_BYTES)
