"""Owns the interfaces through which the controller reaches the world; transports and ``_nvme.pyx`` implement
them.

Keeping them here, as protocols, is what lets the controller be tested with a dict for memory and no queue at
all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ocssd_daemon._nvme import MemoryFault

__all__ = ["GuestMemory", "MemoryFault", "QueueShape", "Queues"]


class GuestMemory(Protocol):
    """Bytes of the host, by bus address. Both raise :class:`MemoryFault` and change nothing then."""

    async def read(self, address: int, count_bytes: int) -> bytes: ...

    async def write(self, address: int, data: bytes) -> None: ...


@dataclass(frozen=True)
class QueueShape:
    """Where a queue lies: ``address`` is a bus address, ``entries`` its length, 2 or more."""

    qid: int
    address: int
    entries: int


class Queues(Protocol):
    """The queue pairs. Arguments were checked by the controller; what only memory can tell comes back as
    False.
    """

    def create_cq(self, shape: QueueShape, vector: int, interrupts: bool) -> bool: ...

    def create_sq(self, shape: QueueShape, cqid: int) -> bool: ...

    def delete_sq(self, qid: int) -> None: ...

    def delete_cq(self, qid: int) -> None: ...

    def abort(self, sqid: int, cid: int) -> bool: ...

    def set_shadow_doorbells(self, shadow: int, event_index: int) -> bool: ...

    def set_coalescing(self, threshold: int, time_ns: int) -> None: ...

    def set_vector_coalescing(self, vector: int, disabled: bool) -> None: ...

    def set_dulbe(self, nsid: int, enabled: bool) -> None: ...

    def set_write_cache(self, enabled: bool) -> None: ...

    def set_media_feedback(self, nsid: int, bits: int) -> None: ...

    def set_interrupt_mask(self, mask: int) -> None: ...

    def publish_registers(self, image: bytes) -> None: ...

    def set_page_bytes(self, page_bytes: int) -> None: ...

    def format(self, nsid: int) -> int: ...

    def flush(self) -> None: ...

    def mark_blocks(self, namespace: Any, indices: list[int], state: int) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def error_entries(self) -> list[dict[str, int]]: ...

    def notifications(self) -> list[dict[str, int]]: ...

    def reset(self) -> None: ...
