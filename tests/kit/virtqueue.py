"""Owns the driver's side of a virtqueue, split and packed, written plainly after virtio 1.3 sections 2.7 and 2.8.

``Split`` and ``Packed`` share one interface (``Queue``): ``submit`` makes a chain available, ``completed`` takes used
chains. Every field can also be written raw, because most of the tests are about drivers that break the rules. A chain
is a list of ``Seg``; nothing here knows what the bytes mean.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from .guest_memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
DESC = struct.Struct("<QIHH")  # split: addr, len, flags, next; packed: addr, len, id, flags
NO_INTERRUPT = 1


@dataclass
class Seg:
    """One segment of a chain."""

    addr: int
    size: int
    writable: bool = False
    flags: int = 0  # further flags, for tests that lie

    @property
    def desc_flags(self) -> int:
        return self.flags | (WRITE if self.writable else 0)


class Queue:
    """What both layouts have: memory, size, eventfds, free ids."""

    packed: bool

    def __init__(self, memory: GuestMemory, num: int, *, event_idx: bool = False) -> None:
        self.memory = memory
        self.num = num
        self.event_idx = event_idx
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.desc = self.avail = self.used = 0

    def close(self) -> None:
        """Idempotent."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1

    __del__ = close

    @staticmethod
    def _count(fd: int) -> int:
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def calls(self) -> int:
        """Signals since the last look."""
        return self._count(self.call_fd)

    def errors(self) -> int:
        return self._count(self.err_fd)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def indirect(self, chain: list[Seg], *, packed: bool) -> Seg:
        """Write *chain* as an indirect table; the segment that points to it."""
        table = b""
        for i, seg in enumerate(chain):
            if packed:
                table += DESC.pack(seg.addr, seg.size, 0, seg.desc_flags)
            else:
                more = NEXT if i + 1 < len(chain) else 0
                table += DESC.pack(seg.addr, seg.size, seg.desc_flags | more, i + 1 if more else 0)
        return Seg(self.memory.put(table), len(table), flags=INDIRECT)

    def submit(self, chain: list[Seg], *, indirect: bool = False) -> int:
        """Make *chain* available; its id."""
        raise NotImplementedError

    def completed(self) -> list[tuple[int, int]]:
        """Used chains since the last call: (id, written bytes)."""
        raise NotImplementedError


class Split(Queue):
    packed = False

    def __init__(self, memory: GuestMemory, num: int = 16, *, event_idx: bool = False) -> None:
        super().__init__(memory, num, event_idx=event_idx)
        self.desc = memory.alloc(16 * num, 16)
        self.avail = memory.alloc(6 + 2 * num, 2)
        self.used = memory.alloc(6 + 8 * num, 4)
        self.avail_idx = 0
        self.last_used = 0
        self.free = list(range(num))
        self.chains: dict[int, list[int]] = {}

    def set_desc(self, index: int, addr: int, size: int, flags: int, next: int = 0) -> None:
        self.memory.write(self.desc + 16 * index, DESC.pack(addr, size, flags, next))

    def offer(self, head: int) -> None:
        """Put *head* into the available ring and publish it."""
        self.memory.store_u16(self.avail + 4 + 2 * (self.avail_idx % self.num), head)
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, value: int) -> None:
        self.avail_idx = value & 0xFFFF
        self.memory.store_u16(self.avail + 2, self.avail_idx)

    def lay(self, chain: list[Seg]) -> int:
        """Write *chain* into free descriptors without offering it; its head."""
        slots = [self.free.pop(0) for _ in chain]
        for i, seg in enumerate(chain):
            more = i + 1 < len(chain)
            self.set_desc(
                slots[i], seg.addr, seg.size, seg.desc_flags | (NEXT if more else 0), slots[i + 1] if more else 0
            )
        self.chains[slots[0]] = slots
        return slots[0]

    def submit(self, chain: list[Seg], *, indirect: bool = False) -> int:
        head = self.lay([self.indirect(chain, packed=False)] if indirect else chain)
        self.offer(head)
        return head

    @property
    def used_idx(self) -> int:
        return self.memory.load_u16(self.used + 2)

    @property
    def device_suppresses(self) -> bool:
        return bool(self.memory.load_u16(self.used) & 1)

    @property
    def avail_event(self) -> int:
        return self.memory.load_u16(self.used + 4 + 8 * self.num)

    def set_used_event(self, value: int) -> None:
        self.memory.store_u16(self.avail + 4 + 2 * self.num, value & 0xFFFF)

    def want_calls(self, want: bool) -> None:
        """Ask for a signal at the next completion, or for none."""
        if self.event_idx:
            self.set_used_event(self.last_used if want else self.last_used - 1)
        else:
            self.memory.store_u16(self.avail, 0 if want else NO_INTERRUPT)

    def completed(self) -> list[tuple[int, int]]:
        taken = []
        while self.last_used != self.used_idx:
            head, size = self.memory.unpack("<II", self.used + 4 + 8 * (self.last_used % self.num))
            self.last_used = (self.last_used + 1) & 0xFFFF
            self.free += self.chains.pop(head)
            taken.append((head, size))
        return taken


class Packed(Queue):
    packed = True

    def __init__(self, memory: GuestMemory, num: int = 16, *, event_idx: bool = False) -> None:
        super().__init__(memory, num, event_idx=event_idx)
        self.desc = memory.alloc(16 * num, 16)
        self.avail = memory.alloc(4, 4)  # driver event suppression
        self.used = memory.alloc(4, 4)  # device event suppression
        self.next_avail, self.avail_wrap = 0, 1
        self.next_used, self.used_wrap = 0, 1
        self.free = list(range(num))
        self.slots_of: dict[int, int] = {}

    def set_desc(self, slot: int, addr: int, size: int, id: int, flags: int) -> None:
        """The flags come last, in one store: with them the slot belongs to the device."""
        self.memory.write(self.desc + 16 * slot, DESC.pack(addr, size, id, 0)[:14])
        self.memory.store_u16(self.desc + 16 * slot + 14, flags)

    def slot_flags(self, slot: int) -> int:
        return self.memory.load_u16(self.desc + 16 * slot + 14)

    def available_flags(self) -> int:
        return AVAIL if self.avail_wrap else USED

    def submit(self, chain: list[Seg], *, indirect: bool = False, id: int | None = None) -> int:
        if indirect:
            chain = [self.indirect(chain, packed=True)]
        id = self.free.pop(0) if id is None else id
        slots = []
        for i, seg in enumerate(chain):
            flags = seg.desc_flags | self.available_flags() | (NEXT if i + 1 < len(chain) else 0)
            slots.append((self.next_avail, seg.addr, seg.size, id, flags))
            self._advance_avail()
        self.slots_of[id] = len(chain)
        for slot in reversed(slots):  # the first comes last: with it the device may have the chain
            self.set_desc(*slot)
        return id

    def _advance_avail(self) -> None:
        self.next_avail += 1
        if self.next_avail == self.num:
            self.next_avail, self.avail_wrap = 0, self.avail_wrap ^ 1

    def want_calls(self, want: bool) -> None:
        if self.event_idx and want:
            self.set_event(self.next_used | self.used_wrap << 15, 2)
        else:
            self.set_event(0, 0 if want else 1)

    def set_event(self, off_wrap: int, flags: int) -> None:
        self.memory.store_u16(self.avail, off_wrap)
        self.memory.store_u16(self.avail + 2, flags)

    @property
    def device_event(self) -> tuple[int, ...]:
        return self.memory.load_u16(self.used), self.memory.load_u16(self.used + 2)

    @property
    def device_suppresses(self) -> bool:
        return self.device_event[1] == 1

    def completed(self) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        while True:
            flags = self.slot_flags(self.next_used)
            if bool(flags & AVAIL) != bool(self.used_wrap) or bool(flags & USED) != bool(self.used_wrap):
                return taken
            _, size, id, _ = DESC.unpack(self.memory.read(self.desc + 16 * self.next_used, 16))
            self.next_used += self.slots_of.pop(id)
            if self.next_used >= self.num:
                self.next_used, self.used_wrap = self.next_used - self.num, self.used_wrap ^ 1
            self.free.append(id)
            taken.append((id, size))
