"""The block namespace: the host FTL's disk as an ordinary NVMe namespace; data pointers, fused commands, doorbells."""

from __future__ import annotations

import os
import random
import struct
import time

import pytest
from ocssd_daemon._fast import Reactor
from ocssd_daemon._nvme import GuestMemory, NvmeQueues

from ocssd_daemon.protocol.nvme.commands import sqe
from tests.kit.nvme_host import CSTS, PAGE

LBA = 4096


@pytest.fixture
def pair(start):
    return start(("block",))


@pytest.fixture
def host(pair):
    return pair[1]


def blocks(slba, count):
    return struct.pack("<QH", slba, count - 1)


def test_random_writes_read_back(host):
    rng, model = random.Random(7), {}
    for _ in range(200):
        slba, count = rng.randrange(900), rng.randrange(1, 9)
        data = rng.randbytes(count * LBA)
        assert host.write_blocks(slba, data).status == 0
        model.update({slba + i: data[i * LBA:(i + 1) * LBA] for i in range(count)})
        host._free = max(PAGE, host._free - 2 * len(data)) if host._free > 48 << 20 else host._free
    for slba in rng.sample(sorted(model), 50):
        assert host.read_blocks(slba, 1)[1] == model[slba]


def test_a_transfer_of_mdts_runs_over_a_prp_list(host):
    data = os.urandom(128 * LBA)
    assert host.write_blocks(0, data).status == 0
    assert host.read_blocks(0, 128)[1] == data


def test_prp1_may_start_inside_a_page(host):
    data = os.urandom(2 * LBA)
    at = host.allocate(4 * PAGE) + 516
    host.memory[at:at + len(data)] = data
    assert host.io(0x01, address=at, count=len(data), dwords=blocks(0, 2)).status == 0
    assert host.read_blocks(0, 2)[1] == data


def test_a_prp_list_may_go_on_in_another_page(host):
    """128 pages whose list starts three entries before the end of a page."""
    data = os.urandom(128 * LBA)
    at = host.put(data)
    pages = [at + i * PAGE for i in range(1, 128)]
    first, second = host.allocate(PAGE), host.put(struct.pack("<125Q", *pages[2:]))
    host.memory[first + PAGE - 24:first + PAGE] = struct.pack("<3Q", *pages[:2], second)
    entry = sqe(0x01, 9, 1, prp1=at, prp2=first + PAGE - 24, dwords=blocks(0, 128))
    host.queues[1].submit(entry)
    assert host.queues[1].wait()[0].status == 0
    assert host.read_blocks(0, 128)[1] == data


@pytest.mark.parametrize(("case", "prp1", "prp2", "count", "status"), [
    ("PRP1 not dword-aligned", 0x10002, 0, 1, 0x4013),
    ("PRP1 outside memory", 1 << 40, 0, 1, 0x4004),
    ("PRP1 wraps", (1 << 64) - 4096, 0, 1, 0x4004),
    ("PRP2 not page-aligned", 0x10000, 0x20010, 2, 0x4013),
    ("PRP2 outside memory", 0x10000, 1 << 40, 2, 0x4004),
    ("list not aligned", 0x10000, 0x20004, 3, 0x4013),
    ("list outside memory", 0x10000, 1 << 40, 8, 0x4004),
    ("a list of zeroes is page 0, which is mapped", 0x10000, 0x300000, 8, 0),
])
def test_bad_prps_are_an_error_of_the_command(host, case, prp1, prp2, count, status):
    host.queues[1].submit(sqe(0x02, 1, 1, prp1=prp1, prp2=prp2, dwords=blocks(0, count)))
    assert host.queues[1].wait()[0].status == status, case


def sgl(address, length, kind=0):
    return struct.pack("<QI3xB", address, length, kind << 4)


def test_data_may_be_an_sgl_of_blocks_in_segments(host):
    data = os.urandom(4 * LBA)
    assert host.write_blocks(0, data).status == 0
    parts = [host.allocate(PAGE) for _ in range(4)]
    tail = host.put(b"".join(sgl(at, LBA) for at in parts[2:]))
    head = host.put(b"".join(sgl(at, LBA) for at in parts[:2]) + sgl(tail, 32, 3))
    entry = sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(head, 48, 2), dwords=blocks(0, 4))
    host.queues[1].submit(entry)
    assert host.queues[1].wait()[0].status == 0
    assert b"".join(host.get(at, LBA) for at in parts) == data


@pytest.mark.parametrize(("case", "descriptor", "status"), [
    ("too short", (0x10000, 100, 0), 0x400F),
    ("bit bucket", (0x10000, 8192, 1), 0x4011),
    ("keyed", (0x10000, 8192, 4), 0x4011),
    ("a segment of 8 bytes", (0x10000, 8, 3), 0x400D),
    ("a segment outside memory", (1 << 40, 16, 3), 0x4004),
])
def test_bad_sgls_are_an_error_of_the_command(host, case, descriptor, status):
    host.queues[1].submit(sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(*descriptor), dwords=blocks(0, 2)))
    assert host.queues[1].wait()[0].status == status, case


def test_a_segment_that_links_to_itself_ends(host):
    at = host.allocate(PAGE)
    host.memory[at:at + 16] = sgl(at, 16, 2)
    host.queues[1].submit(sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(at, 16, 2), dwords=blocks(0, 2)))
    assert host.queues[1].wait()[0].status == 0x400D


@pytest.mark.parametrize(("case", "opcode", "nsid", "dwords", "status"), [
    ("opcode", 0x7F, 1, b"", 0x4001),
    ("vector read of a block namespace", 0x92, 1, b"", 0x4001),
    ("namespace 0", 0x02, 0, blocks(0, 1), 0x400B),
    ("namespace 2", 0x02, 2, blocks(0, 1), 0x400B),
    ("broadcast", 0x02, 0xFFFF_FFFF, blocks(0, 1), 0x400B),
    ("beyond the end", 0x02, 1, blocks(1 << 40, 1), 0x4080),
    ("wraps", 0x02, 1, blocks((1 << 64) - 1, 2), 0x4080),
    ("MDTS", 0x02, 1, blocks(0, 129), 0x4002),
    ("PRACT", 0x02, 1, struct.pack("<QHH", 0, 0, 0x2000), 0x4002),
    ("PSDT 3", 0x02, 1, blocks(0, 1), 0x4002),
])
def test_bad_fields_are_refused(host, case, opcode, nsid, dwords, status):
    flags = 3 << 6 if case == "PSDT 3" else 0
    host.queues[1].submit(sqe(opcode, 5, nsid, flags=flags, prp1=0x10000, prp2=0x20000, dwords=dwords))
    done = host.queues[1].wait()[0]
    assert (done.cid, done.status) == (5, status), case


def test_flush_fua_zeroes_discard_and_verify_succeed(host):
    assert host.write_blocks(0, os.urandom(4 * LBA), control=0x4000).status == 0      # FUA
    assert host.io(0x00, 1).status == 0
    assert host.io(0x00, 0xFFFF_FFFF).status == 0
    assert host.io(0x08, dwords=blocks(1, 1)).status == 0
    assert host.read_blocks(1, 1)[1] == bytes(LBA)
    ranges = host.put(struct.pack("<IIQ", 0, 2, 2))
    assert host.io(0x09, address=ranges, count=16, dwords=struct.pack("<II", 0, 4)).status == 0
    assert host.read_blocks(2, 2)[1] == bytes(2 * LBA)
    assert host.io(0x0C, dwords=blocks(0, 4)).status == 0


def test_dulbe_reports_deallocated_blocks(host):
    assert host.write_blocks(0, bytes(LBA)).status == 0
    assert host.admin(0x09, 1, dwords=struct.pack("<II", 5, 1 << 16)).status == 0
    assert host.read_blocks(0, 1)[0].status == 0
    assert host.read_blocks(0, 2)[0].status == 0x4287


def test_compare_finds_equal_and_unequal_data(host):
    data = os.urandom(32 * LBA)
    assert host.write_blocks(0, data).status == 0
    assert host.io(0x05, address=host.put(data), count=len(data), dwords=blocks(0, 32)).status == 0
    other = data[:-1] + bytes([data[-1] ^ 1])
    assert host.io(0x05, address=host.put(other), count=len(data), dwords=blocks(0, 32)).status == 0x4285


def fused(host, expected, new, slba=0):
    """Compare and Write behind one doorbell; both statuses."""
    pair = [host.entry(0x05, address=host.put(expected), count=LBA, dwords=blocks(slba, 1), flags=1),
            host.entry(0x01, address=host.put(new), count=LBA, dwords=blocks(0, 1), flags=2)]
    host.queues[1].submit(*pair)
    return [done.status for done in host.queues[1].wait(2)]


def test_a_fused_compare_and_write_writes_only_if_the_data_are_as_expected(host):
    old, new = os.urandom(LBA), os.urandom(LBA)
    assert host.write_blocks(0, old).status == 0
    assert fused(host, new, new) == [0x4285, 0x0009]
    assert host.read_blocks(0, 1)[1] == old
    assert fused(host, old, new) == [0, 0]
    assert host.read_blocks(0, 1)[1] == new


def test_a_fused_command_without_its_other_half_is_refused(host):
    at = host.put(bytes(LBA))
    assert host.io(0x05, address=at, count=LBA, dwords=blocks(0, 1), flags=1).status == 0x400A
    assert host.io(0x01, address=at, count=LBA, dwords=blocks(0, 1), flags=2).status == 0x400A
    assert fused(host, bytes(LBA), bytes(LBA), slba=1) == [0x4002, 0x0009]


# ---- queues ------------------------------------------------------------------------------------------------------


def test_a_queue_wraps_and_a_full_completion_queue_makes_commands_wait(host):
    queue = host.create_queue(2, entries=4)
    for _ in range(10):
        assert [d.status for d in _read_three(host, queue)] == [0, 0, 0]


def _read_three(host, queue):
    queue.submit(*[host.entry(0x02, address=0x10000, count=LBA, dwords=blocks(0, 1)) for _ in range(3)])
    return queue.wait(3)


def test_a_doorbell_out_of_range_is_an_event_and_harms_nothing(host):
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    host.doorbell(1, 0, 60000)
    assert admin.wait()[0].result == 0 | 1 << 8 | 1 << 16               # error, invalid doorbell value, log page 1
    assert host.read_blocks(0, 1)[0].status == 0


def test_a_doorbell_of_no_queue_is_an_event(host):
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    host.doorbell(7, 0, 1)
    assert admin.wait()[0].result == 0 | 0 << 8 | 1 << 16


def test_shadow_doorbells_replace_register_writes(host):
    shadow, events = host.allocate(PAGE), host.allocate(PAGE)
    assert host.admin(0x7C, data=shadow, prp2=events).status == 0
    queue = host.create_queue(2)
    queue.host = Shadowed(host, shadow, events)
    for _ in range(300):
        queue.submit(host.entry(0x02, address=0x10000, count=LBA, dwords=blocks(0, 1)))
        assert queue.wait()[0].status == 0
    assert queue.host.rung[0] <= 300
    # Nobody waits for room in the completion queue: its doorbell is asked for at most once per turn of its 64 entries.
    assert queue.host.rung[1] <= 300 // 64 + 1


def test_commands_that_wait_for_a_full_completion_queue_go_on_when_the_host_takes_from_it(host):
    shadow, events = host.allocate(PAGE), host.allocate(PAGE)
    assert host.admin(0x7C, data=shadow, prp2=events).status == 0
    queue = host.create_queue(2, entries=8)
    queue.host = Shadowed(host, shadow, events)
    read = host.entry(0x02, address=0x10000, count=LBA, dwords=blocks(0, 1))
    queue.submit(read, read, read)
    queue.wait(3)
    last = host.entry(0x02, address=0x10000, count=LBA, dwords=blocks(0, 1))
    deadline_s = time.monotonic() + 10
    queue.submit(*[read] * 6, last)                                     # their completions fill the queue
    while host.get(queue.cq + (3 + 6) % 8 * 16 + 12, 2) != last[2:4]:   # the last one's command identifier
        assert time.monotonic() < deadline_s, "seven commands do not end"
    queue.submit(read, read, read)
    asked_at = events + (2 * 2 + 1) * 4
    while host.get(asked_at, 4) != struct.pack("<I", 3):                # until the loop sleeps
        assert time.monotonic() < deadline_s, "nobody asks for the doorbell of a full completion queue"
    assert len(queue.wait(7)) == 7
    assert [done.status for done in queue.wait(3)] == [0, 0, 0]


def test_stale_shadow_doorbells_of_an_earlier_life_are_no_commands(host):
    """Linux keeps the pages over a controller reset and makes its queues before it hands the pages over again."""
    shadow, events = host.put(b"\x07\0\0\0" * 1024), host.allocate(PAGE)
    assert host.admin(0x7C, data=shadow, prp2=events).status == 0
    assert host.get(shadow + 8, 8) == bytes(8)
    host.memory[shadow + 16:shadow + 24] = b"\x07\0\0\0" * 2
    queue = host.create_queue(2)
    assert host.get(shadow + 16, 8) == bytes(8)
    assert queue.poll() is None


class Shadowed:
    """A host that writes shadow doorbells, and registers only when EventIdx asks for it (NVMe 1.3, annex B.5)."""

    def __init__(self, host, shadow, events):
        self.host, self.shadow, self.events, self.rung = host, shadow, events, [0, 0]
        self.old = {}

    def __getattr__(self, name):
        return getattr(self.host, name)

    def doorbell(self, qid, which, value):
        place = (2 * qid + which) * 4
        old = self.old.get(place, 0)
        self.host.memory[self.shadow + place:self.shadow + place + 4] = struct.pack("<I", value)
        (event,) = struct.unpack("<I", self.host.memory[self.events + place:self.events + place + 4])
        if (value - event - 1) & 0xFFFF < (value - old) & 0xFFFF:
            self.rung[which] += 1
            self.host.doorbell(qid, which, value)
        self.old[place] = value


def test_nobody_waits_for_ever_for_completions_that_are_coalesced(host):
    queue = host.queues[1]
    assert host.admin(0x09, dwords=struct.pack("<II", 8, 7 | 2 << 8)).status == 0     # 8 completions or 200 µs
    entries = [host.entry(0x02, address=0x10000, count=LBA, dwords=blocks(0, 1)) for _ in range(8)]
    queue.submit(*entries)
    assert len(queue.wait(8)) == 8
    queue.submit(entries[0])                                            # alone: the timer ends the wait
    assert queue.wait()[0].status == 0


def test_interrupts_by_intx_follow_the_level_and_the_mask(start):
    from tests.kit.vfio_user_client import INTX, MSIX
    _, host = start(("block",))
    irq = os.eventfd(0, os.EFD_NONBLOCK)
    host.client.set_irqs(0x21, MSIX, 0, 0)
    host.client.set_irqs(0x24, INTX, 0, 1, fds=(irq,))
    for queue in host.queues.values():
        os.close(queue.irq)
        queue.irq = os.dup(irq)
    for _ in range(3):
        assert host.read_blocks(0, 1)[0].status == 0
        host.client.set_irqs(0x11, INTX, 0, 1)


def test_the_controller_goes_on_after_a_reset_by_cc_en(host):
    host.write32(0x14, 0)
    assert host.read32(CSTS) & 1 == 0
    host.enable()
    host.create_queue()
    assert host.read_blocks(0, 1)[0].status == 0


def test_a_client_without_shared_memory_is_served_by_messages(start):
    _, host = start(("block", "ocssd20"), shared=False)
    data = os.urandom(40 * LBA)
    assert host.write_blocks(3, data).status == 0
    assert host.read_blocks(3, 40)[1] == data
    assert host.client.dma_messages > 80
    assert fused(host, bytes(LBA), data[:LBA]) == [0, 0]
    assert host.io(0x02, address=1 << 40, count=LBA, dwords=blocks(0, 1)).status == 0x4004


def test_a_queue_that_is_gone_has_no_places_and_serves_nothing():
    """What is asked between two messages of a client that resets the controller meanwhile."""
    reactor = Reactor(0)
    queues = NvmeQueues(reactor, GuestMemory(reactor), bytearray(4096), 1)
    try:
        assert queues.next_place(1) is None
        assert queues.cq_places(1) == (0, [])
        assert queues.run_next(1) == 0
    finally:
        queues.close()


def test_overlapping_ranges_of_one_deallocation_are_gone_over_at_most_once(host):
    sectors = 900
    assert host.write_blocks(0, b"x" * LBA).status == 0
    ranges = host.put(struct.pack("<IIQ", 0, sectors, 0) * 256)
    assert host.io(0x09, address=ranges, count=4096, dwords=struct.pack("<II", 255, 4)).status == 0
    assert host.read_blocks(0, 1)[1] == bytes(LBA)
