"""A daemon killed at every single instruction: nothing is lost, nothing completed twice, whatever its successor finds.

A child serves a ring one machine instruction at a time. Each state of the ring and the in-flight record that differs
from the one before is what some kill leaves, so the list of states is complete. From each of them a successor goes on,
once as the driver left the ring and once after the driver has reused what it got back. A successor is itself killed at
each instruction of its recovery, and, from some of the states, at each instruction of all that it does.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.kit.blk_driver import FLUSH, IN, BlkRig, make_target
from tests.kit.guest_memory import GuestMemory
from tests.kit.single_step import single_steps
from tests.kit.virtqueue import AVAIL, USED, Packed, Split

from .test_vring_reactor import slow_target

NUM = 8
DRIVER_STATE = ("avail_idx", "last_used", "chains", "next_avail", "avail_wrap", "next_used", "used_wrap", "slots_of")
SAMPLE = 9  # every ninth state is gone into with all that a successor does; they differ by one store


@dataclass(frozen=True)
class Shared:
    """All that outlives a daemon."""

    ring: bytes
    record: bytes


@dataclass
class Scene:
    """A guest with three requests on its ring, which stands at *start*. *slow*: a flush overtakes the reads."""

    layout: type[Split] | type[Packed]
    start: int = 0
    slow: bool = False
    memory: GuestMemory = field(default_factory=GuestMemory)

    def __post_init__(self) -> None:
        self.ring_at = self.memory.alloc(0)
        self.queue = self.layout(self.memory, NUM)
        self.ring_bytes = self.memory.alloc(0) - self.ring_at
        self.base = 0x8000_8000 | self.start << 16 | self.start if self.queue.packed else self.start
        self._begin()
        with self._rig() as rig:
            self.inflight = rig.device.inflight_get(1, NUM)
            self.flush = rig.request(FLUSH).chain
            read = rig.request(IN, 0, in_size=512).chain
        self.ids = [
            self.queue.submit(read, indirect=True),
            self.queue.submit(self.flush),
            self.queue.submit(read),
        ]
        self.driver = {n: copy.deepcopy(v) for n, v in vars(self.queue).items() if n in (*DRIVER_STATE, "free")}
        self.untouched = self.shared()

    def _begin(self) -> None:
        """As the laps so far have left the ring."""
        q = self.queue
        if isinstance(q, Split):
            q.avail_idx = q.last_used = self.start
            q.memory.store_u16(q.used + 2, self.start)
            return
        assert isinstance(q, Packed)
        q.next_avail = q.next_used = self.start
        for slot in range(self.start):
            q.set_desc(slot, 0, 0, 0, AVAIL | USED)

    def _rig(self) -> BlkRig:
        target = slow_target(1_000_000) if self.slow else make_target()
        rig = BlkRig(queue=self.queue, memory=self.memory, start=False, target=target)
        rig.device.set_features(rig.features)
        rig.add_memory()
        return rig

    def shared(self) -> Shared:
        fd, size, _ = self.inflight
        return Shared(self.memory.read(self.ring_at, self.ring_bytes), os.pread(fd, size, 0))

    def restore(self, state: Shared) -> None:
        """As it was at the kill; the driver has not looked at the ring since."""
        self.memory.write(self.ring_at, state.ring)
        os.pwrite(self.inflight[0], state.record, 0)
        vars(self.queue).update(copy.deepcopy(self.driver))

    def room(self) -> int:
        """Ring slots that the driver may use."""
        q = self.queue
        assert isinstance(q, (Split, Packed))
        return NUM - sum(q.slots_of.values()) if isinstance(q, Packed) else len(q.free)

    # ---- daemons -------------------------------------------------------------------------------------------------

    def daemon(self) -> tuple[BlkRig, Callable[[], None]]:
        """A daemon to which the front end has said everything but the kick fd, and that step: the ring starts."""
        rig = self._rig()
        device = rig.device
        device.inflight_set(*self.inflight, 1, NUM)
        device.vring_num(0, NUM)
        device.vring_base(0, self.queue.used_idx if isinstance(self.queue, Split) else self.base)
        rig.address()
        device.vring_enable(0, True)
        return rig, lambda: device.vring_kick(0, self.queue.kick_fd)

    def recover(self) -> Callable[[], None]:
        return self.daemon()[1]

    def live(self) -> Callable[[], None]:
        """Start, serve, complete what waits for the flash, and stop."""
        rig, start = self.daemon()

        def serve() -> None:
            start()
            rig.device.process(64)
            rig.device.close()

        return serve

    def killed_in(self, prepare: Callable[[], Callable[[], None]], begin: Shared) -> list[Shared]:
        """Every state that a kill can leave of a daemon that finds *begin*."""
        self.restore(begin)
        states = [begin]
        for _ in single_steps(prepare):
            now = self.shared()
            if now != states[-1]:
                states.append(now)
        return states

    # ---- the promise ---------------------------------------------------------------------------------------------

    def check(self, state: Shared, reuse: bool) -> None:
        """A successor that finds *state* completes what the driver did not see completed, once, and goes on."""
        self.restore(state)
        q = self.queue
        seen = [id for id, _ in q.completed()]
        outstanding = [id for id in self.ids if id not in seen]
        assert sorted(seen + outstanding) == sorted(self.ids), "completed twice"
        while reuse and self.room() >= len(self.flush):
            outstanding.append(q.submit(self.flush))
        rig, start = self.daemon()
        with rig:
            start()
            rig.device.process(64)
            done = [id for id, _ in q.completed()]
            rig.device.close()
            done += [id for id, _ in q.completed()]
        assert sorted(done) == sorted(outstanding)

    def check_all(self, states: Iterable[Shared]) -> None:
        for i, state in enumerate(states):
            for reuse in (False, True):
                try:
                    self.check(state, reuse)
                except AssertionError as error:
                    raise AssertionError(f"state {i}, reuse={reuse}: {error}\n{state.ring.hex(' ', 16)}") from error


SCENES: list[Any] = [
    pytest.param(Split, 0, False, id="split"),
    pytest.param(Split, 0xFFFE, True, id="split-wraps-overtaken"),
    pytest.param(Packed, 0, False, id="packed"),
    pytest.param(Packed, 3, True, id="packed-wraps-overtaken"),
]


@pytest.mark.parametrize(("layout", "start", "slow"), SCENES)
def test_killed_at_every_instruction(layout: type[Split] | type[Packed], start: int, slow: bool) -> None:
    scene = Scene(layout, start, slow)
    states = scene.killed_in(scene.live, scene.untouched)
    assert len(set(states)) > 15, "the child did not serve"
    scene.check_all(states)


@pytest.mark.parametrize(("layout", "start", "slow"), SCENES[1::2])
def test_killed_again_at_every_instruction_of_the_recovery(
    layout: type[Split] | type[Packed], start: int, slow: bool
) -> None:
    scene = Scene(layout, start, slow)
    states = scene.killed_in(scene.live, scene.untouched)
    again: dict[Shared, None] = {}
    for state in states:
        again.update(dict.fromkeys(scene.killed_in(scene.recover, state)))
    for state in states[::SAMPLE]:
        again.update(dict.fromkeys(scene.killed_in(scene.live, state)))
    scene.check_all(again)


def test_the_kit_s_driver_makes_a_descriptor_available_once() -> None:
    """A device may answer at once: a second store of the same flags would take the answer back."""
    scene = Scene(Packed)
    q = scene.queue
    slot = q.next_avail
    seen = 0
    for _ in single_steps(lambda: lambda: q.submit(scene.flush, indirect=True)):
        if q.slot_flags(slot) & (AVAIL | USED) == AVAIL:
            seen += 1
            q.memory.store_u16(q.desc + 16 * slot + 14, AVAIL | USED)
    assert seen == 1
