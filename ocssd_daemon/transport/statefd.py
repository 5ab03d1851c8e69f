"""Owns the descriptors over which device state moves, and the bound on what a peer can make us do with them.

A front end may hand over anything: a pipe whose other end never closes, an endless file, a directory. So
nothing here blocks, and nothing is longer than `STATE_MAX_BYTES`; whatever does not fit into that is an
error.
"""

from __future__ import annotations

import os
from types import TracebackType

STATE_MAX_BYTES = 4096


def write_state(fd: int, data: bytes) -> None:
    """Write *data* at once. Raises ValueError if that is not possible; *fd* stays open."""
    try:
        os.set_blocking(fd, False)
        written = os.write(fd, data)
    except OSError as why:
        raise ValueError(f"device state cannot be written: {why.strerror}") from None
    if written != len(data):
        raise ValueError("device state does not fit the pipe")


class StateFd:
    """Room for one descriptor to read state from; closes it after the read, or at the end of the `with` block."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> StateFd:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def hold(self, fd: int) -> None:
        """Keep a duplicate of *fd*. Raises ValueError if it cannot be read without waiting."""
        self._close()
        self._fd = os.dup(fd)
        try:
            os.set_blocking(self._fd, False)
        except OSError as why:
            raise ValueError(f"device state cannot be read: {why.strerror}") from None

    def read(self) -> bytes:
        """Everything up to the end of file, which must have been reached. Raises ValueError otherwise."""
        try:
            return self._read()
        except OSError as why:
            raise ValueError(f"device state cannot be read: {why.strerror}") from None
        finally:
            self._close()

    def _read(self) -> bytes:
        data = b""
        while chunk := os.read(self._fd, STATE_MAX_BYTES):
            data += chunk
            if len(data) > STATE_MAX_BYTES:
                raise ValueError(f"device state is longer than {STATE_MAX_BYTES} bytes")
        return data

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
