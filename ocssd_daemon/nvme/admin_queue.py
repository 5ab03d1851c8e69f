"""Owns the life of one admin command: fetch, gather its data, execute, scatter the answer, complete.

``ring`` is the admin queue pair (``_nvme.pyx``): ``fetch()`` takes the next entry or returns None,
``complete()`` posts. Memory is reached only through :class:`ports.GuestMemory`, so the same code serves
shared memory and DMA messages.
"""

from __future__ import annotations

import logging
from typing import Protocol

from ..protocol.nvme.commands import AdminOpcode, Record, SubmissionEntry
from ..protocol.nvme.status import Status, describe
from .admin import Source
from .answers import Answer, fail
from .controller import Controller
from .pointers import PointerError, pieces
from .ports import GuestMemory, MemoryFault

log = logging.getLogger(__name__)


class AdminRing(Protocol):
    async def fetch(self) -> bytes | None: ...

    async def complete(self, cid: int, status: int, dw0: int) -> None: ...


class AdminQueue:
    def __init__(self, controller: Controller, memory: GuestMemory, ring: AdminRing) -> None:
        self._controller, self._memory, self._ring = controller, memory, ring

    async def run(self) -> int:
        """Serve everything that is in the queue, then deliver events; returns how many commands were
        taken.
        """
        served = 0
        while self._controller.registers.ready and (entry := await self._fetch()) is not None:
            await self._serve(SubmissionEntry.parse(entry))
            served += 1
        await self.deliver_events()
        return served

    async def deliver_events(self) -> None:
        for cid, dw0 in self._controller.take_events():
            await self._ring.complete(cid, Status.SUCCESS, dw0)

    async def _fetch(self) -> bytes | None:
        try:
            return await self._ring.fetch()
        except MemoryFault:
            self._controller.registers.fatal()
            return None

    async def _serve(self, command: Record) -> None:
        answer = await self._answer(command)
        log.debug("admin %s cid %#x nsid %#x: %s", _name(command.opcode), command.cid, command.nsid,
                  describe(answer.status) if answer else "later")
        if answer is not None:
            await self._ring.complete(command.cid, answer.status, answer.dw0)
        for cid in self._controller.aborted_events:
            await self._ring.complete(cid, Status.ABORT_REQUESTED, 0)
        self._controller.aborted_events.clear()

    async def _answer(self, command: Record) -> Answer | None:
        try:
            data = await self._gather(command, self._controller.source(command))
            answer = self._controller.execute(command, data)
            if answer is not None and answer.data:
                await self._scatter(command, answer.data)
        except PointerError as error:
            return fail(error.status)
        except MemoryFault:
            return fail(Status.DATA_TRANSFER_ERROR)
        return answer

    async def _gather(self, command: Record, source: Source) -> bytes:
        if source.address is not None:
            return await self._memory.read(source.address, source.length_bytes)
        found = await pieces(self._memory, command, source.length_bytes, self._controller.page_bytes)
        return b"".join([await self._memory.read(address, count) for address, count in found])

    async def _scatter(self, command: Record, data: bytes) -> None:
        offset = 0
        for address, count in await pieces(self._memory, command, len(data), self._controller.page_bytes):
            await self._memory.write(address, data[offset:offset + count])
            offset += count


def _name(opcode: int) -> str:
    return AdminOpcode(opcode).name if opcode in set(AdminOpcode) else f"{opcode:#04x}"


