"""An NVMe host over a vfio-user client: enables the controller, drives queues, waits on interrupts, never sleeps.

Memory is handed out page by page from the client's guest memory and never given back: a test is short.
"""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass
from typing import Any

from ocssd_daemon.protocol.nvme.commands import CompletionEntry, sqe
from tests.kit.vfio_user_client import BAR0, MSIX, VfioUserClient

PAGE = 4096
CAP, VS, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
CC_ENABLE = 6 << 16 | 4 << 20 | 1
DEADLINE_S = 10.0


@dataclass(frozen=True)
class Completion:
    """``status`` is the 15-bit field, Do Not Retry included; ``result`` is DW0 and DW1 as one number."""

    cid: int
    status: int
    result: int
    sqhd: int


class Queue:
    """One queue pair as the host sees it."""

    def __init__(self, host: NvmeHost, qid: int, entries: int) -> None:
        self.host, self.qid, self.entries = host, qid, entries
        self.sq, self.cq = host.allocate(entries * 64), host.allocate(entries * 16)
        self.tail = self.head = 0
        self.phase = 1
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.shadow: tuple[int, int] | None = None

    def submit(self, *entries: bytes) -> None:
        """Put entries at the tail and ring once."""
        for entry in entries:
            self.host.memory[self.sq + self.tail * 64:self.sq + self.tail * 64 + 64] = entry
            self.tail = (self.tail + 1) % self.entries
        self.ring()

    def ring(self) -> None:
        self.host.doorbell(self.qid, 0, self.tail)

    def poll(self) -> Completion | None:
        at = self.cq + self.head * 16
        entry = CompletionEntry.parse(bytes(self.host.memory[at:at + 16]))
        if entry.status_phase & 1 != self.phase:
            return None
        self.head = (self.head + 1) % self.entries
        self.phase ^= self.head == 0
        return Completion(entry.cid, entry.status_phase >> 1, entry.dw0 | entry.dw1 << 32, entry.sqhd)

    def wait(self, count: int = 1) -> list[Completion]:
        """The next *count* completions; tells the controller the new head."""
        found: list[Completion] = []
        while len(found) < count:
            done = self.poll()
            if done is not None:
                found.append(done)
            else:
                self.host.wait_interrupt(self.irq)
        self.host.doorbell(self.qid, 1, self.head)
        return found

    def nothing_more(self) -> bool:
        """True when no completion waits, after the controller has answered a register read."""
        self.host.read32(CSTS)
        return self.poll() is None


class NvmeHost:
    def __init__(self, client: VfioUserClient) -> None:
        self.client, self.memory = client, client.memory
        self._free = PAGE
        self._cid = 0
        self.queues: dict[int, Queue] = {}

    def allocate(self, size: int) -> int:
        """Zeroed, page-aligned guest memory."""
        at, self._free = self._free, self._free + -(-size // PAGE) * PAGE
        assert self._free <= len(self.memory), "the test's guest memory is used up"
        return at

    def put(self, data: bytes) -> int:
        at = self.allocate(len(data))
        self.memory[at:at + len(data)] = data
        return at

    def get(self, address: int, count: int) -> bytes:
        return bytes(self.memory[address:address + count])

    def read32(self, offset: int) -> int:
        return int.from_bytes(self.client.read(BAR0, offset, 4), "little")

    def write32(self, offset: int, value: int) -> None:
        self.client.write(BAR0, offset, value.to_bytes(4, "little"))

    def write64(self, offset: int, value: int) -> None:
        self.client.write(BAR0, offset, value.to_bytes(8, "little"))

    def doorbell(self, qid: int, which: int, value: int) -> None:
        self.client.post(BAR0, DOORBELLS + (2 * qid + which) * 4, value.to_bytes(4, "little"))

    def wait_interrupt(self, irq: int) -> None:
        """Until the eventfd fires; meanwhile serves DMA messages. Fails after the deadline."""
        watched: list[Any] = [irq] if self.client.shared else [irq, self.client.sock]
        ready = select.select(watched, [], [], DEADLINE_S)[0]
        assert ready, "no interrupt within the deadline"
        if irq in ready:
            os.eventfd_read(irq)
        else:
            self.client.serve(0)

    def close(self) -> None:
        """Give the interrupt descriptors back; the client is the caller's."""
        for queue in self.queues.values():
            os.close(queue.irq)
        self.queues.clear()

    # ---- bring-up -----------------------------------------------------------------------------------------

    def enable(self, entries: int = 32) -> None:
        """Admin queue, MSI-X vector 0, CC.EN; the controller must be ready at once."""
        self.close()
        admin = self.queues[0] = Queue(self, 0, entries)
        self.client.set_irqs(0x24, MSIX, 0, 1, fds=(admin.irq,))
        self.write32(AQA, (entries - 1) << 16 | entries - 1)
        self.write64(ASQ, admin.sq)
        self.write64(ACQ, admin.cq)
        self.write32(CC, CC_ENABLE)
        assert self.read32(CSTS) & 3 == 1, f"CSTS = {self.read32(CSTS):#x}"

    def next_cid(self) -> int:
        self._cid = (self._cid + 1) & 0xFFFF
        return self._cid

    def admin(self, opcode: int, nsid: int = 0, *, data: int = 0, dwords: bytes = b"", prp2: int = 0) -> Completion:
        admin = self.queues[0]
        admin.submit(sqe(opcode, self.next_cid(), nsid, prp1=data, prp2=prp2, dwords=dwords))
        return admin.wait()[0]

    def create_queue(self, qid: int = 1, entries: int = 64, *, interrupts: bool = True) -> Queue:
        if qid in self.queues:
            os.close(self.queues[qid].irq)
        queue = self.queues[qid] = Queue(self, qid, entries)
        self.client.set_irqs(0x24, MSIX, qid, 1, fds=(queue.irq,))
        made = self.admin(0x05, data=queue.cq, dwords=struct.pack("<HHHH", qid, entries - 1, 3 if interrupts else 1,
                                                                  qid))
        assert made.status == 0, f"create CQ: {made.status:#x}"
        made = self.admin(0x01, data=queue.sq, dwords=struct.pack("<HHHH", qid, entries - 1, 1, qid))
        assert made.status == 0, f"create SQ: {made.status:#x}"
        return queue

    # ---- commands -----------------------------------------------------------------------------------------

    def pointer(self, address: int, count: int) -> tuple[int, int]:
        """PRP1 and PRP2 for contiguous memory from *address* on."""
        pages = [(address // PAGE + i) * PAGE for i in range(1, (address % PAGE + count + PAGE - 1) // PAGE)]
        if len(pages) <= 1:
            return address, pages[0] if pages else 0
        return address, self.put(struct.pack(f"<{len(pages)}Q", *pages))

    def entry(self, opcode: int, nsid: int = 1, *, address: int = 0, count: int = 0, mptr: int = 0, dwords: bytes = b"",
              flags: int = 0) -> bytes:
        prp1, prp2 = self.pointer(address, count) if count else (address, 0)
        return sqe(opcode, self.next_cid(), nsid, flags=flags, mptr=mptr, prp1=prp1, prp2=prp2, dwords=dwords)

    def io(self, opcode: int, nsid: int = 1, *, qid: int = 1, **fields: Any) -> Completion:
        queue = self.queues[qid]
        queue.submit(self.entry(opcode, nsid, **fields))
        return queue.wait()[0]

    def lba_list(self, addresses: list[int]) -> int:
        """What goes into CDW10–11: the address itself, or where the list lies."""
        return addresses[0] if len(addresses) == 1 else self.put(struct.pack(f"<{len(addresses)}Q", *addresses))

    def vector(self, opcode: int, addresses: list[int], *, nsid: int = 1, address: int = 0, count: int = 0,
               mptr: int = 0,
               control: int = 0, destination: int = 0) -> Completion:
        dwords = struct.pack("<QHHIQ", self.lba_list(addresses), len(addresses) - 1, control, 0, destination)
        return self.io(opcode, nsid, address=address, count=count, mptr=mptr, dwords=dwords)

    def vector_write(self, addresses: list[int], data: bytes, oob: bytes = b"", *, nsid: int = 1) -> Completion:
        return self.vector(0x91, addresses, nsid=nsid, address=self.put(data), count=len(data),
                           mptr=self.put(oob) if oob else 0)

    def vector_read(self, addresses: list[int], sector_bytes: int = 4096, oob_bytes: int = 0, *,
                    nsid: int = 1) -> tuple[Completion, bytes, bytes]:
        """``(completion, data, oob)``; the buffers are filled with a5h before."""
        size, extra = len(addresses) * sector_bytes, len(addresses) * oob_bytes
        at, meta = self.put(b"\xa5" * size), self.put(b"\xa5" * extra) if extra else 0
        done = self.vector(0x92, addresses, nsid=nsid, address=at, count=size, mptr=meta)
        return done, self.get(at, size), self.get(meta, extra)

    def write_blocks(self, slba: int, data: bytes, *, nsid: int = 1, lba_bytes: int = 4096,
                     control: int = 0) -> Completion:
        dwords = struct.pack("<QHH", slba, len(data) // lba_bytes - 1, control)
        return self.io(0x01, nsid, address=self.put(data), count=len(data), dwords=dwords)

    def read_blocks(self, slba: int, count: int, *, nsid: int = 1, lba_bytes: int = 4096) -> tuple[Completion, bytes]:
        at = self.put(b"\xa5" * count * lba_bytes)
        done = self.io(0x02, nsid, address=at, count=count * lba_bytes, dwords=struct.pack("<QH", slba, count - 1))
        return done, self.get(at, count * lba_bytes)
