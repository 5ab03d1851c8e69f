"""Owns the interrupts of one vfio-user client: what SET_IRQS may say, and the eventfds that it brings."""

from __future__ import annotations

import errno
import os

from ocssd_daemon._nvme import NvmeQueues
from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.protocol.vfio_user import wire
from ocssd_daemon.protocol.vfio_user.wire import Irq, SetIrqs
from ocssd_daemon.transport.vfio_pci import irqs


class Refused(Exception):
    """A request that is answered with an errno."""

    def __init__(self, error: int, reason: str) -> None:
        super().__init__(reason)
        self.error = error


class Interrupts:
    """The eventfds that the client gave, by index and vector. Owns them: replaced ones are closed."""

    def __init__(self, config: ControllerConfig, queues: NvmeQueues) -> None:
        self.shapes = irqs(config)
        self._queues = queues
        self._fds: dict[tuple[int, int], int] = {}

    def set(self, body: wire.Record, fds: list[int]) -> None:
        """One SET_IRQS. Takes descriptors out of *fds* when it keeps them. Raises Refused."""
        self._check(body, fds)
        if body.data_kind == SetIrqs.DATA_EVENTFD:
            for offset in range(body.count):
                self._attach(body.index, body.start + offset, fds.pop(0) if fds else -1)
        elif body.action == SetIrqs.ACTION_TRIGGER and body.data_kind == SetIrqs.DATA_NONE and not body.count:
            self._release(body.index)
        elif body.index == Irq.INTX and body.action == SetIrqs.ACTION_UNMASK:
            self._queues.unmask_intx()
        elif body.index == Irq.INTX and body.action == SetIrqs.ACTION_MASK:
            self._queues.mask_intx()

    def _check(self, body: wire.Record, fds: list[int]) -> None:
        shape = self.shapes.get(body.index)
        if shape is None or body.start + body.count > shape.count:
            raise Refused(errno.EINVAL, f"interrupts {body.start}+{body.count} of index {body.index}")
        if body.flags & ~(SetIrqs.DATA_BITS | SetIrqs.ACTION_BITS) or body.data_kind.bit_count() != 1 \
                or body.action.bit_count() != 1:
            raise Refused(errno.EINVAL, f"interrupt flags {body.flags:#x}")
        if body.data_kind == SetIrqs.DATA_BOOL and len(body.data) != body.count:
            raise Refused(errno.EINVAL, f"{len(body.data)} bytes for {body.count} interrupts")
        expected = (0, body.count) if body.data_kind == SetIrqs.DATA_EVENTFD else (0,)
        if len(fds) not in expected:
            raise Refused(errno.EINVAL, f"{len(fds)} descriptors for {body.count} interrupts")

    def _attach(self, index: int, vector: int, fd: int) -> None:
        before = self._fds.pop((index, vector), -1)
        if fd >= 0:
            os.set_blocking(fd, False)
            self._fds[index, vector] = fd
        self._tell(index, vector, fd)
        if before >= 0:
            os.close(before)

    def _tell(self, index: int, vector: int, fd: int) -> None:
        if index == Irq.INTX:
            self._queues.set_intx(fd)
        elif index == Irq.MSIX:
            self._queues.set_msix(True)
            self._queues.set_vector(vector, fd)

    def _release(self, index: int) -> None:
        for key in [key for key in self._fds if key[0] == index]:
            self._attach(*key, -1)
        if index == Irq.MSIX:
            self._queues.set_msix(False)

    def close(self) -> None:
        for index in list(self.shapes):
            self._release(index)
