"""Who wakes whom: signals to the driver, suppression of its kicks, and the re-arming before a sleep. Case VQ-20."""

from __future__ import annotations

import os

import pytest

from tests.kit.blk_driver import FLUSH, BlkRig
from tests.kit.virtqueue import Packed, Split

LAYOUTS = pytest.mark.parametrize("layout", [Split, Packed], ids=["split", "packed"])
EVENT_IDX = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])


def submit(rig: BlkRig, count: int) -> None:
    for _ in range(count):
        rig.queue.submit(rig.request(FLUSH).chain, indirect=True)


@LAYOUTS
@EVENT_IDX
def test_a_driver_that_wants_to_know_is_signalled(layout: type, event_idx: bool) -> None:
    with BlkRig(layout, event_idx=event_idx) as rig:
        rig.queue.want_calls(True)
        submit(rig, 1)
        rig.device.process(64)
        assert rig.queue.calls() == 1


@LAYOUTS
@EVENT_IDX
def test_a_driver_that_polls_is_not_signalled(layout: type, event_idx: bool) -> None:
    with BlkRig(layout, event_idx=event_idx) as rig:
        for _ in range(5):
            rig.queue.want_calls(False)
            submit(rig, 3)
            rig.device.process(64)
            rig.queue.completed()
        assert rig.queue.calls() == 0


@LAYOUTS
def test_with_event_idx_a_batch_is_signalled_once(layout: type) -> None:
    with BlkRig(layout, event_idx=True) as rig:
        rig.queue.want_calls(True)
        submit(rig, 10)
        rig.device.process(64)
        assert rig.device.stats()["signals"] == 1


@LAYOUTS
@pytest.mark.parametrize("behind", [0, 1, 4, 9])
def test_the_signal_comes_when_the_event_is_passed(layout: type, behind: int) -> None:
    """The driver asks to hear of the completion *behind* further on."""
    with BlkRig(layout, event_idx=True, num=16) as rig:
        if isinstance(rig.queue, Split):
            rig.queue.set_used_event(behind)
        else:
            rig.queue.set_event(behind | 1 << 15, 2)
        for done in range(1, 12):
            submit(rig, 1)
            rig.device.process(64)
            assert rig.queue.calls() == (1 if done == behind + 1 else 0)
            rig.queue.completed()


@pytest.mark.parametrize("start", [0xFFF0, 0xFFFF])
def test_used_event_wraps_with_the_index(start: int) -> None:
    with BlkRig(Split, event_idx=True, start=False) as rig:
        q = rig.queue
        assert isinstance(q, Split)
        rig.device.set_features(rig.features)
        rig.add_memory()
        q.avail_idx = q.last_used = start
        rig.memory.pack("<H", q.avail + 2, start)
        rig.memory.pack("<H", q.used + 2, start)
        rig.start(base=start)
        for _ in range(40):
            q.want_calls(True)
            submit(rig, 1)
            rig.device.process(64)
            assert q.calls() == 1
            assert len(q.completed()) == 1


@pytest.mark.parametrize("offset", [16, 100, 0x7FFF])
def test_VQ_27_an_event_offset_outside_the_ring_means_always(offset: int) -> None:
    with BlkRig(Packed, event_idx=True, num=16) as rig:
        assert isinstance(rig.queue, Packed)
        rig.queue.set_event(offset | 1 << 15, 2)
        for _ in range(3):
            submit(rig, 1)
            rig.device.process(64)
            assert rig.queue.calls() == 1


def test_packed_events_follow_the_wrap() -> None:
    with BlkRig(Packed, event_idx=True, num=8) as rig:
        for _ in range(50):
            rig.queue.want_calls(True)
            submit(rig, 3)
            rig.device.process(64)
            assert rig.queue.calls() == 1
            rig.queue.completed()


@LAYOUTS
def test_kicks_are_suppressed_while_the_loop_polls_and_wanted_before_it_sleeps(layout: type) -> None:
    with BlkRig(layout) as rig:
        assert rig.device.arm() is False
        assert not rig.queue.device_suppresses
        rig.device.disarm()
        assert rig.queue.device_suppresses


@LAYOUTS
@EVENT_IDX
def test_arming_reports_work_that_came_meanwhile(layout: type, event_idx: bool) -> None:
    with BlkRig(layout, event_idx=event_idx) as rig:
        submit(rig, 1)
        assert rig.device.arm() is True
        rig.device.process(64)
        assert rig.device.arm() is False


def test_arming_asks_for_the_next_kick_by_event_index() -> None:
    with BlkRig(Split, event_idx=True) as rig:
        assert isinstance(rig.queue, Split)
        for done in range(5):
            rig.device.arm()
            assert rig.queue.avail_event == done
            submit(rig, 1)
            rig.device.process(64)
            rig.queue.completed()


def test_arming_a_packed_ring_asks_for_the_next_slot() -> None:
    with BlkRig(Packed, event_idx=True, num=4) as rig:
        assert isinstance(rig.queue, Packed)
        for done in range(10):
            rig.device.arm()
            wrap = 1 ^ (done // 4 & 1)
            assert rig.queue.device_event == (done % 4 | wrap << 15, 2)
            submit(rig, 1)
            rig.device.process(64)
            rig.queue.completed()


def test_a_ring_without_a_kick_fd_is_polled() -> None:
    with BlkRig() as rig:
        rig.device.vring_kick(0, -1)
        assert rig.device.arm() is True


def test_a_full_call_eventfd_does_not_block() -> None:
    with BlkRig() as rig:
        blocking = os.eventfd(0xFFFFFFFE, os.EFD_CLOEXEC)
        os.eventfd_write(blocking, 2**64 - 2 - 0xFFFFFFFE)
        rig.device.vring_call(0, blocking)
        submit(rig, 1)
        assert rig.device.process(64) == 1
        os.close(blocking)
