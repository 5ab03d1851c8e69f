"""Drivers that break the rules of a virtqueue: cases VQ-01 to VQ-28 of the malformed-input matrix.

The reaction is one of: the queue breaks (its error fd is signalled, the loop reports it, nothing else suffers), the
guest gets an error status, or the request is served. In no case may the daemon touch memory that is not the guest's.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable

import pytest

from tests.kit.blk_driver import FLUSH, IN, IOERR, OK, OUT, UNTOUCHED, BlkRig, Request, header
from tests.kit.guest_memory import GuestMemory
from tests.kit.virtqueue import AVAIL, INDIRECT, NEXT, USED, WRITE, Packed, Seg, Split

NOWHERE = 0xDEAD_0000_0000  # a guest address that no region holds


def assert_breaks(rig: BlkRig, sentence: str) -> None:
    """Serve; the queue must be broken for this reason, with the error fd signalled, and stay so."""
    rig.device.process(64)
    assert sentence in (rig.device.fault(0) or "not broken")
    assert rig.queue.errors() == 1
    assert [token for token, _ in rig.reactor.events()] == [7]
    assert rig.device.process(64) == 0


def fails(rig: BlkRig, request: Request, indirect: bool = False) -> None:
    """Serve; the guest must see an I/O error and the queue must go on."""
    assert rig.run(request, indirect=indirect) == IOERR
    assert rig.run(rig.request(FLUSH)) == OK


# ---- what breaks a split ring ----------------------------------------------------------------------------------------


def avail_idx_jump(rig: BlkRig, q: Split) -> None:
    q.set_avail_idx(q.num + 1)


def avail_idx_backwards(rig: BlkRig, q: Split) -> None:
    rig.run(rig.request(FLUSH))
    q.set_avail_idx(q.avail_idx - 1)


def head_out_of_range(rig: BlkRig, q: Split) -> None:
    q.offer(q.num)


def next_out_of_range(rig: BlkRig, q: Split) -> None:
    q.set_desc(0, rig.memory.put(header(FLUSH)), 16, NEXT, next=q.num)
    q.offer(0)


def self_loop(rig: BlkRig, q: Split) -> None:
    q.set_desc(0, rig.memory.put(header(FLUSH)), 16, NEXT, next=0)
    q.offer(0)


def cycle_of_two(rig: BlkRig, q: Split) -> None:
    at = rig.memory.put(header(FLUSH))
    q.set_desc(0, at, 16, NEXT, next=1)
    q.set_desc(1, at, 16, NEXT, next=0)
    q.offer(0)


def long_cycle(rig: BlkRig, q: Split) -> None:
    at = rig.memory.put(header(FLUSH))
    for i in range(q.num):
        q.set_desc(i, at, 16, NEXT | WRITE, next=(i + 1) % q.num)
    q.offer(0)


def same_head_twice(rig: BlkRig, q: Split) -> None:
    q.submit(rig.request(FLUSH).chain)  # published alone: the two behind it are in flight together
    head = q.lay(rig.request(FLUSH).chain)
    q.offer(head)
    q.offer(head)


def readable_after_writable(rig: BlkRig, q: Split) -> None:
    request = rig.request(IN, in_size=512)
    q.submit([request.chain[1], request.chain[0], request.chain[2]])


def no_status(rig: BlkRig, q: Split) -> None:
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16)])


def status_not_writable(rig: BlkRig, q: Split) -> None:
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16), Seg(rig.memory.put(b"\0"), 1)])


def status_empty(rig: BlkRig, q: Split) -> None:
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16), Seg(rig.memory.put(b"\0"), 0, writable=True)])


def status_unmapped(rig: BlkRig, q: Split) -> None:
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16), Seg(NOWHERE, 1, writable=True)])


def status_wraps(rig: BlkRig, q: Split) -> None:
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16), Seg(2**64 - 1, 4098, writable=True)])


def indirect_of(change: Callable[[BlkRig, Seg], Seg]) -> Callable[[BlkRig, Split], None]:
    """A well-formed indirect request whose one descriptor is then changed."""

    def stimulus(rig: BlkRig, q: Split) -> None:
        q.submit([change(rig, q.indirect(rig.request(FLUSH).chain, packed=q.packed))])

    return stimulus


def nested(rig: BlkRig, seg: Seg) -> Seg:
    return Seg(rig.queue.indirect([seg], packed=rig.queue.packed).addr, 16, flags=INDIRECT)


def too_many_entries(rig: BlkRig, seg: Seg) -> Seg:
    return Seg(rig.memory.alloc(16 * 129), 16 * 129, flags=INDIRECT)


def at_region_end(rig: BlkRig, seg: Seg) -> Seg:
    region = rig.memory.regions[0]
    return Seg(region.gpa + region.size - 16, 32, flags=INDIRECT)


BAD_TABLES = {
    "len-not-16n": lambda rig, seg: Seg(seg.addr, seg.size - 1, flags=INDIRECT),
    "len-0": lambda rig, seg: Seg(seg.addr, 0, flags=INDIRECT),
    "too-many-entries": too_many_entries,
    "nested": nested,
    "unmapped": lambda rig, seg: Seg(NOWHERE, seg.size, flags=INDIRECT),
    "crossing-regions": at_region_end,
    "with-next": lambda rig, seg: Seg(seg.addr, seg.size, flags=INDIRECT | NEXT),
}

SPLIT_BREAKS = [
    ("VQ-01-avail-idx-jump", avail_idx_jump, "more is available"),
    ("VQ-02-avail-idx-backwards", avail_idx_backwards, "more is available"),
    ("VQ-03-head-index", head_out_of_range, "head index"),
    ("VQ-04-next-index", next_out_of_range, "next index"),
    ("VQ-05-self-loop", self_loop, "loops"),
    ("VQ-05-two-cycle", cycle_of_two, "loops"),
    ("VQ-05-long-cycle", long_cycle, "loops"),
    ("VQ-07-same-head-twice", same_head_twice, "available again"),
    ("VQ-11-readable-after-writable", readable_after_writable, "follows a writable"),
    ("VQ-12-status-missing", no_status, "no writable status"),
    ("VQ-12-status-not-writable", status_not_writable, "no writable status"),
    ("VQ-12-status-empty", status_empty, "no writable status"),
    ("VQ-08-status-unmapped", status_unmapped, "no writable status"),
    ("VQ-08-status-wraps", status_wraps, "no writable status"),
    *((f"VQ-15-indirect-{name}", indirect_of(change), "indirect") for name, change in BAD_TABLES.items()),
]


@pytest.mark.parametrize(("stimulus", "sentence"), [pytest.param(s, w, id=i) for i, s, w in SPLIT_BREAKS])
def test_a_split_ring_breaks_alone(stimulus: Callable[[BlkRig, Split], None], sentence: str) -> None:
    with BlkRig(Split) as rig:
        assert isinstance(rig.queue, Split)
        stimulus(rig, rig.queue)
        assert_breaks(rig, sentence)


# ---- what breaks a packed ring ---------------------------------------------------------------------------------------


def packed_used_too_early(rig: BlkRig, q: Packed) -> None:
    q.set_desc(0, rig.memory.put(header(FLUSH)), 16, 0, AVAIL | USED)


def packed_wrap_flipped_early(rig: BlkRig, q: Packed) -> None:
    for _ in range(q.num - 1):
        rig.run(rig.request(FLUSH), indirect=True)
    q.avail_wrap ^= 1  # the last slot of the lap is written with the next lap's flags: not available, and no crash
    q.set_desc(q.next_avail, 0, 0, 0, q.available_flags() | (AVAIL | USED))


def packed_id_out_of_range(rig: BlkRig, q: Packed) -> None:
    q.submit(rig.request(FLUSH).chain, id=q.num)


def packed_same_id_twice(rig: BlkRig, q: Packed) -> None:
    q.submit(rig.request(FLUSH).chain)
    q.submit(rig.request(FLUSH).chain, id=3)
    q.submit(rig.request(FLUSH).chain, id=3)


def packed_endless_chain(rig: BlkRig, q: Packed) -> None:
    at = rig.memory.put(header(FLUSH))
    for slot in range(q.num):
        q.set_desc(slot, at, 16, 0, NEXT | AVAIL)


def packed_indirect_in_chain(rig: BlkRig, q: Packed) -> None:
    table = q.indirect(rig.request(FLUSH).chain, packed=True)
    q.submit([Seg(rig.memory.put(header(FLUSH)), 16), table])


PACKED_BREAKS = [
    ("VQ-23-used-before-available", packed_used_too_early, "before it was available"),
    ("VQ-23-wrap-flipped-early", packed_wrap_flipped_early, "before it was available"),
    ("VQ-24-id-out-of-range", packed_id_out_of_range, "buffer id"),
    ("VQ-24-same-id-twice", packed_same_id_twice, "available again"),
    ("VQ-25-chain-longer-than-the-ring", packed_endless_chain, "loops"),
    ("VQ-26-indirect-in-a-chain", packed_indirect_in_chain, "indirect"),
    ("VQ-11-readable-after-writable", readable_after_writable, "follows a writable"),
    ("VQ-12-status-missing", no_status, "no writable status"),
    ("VQ-12-status-empty", status_empty, "no writable status"),
    *((f"VQ-15-indirect-{name}", indirect_of(change), "indirect") for name, change in BAD_TABLES.items()),
]


@pytest.mark.parametrize(("stimulus", "sentence"), [pytest.param(s, w, id=i) for i, s, w in PACKED_BREAKS])
def test_a_packed_ring_breaks_alone(stimulus: Callable[[BlkRig, Packed], None], sentence: str) -> None:
    with BlkRig(Packed) as rig:
        assert isinstance(rig.queue, Packed)
        stimulus(rig, rig.queue)
        assert_breaks(rig, sentence)


@pytest.mark.parametrize("layout", [Split, Packed])
def test_VQ_15_an_indirect_descriptor_that_was_not_negotiated_breaks_the_queue(layout: type) -> None:
    with BlkRig(layout, without=1 << 28) as rig:
        rig.queue.submit(rig.request(FLUSH).chain, indirect=True)
        assert_breaks(rig, "indirect")


@pytest.mark.parametrize("layout", [Split, Packed])
def test_VQ_06_a_chain_longer_than_seg_max_breaks_the_queue(layout: type) -> None:
    with BlkRig(layout, num=256) as rig:
        at = rig.memory.put(header(FLUSH))
        rig.queue.submit([Seg(at, 16)] * 128 + [Seg(rig.memory.alloc(1), 1, writable=True)])
        assert_breaks(rig, "too long")


@pytest.mark.parametrize("layout", [Split, Packed])
def test_a_chain_of_seg_max_segments_is_served(layout: type) -> None:
    with BlkRig(layout, num=128) as rig:
        chain = [Seg(rig.memory.put(header(IN)), 16)]
        data = rig.memory.put(b"\x55" * 126 * 512)
        chain += [Seg(data + 512 * i, 512, writable=True) for i in range(126)]
        request = Request(rig.memory, [*chain, Seg(rig.memory.put(b"\xaa"), 1, writable=True)], 0)
        request.status_at = request.chain[-1].addr
        assert rig.run(request) == OK
        assert rig.memory.read(data, 126 * 512) == bytes(126 * 512)


def test_an_indirect_table_may_be_longer_than_the_queue() -> None:
    """Linux fills tables up to seg_max, whatever the queue size is."""
    with BlkRig(Split, num=4) as rig:
        data = rig.memory.put(b"\x55" * 16 * 512)
        chain = [Seg(rig.memory.put(header(IN)), 16)]
        chain += [Seg(data + 512 * i, 512, writable=True) for i in range(16)]
        request = Request(rig.memory, [*chain, Seg(rig.memory.put(b"\xaa"), 1, writable=True)], 0)
        request.status_at = request.chain[-1].addr
        assert rig.run(request, indirect=True) == OK


# ---- what the guest gets an error status for -------------------------------------------------------------------------


@pytest.fixture(params=[Split, Packed])
def rig(request: pytest.FixtureRequest) -> BlkRig:
    return BlkRig(request.param, memory=GuestMemory((0, 1 << 20), (1 << 20, 1 << 20), (4 << 20, 1 << 20)))


BAD_DATA = {
    "VQ-08-unmapped": (NOWHERE, 4096),
    "VQ-08-wraps": (2**64 - 2048, 4096),
    "VQ-08-reaches-over-the-end": ((5 << 20) - 2048, 4096),
    "VQ-08-hole-in-the-middle": ((2 << 20) - 2048, (2 << 20) + 4096),
    "VQ-09-empty": (4096, 0),
    "VQ-10-larger-than-the-limit": (1 << 20, 0xFFFF_FFFF),
}


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("type", [IN, OUT], ids=["read", "write"])
@pytest.mark.parametrize("where", BAD_DATA)
def test_bad_data_segments_get_an_error_status(rig: BlkRig, where: str, type: int, indirect: bool) -> None:
    with rig:
        addr, size = BAD_DATA[where]
        request = rig.request(type, in_size=4096 * (type == IN), out=bytes(4096 * (type == OUT)))
        request.chain.insert(2, Seg(addr, size, writable=type == IN))
        fails(rig, request, indirect)


@pytest.mark.parametrize("total", [2**32, 2**33])
def test_VQ_10_segments_that_sum_to_more_than_32_bits_get_an_error_status(rig: BlkRig, total: int) -> None:
    with rig:
        request = rig.request(IN, in_size=512)
        request.chain[1:1] = []
        for _ in range(total >> 31):
            request.chain.insert(1, Seg(4096, 2**31, writable=False))
        fails(rig, request, indirect=True)


def test_VQ_09_an_empty_first_segment_gets_an_error_status(rig: BlkRig) -> None:
    with rig:
        request = rig.request(FLUSH)
        request.chain.insert(0, Seg(4096, 0))
        fails(rig, request)


def test_VQ_14_a_short_header_gets_an_error_status(rig: BlkRig) -> None:
    with rig:
        request = rig.request(FLUSH)
        request.chain[0].size = 15
        fails(rig, request)


def test_data_that_spans_adjoining_regions_is_served(rig: BlkRig) -> None:
    with rig:
        request = rig.request(OUT, 8, out=b"\0")
        request.chain[1] = Seg((1 << 20) - 2048, 4096)
        rig.memory.write((1 << 20) - 2048, bytes(range(256)) * 16)
        assert rig.run(request) == OK
        assert rig.read(8, 4096) == bytes(range(256)) * 16


# ---- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[8], [1, 2, 3], [4, 12]], ids=str)
def test_VQ_13_a_header_in_several_descriptors_is_served(rig: BlkRig, cuts: list[int]) -> None:
    with rig:
        rig.write(8, b"\x11" * 512)
        request = rig.request(IN, 8, in_size=512)
        at, edges = request.chain[0].addr, [0, *cuts, 16]
        request.chain[0:1] = [Seg(at + a, b - a) for a, b in itertools.pairwise(edges)]
        assert rig.run(request, indirect=True) == OK
        assert request.data == b"\x11" * 512


def test_VQ_13_header_and_data_in_one_descriptor_are_served(rig: BlkRig) -> None:
    with rig:
        at = rig.memory.put(header(OUT, 16) + b"\x22" * 1024)
        status_at = rig.memory.put(bytes([UNTOUCHED]))
        request = Request(rig.memory, [Seg(at, 16 + 1024), Seg(status_at, 1, writable=True)], status_at)
        assert rig.run(request) == OK
        assert rig.read(16, 1024) == b"\x22" * 1024


def test_VQ_12_data_and_status_in_one_descriptor_put_the_status_last(rig: BlkRig) -> None:
    with rig:
        rig.write(16, b"\x33" * 512)
        at = rig.memory.put(b"\xaa" * 513)
        request = Request(rig.memory, [Seg(rig.memory.put(header(IN, 16)), 16), Seg(at, 513, writable=True)], at + 512)
        assert rig.run(request) == OK
        assert rig.memory.read(at, 513) == b"\x33" * 512 + b"\0"


def test_a_normal_descriptor_may_precede_an_indirect_one_in_a_split_ring() -> None:
    with BlkRig(Split) as rig:
        request = rig.request(IN, in_size=512)
        rig.queue.submit([request.chain[0], rig.queue.indirect(request.chain[1:], packed=False)])
        rig.device.process(1)
        assert request.status == OK


@pytest.mark.parametrize("target", ["ring", "header", "status"])
def test_VQ_18_a_buffer_over_ring_header_or_status_does_no_harm(rig: BlkRig, target: str) -> None:
    with rig:
        request = rig.request(IN, in_size=512)
        at = {"ring": rig.queue.desc, "header": request.chain[0].addr, "status": request.status_at}[target]
        request.chain[1] = Seg(at & ~511, 512, writable=True)
        rig.queue.submit(request.chain)
        rig.device.process(64)
        rig.device.process(64)


def test_VQ_16_17_what_was_read_once_is_not_read_again() -> None:
    """A table that lies in its own data buffer is overwritten by the read that it describes."""
    with BlkRig(Split) as rig:
        rig.write(0, b"\xff" * 4096)
        page = rig.memory.alloc(4096, 4096)
        request = rig.request(IN, 0, in_size=1)
        table = b""
        for i, seg in enumerate([request.chain[0], Seg(page, 4096, writable=True), request.chain[2]]):
            flags = (WRITE if seg.writable else 0) | (NEXT if i < 2 else 0)
            table += seg.addr.to_bytes(8, "little") + seg.size.to_bytes(4, "little") + bytes([flags, 0, i + 1, 0])
        rig.memory.write(page, table)
        rig.queue.submit([Seg(page, len(table), flags=INDIRECT)])
        rig.device.process(64)
        assert request.status == OK
        assert rig.memory.read(page, 4096) == b"\xff" * 4096


def test_VQ_22_a_full_ring_is_not_touched_before_the_ring_starts() -> None:
    with BlkRig(Split, start=False) as rig:
        rig.device.set_features(rig.features)
        rig.add_memory()
        rig.queue.submit(rig.request(FLUSH).chain)
        rig.device.vring_num(0, rig.queue.num)
        rig.address()
        rig.device.vring_enable(0, True)
        assert rig.device.process(64) == 0
        assert rig.device.arm() is False
        rig.device.vring_kick(0, rig.queue.kick_fd)
        assert rig.device.process(64) == 1


def test_VQ_28_a_memory_file_that_cannot_be_written_is_refused() -> None:
    with BlkRig(Split, start=False) as rig:
        fd = os.open(f"/proc/self/fd/{rig.memory.regions[0].fd}", os.O_RDONLY)
        with pytest.raises(ValueError, match="cannot be mapped"):
            rig.device.mem_add(0, 1 << 20, 0x10000, 0, fd)
        os.close(fd)


def test_one_broken_ring_leaves_the_others_running() -> None:
    memory = GuestMemory()
    with BlkRig(Split, memory=memory, num_queues=2) as rig:
        other = Split(memory)
        rig.start(1, other)
        assert isinstance(rig.queue, Split)
        rig.queue.offer(99)
        request = rig.request(FLUSH)
        other.submit(request.chain)
        rig.device.process(64)
        assert rig.device.broken(0)
        assert not rig.device.broken(1)
        assert request.status == OK
        assert rig.reactor.events() == [(7, 0 << 8 | 2)]


def test_a_broken_ring_runs_again_once_it_is_addressed_anew() -> None:
    with BlkRig(Split) as rig:
        assert isinstance(rig.queue, Split)
        rig.queue.offer(99)
        rig.device.process(64)
        assert rig.device.broken(0)
        rig.queue = Split(rig.memory)
        rig.device.vring_get_base(0)
        rig.start()
        assert rig.run(rig.request(FLUSH)) == OK


def test_VQ_30_every_queue_is_served_in_one_turn_of_many() -> None:
    queues = 64
    memory = GuestMemory((0, 16 << 20))
    with BlkRig(Split, memory=memory, num_queues=queues, num=64) as rig:
        drivers = [rig.queue]
        for i in range(1, queues):
            drivers.append(Split(memory, 64))
            rig.start(i, drivers[-1])
        for q in drivers:
            for _ in range(20):
                q.submit(rig.request(FLUSH).chain)
        rig.device.process(64)
        assert all(len(q.completed()) == 16 for q in drivers)
        rig.device.process(64)
        assert all(len(q.completed()) == 4 for q in drivers)


@pytest.mark.parametrize("layout", [Split, Packed])
def test_VQ_16_17_a_driver_that_scribbles_while_we_read_does_no_harm(layout: type) -> None:
    """A second thread rewrites ring and tables as fast as it can; the device serves without the GIL meanwhile."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    stop = threading.Event()
    with BlkRig(layout, num=16) as rig:
        requests = [rig.request(IN, 8, in_size=4096) for _ in range(8)]
        tables = [rig.queue.indirect(request.chain, packed=rig.queue.packed) for request in requests]
        ring_bytes = rig.memory.read(rig.queue.desc, 16 * rig.queue.num)

        def scribble() -> None:
            while not stop.is_set():
                at = rng.choice([table.addr for table in tables] + [rig.queue.desc])
                rig.memory.write(at + rng.randrange(48), rng.randbytes(rng.choice([1, 2, 4, 8])))

        thread = threading.Thread(target=scribble)
        thread.start()
        for _ in range(300):
            if rig.device.broken(0):
                rig.device.vring_get_base(0)
                rig.memory.write(rig.queue.desc, ring_bytes)
                rig.queue = layout(rig.memory, 16)
                rig.start()
            for table in tables[: len(rig.queue.free)]:
                rig.queue.submit([table])
            rig.device.process(64)
        stop.set()
        thread.join()
        fresh = layout(rig.memory, 16)
        rig.device.vring_get_base(0)
        rig.queue = fresh
        rig.start()
        assert rig.run(rig.request(FLUSH)) == OK
