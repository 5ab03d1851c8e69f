"""Owns the pid file: locked from the start, written when the daemon is ready, removed at the end.

As with qemu-storage-daemon: a pid in the file means that everything works, and the lock tells a live owner
from what a dead one left.
"""

from __future__ import annotations

import fcntl
import os


class PidfileError(Exception):
    """The file cannot be had; one line that names it and says why."""


class Pidfile:
    """The locked file at *path*. Raises PidfileError."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = open(path, "a+", encoding="ascii")  # noqa: SIM115 - the lock lives as long as the file is open
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise PidfileError(f"--pidfile {path}: another process has locked it") from None
        except OSError as error:
            raise PidfileError(f"--pidfile {path}: {error.strerror}") from None

    def write(self) -> None:
        """Put our pid in it."""
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def close(self) -> None:
        """Remove it."""
        os.unlink(self._path)
        self._file.close()
