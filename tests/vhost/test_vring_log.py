"""The dirty log of a migration: every guest page that the device writes is marked, nothing beside the log is hurt."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.blk_driver import F_LOG_ALL, GET_ID, IN, OK, OUT, BlkRig
from tests.kit.guest_memory import PAGE, GuestMemory
from tests.kit.virtqueue import Packed, Seg, Split

GUEST_BYTES = 8 << 20
LOG_BYTES = GUEST_BYTES // PAGE // 8


class Migration:
    """A rig whose log is on, and which can say what changed in guest memory."""

    def __init__(self, layout: type, *, event_idx: bool = False, log_size: int = LOG_BYTES) -> None:
        self.rig = BlkRig(layout, num=64, event_idx=event_idx, memory=GuestMemory((0, GUEST_BYTES)))
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, max(log_size, 1))
        self.log = mmap.mmap(self.fd, max(log_size, 1))
        self.rig.device.log_base(self.fd, log_size, 0)
        self.rig.device.set_features(self.rig.features | F_LOG_ALL)
        self.rig.address(flags=1, log=self.rig.queue.used)

    def __enter__(self) -> Migration:
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.device.close()

    def snapshot(self) -> list[bytes]:
        return [self.rig.memory.read(at, PAGE) for at in range(0, GUEST_BYTES, PAGE)]

    def marked(self) -> set[int]:
        """Pages in the log; clears it, as a front end does."""
        pages = {8 * i + bit for i, byte in enumerate(self.log[:]) for bit in range(8) if byte >> bit & 1}
        self.log[:] = bytes(len(self.log))
        return pages


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from([Split, Packed]),
    event_idx=st.booleans(),
    sizes=st.lists(st.integers(1, 24).map(lambda n: 512 * n), min_size=1, max_size=5),
    indirect=st.booleans(),
)
def test_every_page_that_changed_is_marked(layout: type, event_idx: bool, sizes: list[int], indirect: bool) -> None:
    with Migration(layout, event_idx=event_idx) as migration:
        rig = migration.rig
        requests = [rig.request(IN, 0, in_size=size) for size in sizes]
        for request in requests:
            rig.queue.submit(request.chain, indirect=indirect)
        before = migration.snapshot()
        migration.marked()
        rig.device.disarm()
        rig.device.process(64)
        rig.device.arm()
        after = migration.snapshot()
        changed = {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
        marked = migration.marked()
        assert changed <= marked
        written = {page for r in requests for page in range(r.data_at // PAGE, (r.status_at // PAGE) + 1)}
        rings = {at // PAGE for at in range(rig.queue.desc, rig.queue.used + 1024, PAGE)} | {rig.queue.used // PAGE}
        assert marked <= written | rings | {(rig.queue.used + 1023) // PAGE}


def test_a_write_request_marks_only_status_and_ring() -> None:
    with Migration(Split) as migration:
        rig = migration.rig
        request = rig.request(OUT, 0, out=bytes(65536))
        migration.marked()
        assert rig.run(request) == OK
        assert migration.marked() == {request.status_at // PAGE, rig.queue.used // PAGE}


def test_nothing_is_marked_while_logging_is_off() -> None:
    with Migration(Split) as migration:
        migration.rig.device.set_features(migration.rig.features)
        migration.marked()
        migration.rig.read(0, 4096)
        assert migration.marked() == set()


def test_turning_the_log_on_and_off_leaves_a_running_ring_alone() -> None:
    with Migration(Split) as migration:
        rig = migration.rig
        for flags in (1, 0, 1, 0):
            rig.address(flags=flags, log=rig.queue.used)
            assert rig.read(0, 512) == bytes(512)


def test_the_identification_and_scattered_segments_are_marked() -> None:
    with Migration(Split) as migration:
        rig = migration.rig
        request = rig.request(GET_ID, in_size=20)
        request.chain[1:2] = [Seg(5 * PAGE, 10, writable=True), Seg(900 * PAGE, 10, writable=True)]
        migration.marked()
        rig.run(request)
        assert {5, 900} <= migration.marked()


@pytest.mark.parametrize("size", [1, 8])
def test_VU_45_pages_beyond_a_small_log_are_dropped(size: int) -> None:
    with Migration(Split, log_size=size) as migration:
        guard = bytes(16)
        migration.rig.read(0, 65536)
        assert migration.rig.read(8, 4096) == bytes(4096)
        assert len(migration.log) == size
        assert guard == bytes(16)


@pytest.mark.parametrize("log", [2**63, 2**64 - 1, 2**64 - 4096, GUEST_BYTES])
def test_VU_46_a_log_address_outside_the_log_is_skipped(log: int) -> None:
    with Migration(Split) as migration:
        rig = migration.rig
        rig.address(flags=1, log=log)
        assert rig.read(0, 512) == bytes(512)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (1 << 40, 0), (4096, 2**63), (2**63, 2**63)])
def test_VU_45_an_impossible_log_is_refused(size: int, offset: int) -> None:
    with Migration(Split) as migration, pytest.raises(ValueError):
        migration.rig.device.log_base(migration.fd, size, offset)


def test_a_truncated_log_ends_the_session_not_the_daemon() -> None:
    with Migration(Split) as migration:
        os.ftruncate(migration.fd, 0)
        migration.rig.queue.submit(migration.rig.request(IN, in_size=512).chain)
        migration.rig.device.process(64)
        assert migration.rig.device.poisoned
