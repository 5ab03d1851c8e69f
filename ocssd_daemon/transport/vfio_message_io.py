"""Owns the I/O queues of a client that shares no memory: fetch, pull, run, push, complete, one command at a
time.

The command itself runs in ``_nvme.pyx`` on our copies of the guest's memory; this module moves the bytes
there and back. Slow by nature (several round trips per command), and there so that every QEMU command line
works.
"""

from __future__ import annotations

from ocssd_daemon._nvme import CQE_BYTES, SQE_BYTES, NvmeQueues
from ocssd_daemon.nvme.controller import Controller
from ocssd_daemon.nvme.pointers import Piece, PointerError, pieces
from ocssd_daemon.nvme.ports import MemoryFault
from ocssd_daemon.nvme.transfers import Transfer, transfer_of
from ocssd_daemon.protocol.nvme.commands import Record, SglDescriptor, SubmissionEntry
from ocssd_daemon.transport.vfio_memory import ClientMemory

SGL_BYTES = 16
FUSED_FIRST = 1


class MessageQueues:
    def __init__(self, queues: NvmeQueues, memory: ClientMemory, controller: Controller) -> None:
        self._queues, self._memory, self._controller = queues, memory, controller

    async def run(self) -> None:
        """Serve every waiting command of every queue. Raises MemoryFault when a queue itself cannot be
        reached.
        """
        while waiting := self._queues.waiting_queues():
            for qid in waiting:
                await self._run_one(qid)

    async def _run_one(self, qid: int) -> None:
        place = self._queues.next_place(qid)
        if place is None:
            return
        command = await self._fetch(place[0])
        results = await self._pull(command)
        if command.fuse == FUSED_FIRST:
            results += await self._pull(await self._fetch(place[0] + SQE_BYTES))
        await self._complete(qid, results)

    async def _fetch(self, address: int) -> Record:
        return SubmissionEntry.parse(await self._memory.read(address, SQE_BYTES))

    async def _complete(self, qid: int, results: list[Piece]) -> None:
        cqid, places = self._queues.cq_places(qid)
        served = self._queues.run_next(qid)
        for address, count in results:
            await self._memory.push(address, count)
        for address in places[:served]:
            await self._memory.push(address, CQE_BYTES)
        self._queues.signal(cqid)

    async def _pull(self, command: Record) -> list[Piece]:
        """Fetch what the command reads; returns the places that it will write. An impossible pointer fetches
        nothing: the command then fails for the same reason."""
        transfer = transfer_of(command, self._controller.namespaces.get(command.nsid))
        if self._controller.exceeds_mdts(transfer.data_bytes):
            return []                                           # it will be refused: nothing is fetched for that
        try:
            for address, count in transfer.lists:
                await self._memory.pull(address, count)
            found = await pieces(self._memory, command, transfer.data_bytes, self._controller.page_bytes)
            found += await self._metadata(command, transfer)
            if transfer.from_host:
                for address, count in found:
                    await self._memory.pull(address, count)
        except (PointerError, MemoryFault):
            return []
        return [] if transfer.from_host else found

    async def _metadata(self, command: Record, transfer: Transfer) -> list[Piece]:
        if not transfer.metadata_bytes:
            return []
        if command.psdt != 2:
            return [(command.mptr, transfer.metadata_bytes)]
        descriptor = SglDescriptor.parse(await self._memory.read(command.mptr, SGL_BYTES))
        return [(descriptor.address, min(descriptor.length, transfer.metadata_bytes))]
