"""Commands that no buffer bounds, in pieces: they hold nobody up, complete once, and end with their queue."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import msgspec
import pytest
from ocssd_daemon._fast import Disk, Ftl, Media, Reactor
from ocssd_daemon._nvme import GuestMemory, NvmeQueues

from ocssd_daemon.nand.store import open_ram
from ocssd_daemon.nvme.ports import QueueShape
from ocssd_daemon.protocol.nvme.commands import CompletionEntry, sqe
from tests.kit.nvme_target import SMALL
from tests.nvme.test_block import LBA, blocks
from tests.nvme.test_rules20 import CLOSED, chunk_log

LARGE = msgspec.structs.replace(SMALL, chunks=16, sectors=1024)     # 256 MiB of flash, a disk of 128 MiB
DISK_LBAS = LARGE.total_sectors // 2
RAM_BYTES, SQ, CQ, BUFFER = 1 << 20, 0x1000, 0x2000, 0x10000


def dsm(*ranges: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IIQ", 0, count, slba) for slba, count in ranges)


def test_a_deallocation_of_the_whole_disk_lets_others_pass(start) -> None:
    """The read behind it completes first: the deallocation has been put off after its first piece."""
    _, host = start(("block",), geometry=LARGE)
    assert host.write_blocks(0, b"x" * LBA).status == 0
    assert host.write_blocks(DISK_LBAS - 1, b"y" * LBA).status == 0
    ranges = host.put(dsm((0, DISK_LBAS)))
    slow = host.entry(0x09, address=ranges, count=16, dwords=struct.pack("<II", 0, 4))
    quick = host.entry(0x00)
    host.queues[1].submit(slow, quick)
    done = host.queues[1].wait(2)
    assert [d.status for d in done] == [0, 0]
    assert [d.cid for d in done] == [_cid(quick), _cid(slow)]
    assert host.queues[1].nothing_more()
    assert host.read_blocks(0, 1)[1] == host.read_blocks(DISK_LBAS - 1, 1)[1] == bytes(LBA)


def _cid(entry: bytes) -> int:
    return struct.unpack_from("<H", entry, 2)[0]


def test_256_ranges_of_2_32_blocks_are_refused_at_the_first(start) -> None:
    _, host = start(("block",), geometry=LARGE)
    ranges = host.put(dsm((0, 0xFFFF_FFFF)) * 256)
    done = host.io(0x09, address=ranges, count=4096, dwords=struct.pack("<II", 255, 4))
    assert done.status == 0x4080


def test_a_range_beyond_the_end_fails_after_those_before_it_were_done(start) -> None:
    _, host = start(("block",), geometry=LARGE)
    assert host.write_blocks(3, b"x" * LBA).status == 0
    ranges = host.put(dsm((0, 20_000), (20_000, 10_000), (DISK_LBAS, 1)))
    assert host.io(0x09, address=ranges, count=48, dwords=struct.pack("<II", 2, 4)).status == 0x4080
    assert host.read_blocks(3, 1)[1] == bytes(LBA)


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_zeroes_over_many_pieces_leave_the_blocks_beside_them_alone(start, block_bytes: int) -> None:
    """The ends lie inside sectors, the pieces' borders must not."""
    _, host = start(("block",), geometry=LARGE, block_bytes=block_bytes)
    first, count = 3, 60_000 if block_bytes == 512 else 30_000
    for at in (first - 1, first, first + count - 1, first + count):
        assert host.write_blocks(at, b"x" * block_bytes, lba_bytes=block_bytes).status == 0
    assert host.io(0x08, dwords=blocks(first, count)).status == 0
    found = [host.read_blocks(at, 1, lba_bytes=block_bytes)[1][:1] for at in (first - 1, first, first + count - 1,
                                                                              first + count)]
    assert found == [b"x", b"\0", b"\0", b"x"]
    assert host.io(0x0C, dwords=blocks(first, count)).status == 0


def test_zeroes_on_flash_are_checked_as_a_whole_and_written_in_pieces(start) -> None:
    target, host = start(("ocssd20",), geometry=LARGE)
    first = target.media.chunks[0]
    assert host.io(0x08, dwords=blocks(4, 1020)).status == 0x42F2       # not at the write pointer: nothing is written
    assert int(first["wp"]) == 0
    assert host.io(0x08, dwords=blocks(0, 1026)).status == 0x4002       # the second chunk's part is no write unit
    assert int(first["wp"]) == 0
    assert host.io(0x08, dwords=blocks(0, 1024)).status == 0
    assert (int(first["state"]), int(first["wp"])) == (CLOSED, 1024)
    assert host.io(0x0C, dwords=blocks(0, 1024)).status == 0


def test_dsm_of_256_chunks_on_flash_is_one_command(start) -> None:
    target, host = start(("ocssd20",), multi_reset=True)
    ranges = host.put(b"".join(dsm(((i % 8) << 6, 64)) for i in range(256)))
    assert host.io(0x09, address=ranges, count=4096, dwords=struct.pack("<II", 255, 4)).status == 0
    assert int(target.media.chunks["pe_cycles"][0]) == 32
    assert set(chunk_log(host)["state"]) == {1}


def test_a_worn_chunk_is_notified_also_when_dsm_reset_it(start) -> None:
    target, host = start(wear_threshold=10, multi_reset=True)
    with target.reactor.paused():
        target.media.chunks["pe_limit"][3] = 1000
        target.media.chunks["pe_cycles"][3] = 80
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    ranges = host.put(dsm((3 << 6, 64)))
    assert host.io(0x09, address=ranges, count=16, dwords=struct.pack("<II", 0, 4)).status == 0
    assert admin.wait()[0].result == 7 | 0xD0 << 16


def test_without_shared_memory_a_long_command_is_done_at_once(start) -> None:
    _, host = start(("block",), geometry=LARGE, shared=False)
    assert host.write_blocks(DISK_LBAS - 1, b"y" * LBA).status == 0
    ranges = host.put(dsm((0, DISK_LBAS)))
    assert host.io(0x09, address=ranges, count=16, dwords=struct.pack("<II", 0, 4)).status == 0
    assert host.read_blocks(DISK_LBAS - 1, 1)[1] == bytes(LBA)


# ---- queues whose loop stands still: a job stays where its first piece left it ---------------------------------------


class Still:
    """One queue pair on guest memory, run by hand."""

    def __init__(self, ram_bytes: int = RAM_BYTES) -> None:
        self.reactor = Reactor(0)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, ram_bytes)
        self.ram = mmap.mmap(self.fd, ram_bytes)
        self.memory = GuestMemory(self.reactor)
        assert self.memory.map(0, ram_bytes, self.fd, 0, True) is None
        self.media = Media(open_ram(LARGE))
        self.ftl = Ftl(self.media, DISK_LBAS)
        self.ftl.load(0)
        self.disk = Disk(self.ftl, LBA)
        self.queues = NvmeQueues(self.reactor, self.memory, bytearray(4096), 4)
        self.queues.add_block(1, self.disk)
        assert self.queues.create_cq(QueueShape(1, CQ, 16), 1, False)
        assert self.queues.create_sq(QueueShape(1, SQ, 16), 1)
        self.tail = 0

    def interrupting(self) -> None:
        """The queue pair again, with interrupts."""
        self.queues.delete_sq(1)
        self.queues.delete_cq(1)
        assert self.queues.create_cq(QueueShape(1, CQ, 16), 1, True)
        assert self.queues.create_sq(QueueShape(1, SQ, 16), 1)

    def submit(self, entry: bytes) -> None:
        self.ram[SQ + self.tail * 64:SQ + self.tail * 64 + 64] = entry
        self.tail += 1
        self.queues.ring(2 * 4, self.tail)
        assert self.queues.run_next(1) == 1

    def zeroes(self, cid: int) -> None:
        self.submit(sqe(0x08, cid, 1, dwords=blocks(0, 32_768)))

    def completions(self) -> list[tuple[int, int]]:
        found = []
        for i in range(16):
            entry = CompletionEntry.parse(self.ram[CQ + i * 16:CQ + i * 16 + 16])
            if entry.status_phase & 1:
                found.append((entry.cid, entry.status_phase >> 1))
        return found

    def close(self) -> None:
        self.queues.close()
        self.ram.close()
        os.close(self.fd)


@pytest.fixture
def still() -> Iterator[Still]:
    made = Still()
    yield made
    made.close()


def test_a_command_in_pieces_can_be_aborted(still: Still) -> None:
    still.zeroes(5)
    still.zeroes(6)
    assert still.completions() == []
    assert still.queues.abort(1, 7) is False
    assert still.queues.abort(1, 5) is True
    assert still.queues.abort(1, 5) is False
    assert still.completions() == [(5, 0x0007)]
    loop = still.reactor.start()
    still.reactor.stop()
    loop.join(10)


def test_a_queue_that_is_deleted_aborts_what_is_left(still: Still) -> None:
    still.zeroes(5)
    still.zeroes(6)
    still.queues.delete_sq(1)
    assert still.completions() == [(5, 0x0008), (6, 0x0008)]


def test_a_reset_forgets_what_is_left(still: Still) -> None:
    still.zeroes(5)
    still.queues.reset()
    assert still.completions() == []


def test_more_long_commands_than_are_kept_are_asked_to_come_again(still: Still) -> None:
    """A full completion queue bounds them first: each has a place in it from the start."""
    for cid in range(15):
        still.zeroes(cid)
    assert still.queues.waiting_queues() == []
    still.ram[SQ + 15 * 64:SQ + 16 * 64] = sqe(0x00, 99, 1)
    still.queues.ring(2 * 4, 0)
    assert still.queues.next_place(1) is None


def test_the_write_cache_off_hardens_every_write(still: Still) -> None:
    """Programmed at once means padded: seen in the FTL's counters."""
    def write(cid: int) -> None:
        still.submit(sqe(0x01, cid, 1, prp1=BUFFER, dwords=blocks(cid, 1)))
    write(1)
    assert still.ftl.stats()["padded_sectors"] == 0
    still.queues.set_write_cache(False)
    write(2)
    padded = still.ftl.stats()["padded_sectors"]
    assert padded > 0
    still.submit(sqe(0x08, 3, 1, dwords=blocks(0, 1)))
    write(4)
    assert still.ftl.stats()["padded_sectors"] > padded
    still.queues.set_write_cache(True)
    before = still.ftl.stats()["padded_sectors"]
    write(5)
    assert still.ftl.stats()["padded_sectors"] == before
