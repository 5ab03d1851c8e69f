"""Rings under a running loop: wake-ups that are never lost, completions that wait for the flash, drains that do not."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ocssd_daemon._fast import Reactor

from ocssd_daemon._physics import Timing, attach_timing
from ocssd_daemon.nand.latency import Latency
from tests.kit.blk_driver import FLUSH, GEOMETRY, IN, OK, BlkRig, Target, make_target
from tests.kit.virtqueue import Packed, Queue, Split

WAIT_S = 10.0


@contextmanager
def running(
    layout: type, *, event_idx: bool = False, poll_us: int = 0, target: Target | None = None
) -> Iterator[BlkRig]:
    """A rig served by a loop on a thread of its own."""
    reactor = Reactor(poll_us)
    with BlkRig(layout, event_idx=event_idx, reactor=reactor, attach=True, target=target) as rig:
        thread = reactor.start()
        try:
            yield rig
        finally:
            reactor.stop()
            thread.join(WAIT_S)


def wait_for(queue: Queue, count: int) -> list[int]:
    """Sleep on the call fd until *count* chains are completed; their ids in order."""
    done: list[int] = []
    while True:
        done += [id for id, _ in queue.completed()]
        if len(done) >= count:
            return done
        queue.want_calls(True)
        again = [id for id, _ in queue.completed()]
        done += again
        if not again:
            call = select.poll()
            call.register(queue.call_fd, select.POLLIN)
            assert call.poll(WAIT_S * 1000), f"no signal: {len(done)} of {count} completed"
            queue.calls()


@pytest.mark.parametrize("layout", [Split, Packed])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("poll_us", [0, 50])
def test_no_wakeup_is_lost_in_either_direction(layout: type, event_idx: bool, poll_us: int) -> None:
    with running(layout, event_idx=event_idx, poll_us=poll_us) as rig:
        request = rig.request(FLUSH)
        for i in range(400):
            count = 1 + i % 3
            for _ in range(count):
                rig.queue.submit(request.chain, indirect=True)
            if not kicks_are_suppressed(rig.queue, count):
                rig.queue.kick()
            assert len(wait_for(rig.queue, count)) == count


def kicks_are_suppressed(queue: Queue, added: int) -> bool:
    """What a driver looks at before it kicks."""
    if isinstance(queue, Packed):
        off_wrap, mode = queue.device_event
        if mode != 2:
            return mode == 1
        event = (off_wrap & 0x7FFF) - (0 if off_wrap >> 15 == queue.avail_wrap else queue.num)
        return not (queue.next_avail - event - 1) & 0xFFFF < added
    assert isinstance(queue, Split)
    if queue.event_idx:
        return not (queue.avail_idx - queue.avail_event - 1) & 0xFFFF < added
    return queue.device_suppresses


def test_VQ_21_an_idle_loop_uses_no_cpu_even_under_a_past_kick_storm() -> None:
    with running(Split) as rig:
        for _ in range(1000):
            rig.queue.kick()
        sleeps = wait_until_asleep(rig.reactor)
        time.sleep(0.2)
        assert rig.reactor.stats()["sleeps"] - sleeps < 5


def wait_until_asleep(reactor: Reactor) -> int:
    """Poll until the loop's turn counter stands still; its sleeps so far."""
    deadline = time.monotonic() + WAIT_S
    turns = -1
    while turns != reactor.stats()["turns"]:
        assert time.monotonic() < deadline
        turns = reactor.stats()["turns"]
        time.sleep(0.02)
    return reactor.stats()["sleeps"]


def slow_target(sense_ns: int) -> Target:
    """A disk whose reads take at least *sense_ns*, with one programmed sector at 0."""
    target = make_target()
    target.disk.write(0, bytes(4096) * 64)
    target.disk.flush()
    timing = Timing(GEOMETRY, Latency(sense_ns=(sense_ns,)))
    attach_timing(target.ftl.media, timing)
    return target


def test_a_completion_waits_for_the_flash() -> None:
    with running(Split, target=slow_target(20_000_000)) as rig:
        started = time.monotonic_ns()
        request = rig.request(IN, 0, in_size=512)
        rig.queue.submit(request.chain)
        rig.queue.kick()
        wait_for(rig.queue, 1)
        assert time.monotonic_ns() - started >= 20_000_000
        assert request.status == OK


@pytest.mark.parametrize("how", ["get_base", "reset", "mem_reset", "close"])
def test_VQ_29_31_what_is_in_flight_is_completed_before_a_stop(how: str) -> None:
    with running(Split, target=slow_target(5_000_000_000)) as rig:
        requests = [rig.request(IN, 8 * i, in_size=512) for i in range(3)]
        for request in requests:
            rig.queue.submit(request.chain)
        rig.queue.kick()
        deadline = time.monotonic() + WAIT_S
        while rig.device.stats()["requests"] < 3:
            assert time.monotonic() < deadline
            os.sched_yield()
        assert rig.queue.completed() == []
        device = rig.device
        {
            "get_base": lambda: device.vring_get_base(0),
            "reset": device.reset_device,
            "mem_reset": device.mem_reset,
            "close": device.close,
        }[how]()
        assert len(rig.queue.completed()) == 3
        assert [request.status for request in requests] == [OK] * 3


def test_the_same_head_may_not_come_again_while_its_completion_waits() -> None:
    with BlkRig(target=slow_target(5_000_000_000)) as rig:
        assert isinstance(rig.queue, Split)
        head = rig.queue.submit(rig.request(IN, in_size=512).chain)
        rig.device.process(64)
        rig.queue.offer(head)
        rig.device.process(64)
        assert rig.device.fault(0) == "a buffer was made available again before it was used"


def test_packed_chains_that_wait_keep_their_slots() -> None:
    """A driver that offers more than the ring holds while completions wait breaks the ring."""
    with BlkRig(Packed, num=4, target=slow_target(5_000_000_000)) as rig:
        assert isinstance(rig.queue, Packed)
        for id in (0, 1):
            rig.queue.submit(rig.request(IN, in_size=512).chain, id=id)
            rig.device.process(64)
        assert rig.device.fault(0) == "more is available than the ring holds"
