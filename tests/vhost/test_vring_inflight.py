"""In-flight records: a daemon that is killed at any instruction leaves a ring from which its successor goes on, with no
request lost and none completed twice. Also VU-43 and VU-44: records that lie.

The deterministic tests write the state that a killed daemon leaves after each step of the specification; the last test
kills real processes at random moments.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.blk_driver import FLUSH, IN, OK, BlkRig, make_target
from tests.kit.guest_memory import GuestMemory
from tests.kit.inflight_record import PackedRecord, Record, SplitRecord
from tests.kit.virtqueue import AVAIL, DESC, USED, Packed, Split

NUM = 8


class Crash:
    """One guest, a ring with three requests, and an in-flight region: what survives a daemon."""

    def __init__(self, layout: type[Split] | type[Packed]) -> None:
        self.memory = GuestMemory()
        self.layout = layout
        self.queue = layout(self.memory, NUM)
        self.first = BlkRig(queue=self.queue, memory=self.memory, start=False)
        self.first.device.set_features(self.first.features)
        self.fd, self.size, self.offset = self.first.device.inflight_get(1, NUM)
        self.record: Record = (SplitRecord if layout is Split else PackedRecord)(self.fd, self.size)
        self.requests = [self.first.request(IN, 8 * i, in_size=512) for i in range(3)]

    def successor(self, base: int) -> BlkRig:
        """A new daemon, set up by a front end that reconnects."""
        rig = BlkRig(queue=self.queue, memory=self.memory, start=False)
        rig.device.set_features(rig.features)
        rig.add_memory()
        rig.device.inflight_set(self.fd, self.size, self.offset, 1, NUM)
        rig.start(base=base)
        return rig

    def finish(self, base: int) -> list[int]:
        """Let a successor serve everything, and one request more; the ids completed by it, in order."""
        with self.successor(base) as rig:
            rig.device.process(64)
            done = [id for id, _ in self.queue.completed()]
            assert rig.device.fault(0) is None
            assert rig.run(rig.request(FLUSH), indirect=True) == OK
            assert self.record.inflight(NUM) == []
            rig.device.vring_get_base(0)
        return done


# ---- split: killed after each step -----------------------------------------------------------------------------------

SPLIT_STEPS = ["taken", "linked", "elements-written", "index-moved", "one-cleared", "all-cleared", "settled"]


def crash_split(after: str) -> tuple[Crash, list[int], list[int]]:
    """Three requests taken; a batch of the second and the first is being completed when the daemon dies.

    Returns the crash, the ids that the driver saw completed, and those that the successor must complete, in order.
    """
    crash = Crash(Split)
    q, record = crash.queue, crash.record
    assert isinstance(q, Split)
    heads = [q.submit(request.chain, indirect=True) for request in crash.requests]
    step = SPLIT_STEPS.index(after)
    record.set(version=1, desc_num=NUM, used_idx=0, last_batch_head=0)
    for counter, head in enumerate(heads):
        record.set_entry(head, counter=10 + counter, inflight=1)
    batch = [heads[1], heads[0]]
    if step >= 1:
        for head in batch:
            record.set_entry(head, next=record.get("last_batch_head"))
            record.set(last_batch_head=head)
    if step >= 2:
        for i, head in enumerate(batch):
            crash.memory.pack("<II", q.used + 4 + 8 * i, head, 513)
    if step >= 3:
        crash.memory.pack("<H", q.used + 2, 2)
    for i in range(max(0, min(step - 3, 2))):
        record.set_entry(batch[i], inflight=0)
    if step >= 6:
        record.set(used_idx=2)
    seen = [id for id, _ in q.completed()]
    return crash, seen, heads[2:] if step >= 3 else heads


@pytest.mark.parametrize("after", SPLIT_STEPS)
def test_a_split_ring_goes_on_after_a_kill_at_each_step(after: str) -> None:
    crash, seen, expected = crash_split(after)
    done = crash.finish(base=len(seen))
    assert done == expected
    assert sorted(seen + done) == [0, 1, 2]


def test_a_batch_that_was_published_is_remembered_across_an_index_wrap() -> None:
    crash = Crash(Split)
    q, record = crash.queue, crash.record
    assert isinstance(q, Split)
    q.avail_idx = q.last_used = 0xFFFF
    crash.memory.pack("<H", q.used + 2, 0xFFFF)
    heads = [q.submit(request.chain, indirect=True) for request in crash.requests]
    record.set(version=1, desc_num=NUM, used_idx=0xFFFF, last_batch_head=heads[1])
    for counter, head in enumerate(heads):
        record.set_entry(head, counter=counter, inflight=1)
    record.set_entry(heads[1], next=heads[0])
    for i, head in enumerate(heads[:2]):
        crash.memory.pack("<II", q.used + 4 + 8 * ((0xFFFF + i) % NUM), head, 513)
    crash.memory.pack("<H", q.used + 2, 1)
    assert [id for id, _ in q.completed()] == heads[:2]
    assert crash.finish(base=1) == heads[2:]


# ---- packed: killed after each step ----------------------------------------------------------------------------------

PACKED_STEPS = [
    "shadowed",
    "taken",
    "freed",
    "positions-written",
    "second-written",
    "published",
    "one-cleared",
    "all-cleared",
    "heads-settled",
    "settled",
]
SLOTS = [2, 1, 3]  # ring slots of the three requests


def crash_packed(after: str, start: int = 0) -> tuple[Crash, list[int], list[int]]:
    """As crash_split; the batch is the second request and then the first. The ring begins at slot *start*."""
    crash = Crash(Packed)
    q, record = crash.queue, crash.record
    assert isinstance(q, Packed)
    assert isinstance(record, PackedRecord)
    q.next_avail = q.next_used = start
    for slot in range(start):
        q.set_desc(slot, 0, 0, 0, AVAIL | USED)  # as the lap so far has left them
    flush = crash.first.request(FLUSH)
    crash.requests[0].chain = flush.chain
    ids = []
    for request, slots in zip(crash.requests, SLOTS, strict=True):
        ids.append(q.submit(request.chain, indirect=slots == 1))
    step = PACKED_STEPS.index(after)
    entry = 0
    record.set(version=1, desc_num=NUM, used_idx=start, old_used_idx=start, used_wrap=1, old_used_wrap=1)
    for i in range(NUM):
        record.set_entry(i, next=i + 1 if i + 1 < NUM else 0xFFFF)
    heads = []
    for counter, slots in enumerate(SLOTS):
        heads.append(entry)
        record.set_entry(entry, num=slots, last=entry + slots - 1, counter=7 + counter, inflight=1)
        for _ in range(slots):
            addr, size, id, flags = DESC.unpack(crash.memory.read(q.desc + 16 * ((start + entry) % NUM), 16))
            record.set_entry(entry, addr=addr, len=size, id=id, flags=flags)
            entry += 1
    record.set(free_head=6, old_free_head=6)
    if step == 0:  # the last of the three is not committed yet
        record.set(free_head=3, old_free_head=3)
    finish_packed_batch(crash, step, heads, ids, start)
    seen = [id for id, _ in q.completed()]
    return crash, seen, ids[2:] if step >= PACKED_STEPS.index("published") else ids


def finish_packed_batch(crash: Crash, step: int, heads: list[int], ids: list[int], start: int) -> None:
    """The steps from "freed" on: complete the second request, then the first."""
    q, record = crash.queue, crash.record
    at = PACKED_STEPS.index
    used = (start + 3) % NUM
    wrap = 0 if start + 3 >= NUM else 1
    second = (start + 1) % NUM
    if step >= at("freed"):
        record.set_entry(2, next=6)  # the second request's only entry
        record.set_entry(1, next=2)  # the first request's last entry
        record.set(free_head=0)
    if step >= at("positions-written"):
        record.set(used_idx=used, used_wrap=wrap)
    if step >= at("second-written"):
        flags = (AVAIL | USED) if second > start else 0
        crash.memory.write(q.desc + 16 * second + 8, DESC.pack(0, 1, ids[0], flags)[8:])
    if step >= at("published"):
        crash.memory.write(q.desc + 16 * start + 8, DESC.pack(0, 513, ids[1], AVAIL | USED)[8:])
    if step >= at("one-cleared"):
        record.set_entry(heads[1], inflight=0)
    if step >= at("all-cleared"):
        record.set_entry(heads[0], inflight=0)
    if step >= at("heads-settled"):
        record.set(old_free_head=0)
    if step >= at("settled"):
        record.set(old_used_idx=used, old_used_wrap=wrap)


@pytest.mark.parametrize("start", [0, 6], ids=["", "across-the-wrap"])
@pytest.mark.parametrize("after", PACKED_STEPS)
def test_a_packed_ring_goes_on_after_a_kill_at_each_step(after: str, start: int) -> None:
    crash, seen, expected = crash_packed(after, start)
    done = crash.finish(base=0x8000_8000 | start | start << 16)
    assert done == expected
    assert sorted(seen + done) == [0, 1, 2]


# ---- in the normal course of things ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [Split, Packed])
def test_a_clean_stop_leaves_a_fresh_record(layout: type) -> None:
    crash = Crash(layout)
    with crash.successor(0x8000_8000 if layout is Packed else 0) as rig:
        for request in crash.requests:
            assert rig.run(request) == OK
        assert crash.record.get("version") == 1
        rig.device.vring_get_base(0)
        assert crash.record.get("version") == 0


@pytest.mark.parametrize("layout", [Split, Packed])
def test_many_laps_with_a_record_keep_it_consistent(layout: type) -> None:
    crash = Crash(layout)
    with crash.successor(0x8000_8000 if layout is Packed else 0) as rig:
        for i in range(100):
            chains = [rig.request(IN, in_size=512) for _ in range(2)]
            ids = [rig.queue.submit(chain.chain, indirect=bool(i & 1)) for chain in chains]
            rig.device.process(64)
            assert [id for id, _ in rig.queue.completed()] == ids
            assert crash.record.inflight(NUM) == []
        assert crash.record.get("used_idx") == (200 if layout is Split else rig.queue.next_used)


def test_each_queue_has_a_region_of_its_own() -> None:
    memory = GuestMemory()
    with BlkRig(num_queues=2, memory=memory, start=False) as rig:
        other = Split(memory, 16)
        rig.device.set_features(rig.features)
        rig.add_memory()
        fd, size, offset = rig.device.inflight_get(2, 16)
        assert size == 2 * 320  # 16 + 16 * 16 bytes, padded to 64
        rig.device.inflight_set(fd, size, offset, 2, 16)
        rig.start()
        rig.start(1, other)
        other.submit(rig.request(FLUSH).chain)
        rig.device.process(64)
        assert SplitRecord(fd, size).get("used_idx") == 0
        assert SplitRecord(fd, size, 320).get("used_idx") == 1


# ---- records that lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queues", "size"), [(0, 16), (2, 16), (65535, 16), (1, 0), (1, 32769), (1, 65535)])
def test_VU_43_a_region_for_impossible_queues_is_refused(queues: int, size: int) -> None:
    with BlkRig(start=False) as rig:
        with pytest.raises(ValueError):
            rig.device.inflight_get(queues, size)
        fd = os.memfd_create("x")
        os.ftruncate(fd, 1 << 20)
        with pytest.raises(ValueError):
            rig.device.inflight_set(fd, 1 << 20, 0, queues, size)
        os.close(fd)


@pytest.mark.parametrize(
    ("size", "offset", "sentence"),
    [(64, 0, "too small"), (4096, 2**63, "beyond the end"), (4096, 4, "misaligned"), (2**63, 0, "beyond the end")],
)
def test_VU_44_a_region_that_does_not_fit_its_file_is_refused(size: int, offset: int, sentence: str) -> None:
    with BlkRig(start=False) as rig:
        fd = os.memfd_create("x")
        os.ftruncate(fd, 8192)
        with pytest.raises(ValueError, match=sentence):
            rig.device.inflight_set(fd, size, offset, 1, 16)
        os.close(fd)


def split_lies(record: Record) -> None:
    for i in range(NUM):
        record.set_entry(i, inflight=0xFF, counter=5, next=i)


LIES = {
    "version-7": lambda r: r.set(version=7, desc_num=NUM),
    "desc-num-mismatch": lambda r: r.set(version=1, desc_num=NUM * 2),
    "everything-in-flight-with-equal-counters": lambda r: (r.set(version=1, desc_num=NUM), split_lies(r)),
    "used-index-far-away": lambda r: r.set(version=1, desc_num=NUM, used_idx=0x4000),
    "last-batch-out-of-range": lambda r: (r.set(version=1, desc_num=NUM, used_idx=0xFFFE), r.set(**head_of(r, 0xFFFF))),
    "cyclic-next": lambda r: (r.set(version=1, desc_num=NUM, used_idx=0xFFFC), split_lies(r)),
}


def head_of(record: Record, value: int) -> dict[str, int]:
    return {"last_batch_head" if isinstance(record, SplitRecord) else "free_head": value}


@pytest.mark.parametrize("layout", [Split, Packed])
@pytest.mark.parametrize("lie", LIES)
def test_VU_44_a_record_that_lies_neither_crashes_nor_hurts_another_device(lie: str, layout: type) -> None:
    crash = Crash(layout)
    LIES[lie](crash.record)
    with crash.successor(0x8000_8000 if layout is Packed else 0) as rig:
        rig.queue.submit(crash.requests[0].chain)
        rig.device.process(64)
        rig.device.process(64)
        rig.device.vring_get_base(0)


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    layout=st.sampled_from([Split, Packed]), noise=st.binary(min_size=144, max_size=288), ring=st.binary(max_size=128)
)
def test_VU_44_random_records_never_crash(layout: type, noise: bytes, ring: bytes) -> None:
    crash = Crash(layout)
    crash.record.view[: min(len(noise), crash.size)] = noise[: crash.size]
    crash.record.set(version=1, desc_num=NUM)
    if layout is Packed:  # otherwise nearly every record is refused at once
        for name in ("used_idx", "old_used_idx", "free_head", "old_free_head"):
            crash.record.set(**{name: crash.record.get(name) % NUM})
    crash.memory.write(crash.queue.desc, ring)
    with crash.successor(0x8000_8000 if layout is Packed else 0) as rig:
        rig.device.process(64)
        rig.device.process(64)
        rig.device.vring_get_base(0)


@pytest.mark.parametrize("layout", [Split, Packed])
def test_a_truncated_record_ends_the_session_not_the_daemon(layout: type) -> None:
    crash = Crash(layout)
    with crash.successor(0x8000_8000 if layout is Packed else 0) as rig:
        os.ftruncate(crash.fd, 0)
        rig.queue.submit(crash.requests[0].chain)
        rig.device.process(64)
        assert rig.device.poisoned


# ---- real kills ------------------------------------------------------------------------------------------------------


def serve_until_killed(crash: Crash, base: int) -> int:
    """Fork a daemon that serves the ring; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            rig = crash.successor(base)
            while True:
                rig.device.process(3)
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("layout", [Split, Packed])
def test_killed_daemons_lose_nothing_and_complete_nothing_twice(layout: type) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    crash = Crash(layout)
    make_target()  # loads what the children need before they fork
    waiting: Counter[int] = Counter()
    completed = 0
    for _ in range(25):
        base = crash.queue.used_idx if isinstance(crash.queue, Split) else 0x8000_8000
        pid = serve_until_killed(crash, base)
        spins = rng.randrange(20000)
        while spins > 0 or rng.random() < 0.9:
            spins -= 1
            if crash.queue.free and len(waiting) < NUM // 2:
                waiting[crash.queue.submit(rng.choice(crash.requests).chain, indirect=True)] += 1
            for id, _size in crash.queue.completed():
                waiting[id] -= 1
                assert waiting[id] == 0, "completed twice, or never submitted"
                del waiting[id]
                completed += 1
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    base = crash.queue.used_idx if isinstance(crash.queue, Split) else 0x8000_8000
    with crash.successor(base) as rig:
        finished: list[int] = []
        for _ in range(10):  # one turn is bounded, and may end before the ring is empty
            rig.device.process(64)
            finished += [id for id, _ in crash.queue.completed()]
        assert rig.device.fault(0) is None
        assert sorted(finished) == sorted(waiting)
    assert completed > 100
