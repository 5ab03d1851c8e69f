"""Owns one controller's state between commands: registers, which queues exist, features, asynchronous events.

Decode, validate, execute: :meth:`Controller.source` says what data a command brings,
:meth:`Controller.execute` runs it and returns an answer as a value. It is driven by whoever moves the admin
queue's bytes (``admin_queue``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..protocol.nvme.commands import AdminOpcode, IoOpcode, Record
from ..protocol.nvme.logs import ErrorEvent, EventType, Log, event_dword
from ..protocol.nvme.status import Status
from .admin import ADMIN, NOTHING, RAW_ONLY, Source
from .answers import Answer, fail
from .config import ControllerConfig
from .features import reset_features
from .namespaces import KIND_OCSSD20, BlockNamespace, Namespace, RawNamespace
from .ports import QueueShape
from .registers import Registers

MAX_PENDING_EVENTS = 64
FLASH_TIMES_NS = (70_000, 100_000, 1_900_000, 3_500_000, 3_000_000, 3_000_000)
_COMMON_IO = frozenset({IoOpcode.FLUSH, IoOpcode.WRITE, IoOpcode.READ, IoOpcode.DSM, IoOpcode.COMPARE,
                        IoOpcode.WRITE_ZEROES, IoOpcode.VERIFY})
_RAW_IO = frozenset({IoOpcode.VECTOR_RESET, IoOpcode.VECTOR_WRITE, IoOpcode.VECTOR_READ})


def no_foreign_pus(namespaces: Iterable[Namespace]) -> np.ndarray:
    """One False per PU of the widest raw namespace's device."""
    raw = [n for n in namespaces if isinstance(n, RawNamespace)]
    return np.zeros(max((n.media.geometry.groups * n.media.geometry.pus for n in raw), default=0), bool)


class Controller:
    """``queues`` is a :class:`ports.Queues`; ``foreign_pus()`` returns one bool per PU of the device."""

    def __init__(self, config: ControllerConfig, namespaces: list[Namespace], queues: Any, *,
                 foreign_pus: Callable[[], np.ndarray] | None = None,
                 flash_times_ns: tuple[int, ...] = FLASH_TIMES_NS, wear_threshold: int = 0) -> None:
        self.config = config
        self.namespaces = {namespace.nsid: namespace for namespace in namespaces}
        self.queues = queues
        config.lifetime.attach(queues)
        self.foreign_pus = foreign_pus or (lambda: no_foreign_pus(namespaces))
        self.flash_times_ns = flash_times_ns
        self.wear_threshold = wear_threshold
        self.page_bytes = 4096
        self.registers = Registers(config, self._enable, self._disable, self._shutdown,
                                   queues.set_interrupt_mask, queues.publish_registers)
        self.admin_opcodes = self._supported_admin()
        self.io_opcodes = self._supported_io()
        self._forget()
        self.feature_values: dict[tuple[int, int, int], int] = {}
        self.feature_data: dict[tuple[int, int, int], bytes] = {}

    # ---- what there is ------------------------------------------------------------------------------------

    @property
    def has_io_queues(self) -> bool:
        return len(self.sqs) > 0 or len(self.cqs) > 0

    @property
    def capacity_bytes(self) -> int:
        return sum(n.size_lbas * n.lba_bytes for n in self.namespaces.values() if isinstance(n,
                                                                                             BlockNamespace))

    def _supported_admin(self) -> frozenset[int]:
        raw = any(isinstance(n, RawNamespace) for n in self.namespaces.values())
        hidden = frozenset() if raw else RAW_ONLY
        hidden |= frozenset() if self.config.shadow_doorbells else {AdminOpcode.DOORBELL_BUFFER}
        return frozenset(ADMIN) - hidden

    def _supported_io(self) -> frozenset[int]:
        kinds = {n.kind for n in self.namespaces.values()}
        raw = any(isinstance(n, RawNamespace) for n in self.namespaces.values())
        return _COMMON_IO | (_RAW_IO if raw else frozenset()) | (
            frozenset({IoOpcode.VECTOR_COPY}) if KIND_OCSSD20 in kinds else frozenset())

    def exceeds_mdts(self, length_bytes: int) -> bool:
        limit = self.config.max_transfer_bytes
        return bool(limit) and length_bytes > limit

    # ---- enable, disable, shut down ---------------------------------------------------------------------

    def _enable(self, sq: QueueShape, cq: QueueShape, page_bytes: int) -> bool:
        self.page_bytes = page_bytes
        self.queues.set_page_bytes(page_bytes)
        reset_features(self)
        return bool(self.queues.create_cq(cq, 0, True) and self.queues.create_sq(sq, 0))

    def _disable(self) -> None:
        self.queues.reset()
        self._forget()

    def _shutdown(self) -> None:
        self.queues.flush()

    def bus_reset(self) -> None:
        """PCI function-level reset: everything but the flash starts anew."""
        self.registers.reset()
        reset_features(self, all_of_them=True)

    def _forget(self) -> None:
        self.sqs: dict[int, int] = {}               # SQ id → CQ id
        self.cqs: dict[int, set[int]] = {}          # CQ id → its SQs
        self._event_requests: deque[int] = deque()
        self._events: deque[tuple[int, int, int]] = deque()
        self._masked_logs: set[int] = set()
        self.aborted_events: list[int] = []         # CIDs that still need their completion

    # ---- commands -----------------------------------------------------------------------------------------

    def source(self, command: Record) -> Source:
        """What data *command* brings; nothing for one that does not exist."""
        row = ADMIN.get(command.opcode) if command.opcode in self.admin_opcodes and not command.psdt else None
        return row.source(command) if row else NOTHING

    def execute(self, command: Record, data: bytes) -> Answer | None:
        """Run one admin command; None when it completes later."""
        if command.opcode not in self.admin_opcodes:
            return fail(Status.INVALID_OPCODE)
        if command.fuse or command.psdt:            # 4.1, PSDT: over PCIe admin commands use PRPs
            return fail(Status.INVALID_FIELD)
        return ADMIN[command.opcode].run(self, command, data)

    # ---- asynchronous events (5.2) ----------------------------------------------------------------------

    def expect_event(self, cid: int) -> Answer | None:
        if len(self._event_requests) > self.config.aerl:
            return fail(Status.AER_LIMIT)
        self._event_requests.append(cid)
        return None

    def raise_event(self, kind: int, info: int, log: int) -> None:
        """Queue an event, unless one that points to the same log waits to be read already."""
        if log in self._masked_logs or len(self._events) >= MAX_PENDING_EVENTS:
            return
        self._masked_logs.add(log)
        self._events.append((kind, info, log))

    def event_seen(self, log: int) -> None:
        """The host has read *log* without Retain: events for it may be raised again."""
        self._masked_logs.discard(log)

    def doorbell_error(self, *, register: bool) -> None:
        info = ErrorEvent.INVALID_DOORBELL_REGISTER if register else ErrorEvent.INVALID_DOORBELL_VALUE
        self.raise_event(EventType.ERROR, info, Log.ERROR)

    def chunk_notice(self) -> None:
        self.raise_event(EventType.VENDOR, 0, Log.CHUNK_NOTIFICATION)

    def take_events(self) -> list[tuple[int, int]]:
        """``(cid, dw0)`` of every Asynchronous Event Request that can be completed now."""
        done = []
        while self._events and self._event_requests:
            done.append((self._event_requests.popleft(), event_dword(*self._events.popleft())))
        return done

    def abort_event(self, cid: int) -> bool:
        """An aborted Asynchronous Event Request is forgotten; ``admin_queue`` completes it."""
        if cid not in self._event_requests:
            return False
        self._event_requests.remove(cid)
        self.aborted_events.append(cid)
        return True
