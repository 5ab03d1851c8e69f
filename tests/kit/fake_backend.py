"""Owns a stand-in for the rings of a vhost-user session: it records calls and refuses what it is told to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ocssd_daemon.protocol.vhost_user.wire import Feature, VirtioBlkConfig

FEATURES = (
    Feature.SEG_MAX
    | Feature.BLK_SIZE
    | Feature.FLUSH
    | Feature.CONFIG_WCE
    | Feature.MQ
    | Feature.LOG_ALL
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.VERSION_1
    | Feature.RING_PACKED
)


def blk_config(capacity_sectors: int, wce: int = 1) -> bytes:
    """A struct virtio_blk_config in which everything else is zero."""
    blank = VirtioBlkConfig.parse(bytes(VirtioBlkConfig.sizeof()))
    return VirtioBlkConfig.build({**blank, "capacity_sectors": capacity_sectors, "wce": wce})


@dataclass
class FakeBackend:
    """Satisfies `Backend`; see `calls` for what the session asked, put a sentence into `refuse` to say no."""

    device_features: int = int(FEATURES)
    capacity_sectors: int = 2048
    wce: int = 1
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)
    broken_rings: dict[int, str] = field(default_factory=dict)
    bases: dict[int, int] = field(default_factory=dict)
    closed: bool = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: self._record(name, *args)

    def _record(self, name: str, *args: Any) -> None:
        if name in self.refuse:
            raise ValueError(self.refuse[name])
        self.calls.append((name, *args))

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of each call of *name*."""
        return [call[1:] for call in self.calls if call[0] == name]

    def config(self) -> bytes:
        return blk_config(self.capacity_sectors, self.wce)

    def set_wce(self, wce: int) -> None:
        self._record("set_wce", wce)
        self.wce = wce

    def vring_base(self, index: int, value: int) -> None:
        self._record("vring_base", index, value)
        self.bases[index] = value

    def vring_get_base(self, index: int) -> int:
        self._record("vring_get_base", index)
        return self.bases.get(index, 0)

    def inflight_get(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        self._record("inflight_get", num_queues, queue_size)
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, 4096)
        return fd, 4096, 0

    def broken(self, index: int) -> bool:
        return index in self.broken_rings

    def fault(self, index: int) -> str | None:
        return self.broken_rings.get(index)

    def stats(self) -> dict[str, int]:
        return {"requests": 0, "errors": 0, "bytes_read": 0, "bytes_written": 0}

    def close(self) -> None:
        self._record("close")
        self.closed = True
