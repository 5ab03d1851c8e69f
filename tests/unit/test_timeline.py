"""Timelines never hold two operations at once; PUs and channels keep the order they promise."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from ocssd_daemon._physics import Timeline, Timing
from ocssd_daemon._sim import Host, Workload
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.latency import PROFILES, resolve
from tests.kit.virtual import rig

Span = tuple[int, int]

requests = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=120)
commands = st.lists(
    st.tuples(
        st.integers(0, 50),  # ns since the command before
        st.sampled_from(["sense", "program", "erase", "background"]),
        st.integers(0, 3),  # PU
        st.integers(0, 7),  # row
    ),
    max_size=80,
)


def overlapping(spans: list[Span]) -> list[tuple[Span, Span]]:
    ordered = sorted(span for span in spans if span[0] < span[1])
    return [(a, b) for a, b in itertools.pairwise(ordered) if b[0] < a[1]]


def timing(**numbers: object) -> Timing:
    geometry = Geometry(groups=2, pus=2, chunks=4, sectors=64, ws_min=4, ws_opt=8, mw_cunits=0)
    defaults = {"sense_ns": (40,), "program_ns": (300,), "erase_ns": 900, "transfer_ns_per_sector": 7}
    return Timing(geometry, resolve("none", {**defaults, **numbers}, geometry))


@given(requests)
def test_reservations_of_one_timeline_never_overlap(asked: list[Span]) -> None:
    line = Timeline()
    taken = []
    for earliest, length in asked:
        start = line.reserve(earliest, length)
        assert start >= earliest
        taken.append((start, start + length))
    assert overlapping(taken) == []


@given(requests)
def test_a_reservation_takes_the_first_gap_that_holds_it(asked: list[Span]) -> None:
    line = Timeline()
    busy: set[int] = set()
    for earliest, length in asked:
        start = line.reserve(earliest, length)
        if line.gaps_given_up:
            break
        expected = earliest
        while any(ns in busy for ns in range(expected, expected + length)):
            expected += 1
        assert start == expected
        busy.update(range(start, start + length))


@given(requests)
def test_slots_are_sorted_and_apart(asked: list[Span]) -> None:
    line = Timeline()
    for earliest, length in asked:
        line.reserve(earliest, length)
    slots = line.slots()
    assert all(start < end for start, end in slots)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(slots))


@given(requests, st.integers(0, 500), st.integers(1, 60))
def test_cutting_in_keeps_all_the_work_and_leaves_what_is_earlier_alone(
    asked: list[Span], at: int, ns: int
) -> None:
    line = Timeline()
    for earliest, length in asked:
        line.reserve(earliest, length)
    before = line.slots()
    given_up = line.gaps_given_up
    line.cut_in(at, ns)
    after = line.slots()
    if line.gaps_given_up == given_up:
        assert sum(b - a for a, b in after) == sum(b - a for a, b in before) + ns
    assert [s for s in after if s[1] < at] == [
        s for s in before if s[1] < at
    ] or line.gaps_given_up > given_up


def run(t: Timing, asked: list[tuple[int, str, int, int]]) -> dict[str, list[tuple[int, int, int]]]:
    """Issue *asked*; per kind a list of (PU, issued, end)."""
    ends: dict[str, list[tuple[int, int, int]]] = {"sense": [], "program": [], "erase": [], "background": []}
    now = 0
    for later, what, pu, row in asked:
        now += later
        t.begin(now)
        if what in ("sense", "background"):
            end = t.sense(pu, 0, row * 8, background=what == "background")
        elif what == "program":
            end = t.program(pu, row * 8, 8)
        else:
            end = t.erase(pu)
        ends[what].append((pu, now, end))
    return ends


@given(commands, st.booleans())
@settings(max_examples=200)
def test_an_operation_never_ends_before_its_own_time_has_passed(
    asked: list[tuple[int, str, int, int]], suspend: bool
) -> None:
    least = {"sense": 47, "background": 47, "program": 356, "erase": 900}
    for what, done in run(timing(suspend=suspend), asked).items():
        assert all(end - issued >= least[what] for _, issued, end in done)


@given(commands)
@settings(max_examples=200)
def test_programs_and_erases_of_one_pu_end_in_order_and_one_at_a_time(
    asked: list[tuple[int, str, int, int]],
) -> None:
    t = timing()
    spans: dict[int, list[Span]] = {}
    now = 0
    for later, what, pu, row in asked:
        now += later
        t.begin(now)
        if what == "program":
            end = t.program(pu, row * 8, 8)
            spans.setdefault(pu, []).append((end - 300, end))
        elif what == "erase":
            end = t.erase(pu)
            spans.setdefault(pu, []).append((end - 900, end))
    for taken in spans.values():
        assert taken == sorted(taken)
        assert overlapping(taken) == []


@given(commands)
@settings(max_examples=200)
def test_a_channel_carries_no_more_than_one_sector_at_a_time(asked: list[tuple[int, str, int, int]]) -> None:
    t = timing()
    carried: dict[int, list[Span]] = {0: [], 1: []}
    now = 0
    for later, _, pu, row in asked:
        now += later
        t.begin(now)
        end = t.sense(pu, 0, row * 8)
        carried[pu // 2].append((end - 7, end))
    for spans in carried.values():
        assert overlapping(spans) == []


class Told(NamedTuple):
    """An operation of a PU as it was told when it was issued."""

    what: str
    length_ns: int
    end_ns: int
    shifted_ns: int


def issue(t: Timing, asked: list[tuple[int, str, int, int]]) -> dict[int, list[Told]]:
    """Issue *asked*. Per PU, what was told of each operation, in the order of issue."""
    told: dict[int, list[Told]] = {}
    now = 0
    for later, what, pu, row in asked:
        now += later
        t.begin(now)
        if what == "program":
            entry = Told(what, 300, t.program(pu, row * 8, 8), t.shifted_ns(pu))
        elif what == "erase":
            entry = Told(what, 900, t.erase(pu), t.shifted_ns(pu))
        else:
            entry = Told("sense", 40, t.sense(pu, 0, row * 8) - 7, t.shifted_ns(pu))
        told.setdefault(pu, []).append(entry)
    return told


@given(commands)
@settings(max_examples=300)
def test_with_suspension_programs_and_erases_end_in_order_with_all_their_time_and_what_interrupted_them(
    asked: list[tuple[int, str, int, int]],
) -> None:
    t = timing(suspend=True, suspend_ns=5)
    for pu, told in issue(t, asked).items():
        senses = sum(entry.what == "sense" for entry in told)
        last = 0
        for entry in told:
            if entry.what == "sense":
                continue
            end = t.revised(pu, entry.end_ns, entry.shifted_ns)
            assert end - last >= entry.length_ns  # one at a time, in order
            assert end >= entry.end_ns  # an end moves back only
            assert end - entry.end_ns <= senses * 45  # by no more than what was sensed
            last = end


@given(commands)
@settings(max_examples=300)
def test_with_suspension_a_pu_is_busy_for_all_that_it_does(asked: list[tuple[int, str, int, int]]) -> None:
    """Nothing of a PU overlaps: what it does in all, if nothing of it were forgotten, is as long as its busy time."""
    t = timing(suspend=True, suspend_ns=5)
    told = issue(t, [(0, what, pu, row) for _, what, pu, row in asked])  # all at once: nothing is forgotten
    cost = {"sense": 40 + 5, "program": 300, "erase": 900}
    for pu, entries in told.items():
        assert sum(b - a for a, b in t.busy(pu)) == sum(cost[entry.what] for entry in entries)


@given(commands, st.booleans())
@settings(max_examples=200)
def test_a_channel_is_busy_for_all_that_it_carries(asked: list[tuple[int, str, int, int]], suspend: bool) -> None:
    """Its slots are disjoint, so over-subscribed it would be busy for less. A sector takes 7 ns, programs carry 8."""
    t = timing(suspend=suspend, suspend_ns=5)
    at_once = [(0, what, pu, row) for _, what, pu, row in asked[:60]]  # nothing is forgotten, and no gap given up
    carried = {0: 0, 1: 0}
    for entry, (_, _, pu, _) in zip(flat(issue(t, at_once), at_once), at_once, strict=True):
        carried[pu // 2] += {"sense": 7, "program": 56, "erase": 0}[entry.what]
    for channel, ns in carried.items():
        slots = t.channel_busy(channel)
        assert overlapping(slots) == []
        assert sum(b - a for a, b in slots) == ns


def flat(told: dict[int, list[Told]], asked: list[tuple[int, str, int, int]]) -> list[Told]:
    """What was told, in the order of *asked*."""
    rest = {pu: iter(entries) for pu, entries in told.items()}
    return [next(rest[pu]) for _, _, pu, _ in asked]


def test_an_end_that_was_told_moves_when_a_later_read_interrupts_it() -> None:
    t = timing(suspend=True, suspend_ns=5)
    t.begin(0)
    first, second = t.erase(0), t.erase(0)
    assert (first, second) == (900, 1800)
    t.begin(100)
    t.sense(0, 0, 0)
    assert [t.revised(0, end, 0) for end in (first, second)] == [945, 1845]
    t.begin(1000)
    t.sense(0, 0, 0)  # the first has ended by then
    assert [t.revised(0, end, 0) for end in (first, second)] == [945, 1890]


def test_so_do_many_of_them() -> None:
    t = timing(suspend=True, suspend_ns=5)
    t.begin(0)
    end = t.erase(0)
    for i in range(100):  # more than are remembered one by one
        t.begin(45 * i)
        t.sense(0, 0, 8 * (i % 8))
    assert t.revised(0, end, 0) == 900 + 100 * 45


def test_the_write_buffer_gives_its_place_back_when_the_suspended_program_has_ended() -> None:
    """Two writes of a unit fill the buffer; a third waits for the first program, which a read has suspended."""
    numbers = {"sense_ns": (40_000,), "program_ns": (800_000,), "erase_ns": 900_000, "transfer_ns_per_sector": 0,
               "buffer_sectors": 8, "suspend": True, "suspend_ns": 5_000}  # fmt: skip

    def third_write_ends(reads: int) -> int:
        device = rig(numbers=numbers)
        host = Host(device.disk, 64)
        host.record()
        writes = Workload("uniform", 1000, seed=1)
        host.run(writes, 8)
        for _ in range(reads):
            host.run(Workload("sequential", 1, reads=1.0), 1)
        host.run(writes, 1)
        return int(host.latency("write")["max"])

    assert third_write_ends(0) == 800_000
    assert third_write_ends(1) == 845_000


def test_shadow_pairing_writes_a_lower_page_ahead_of_the_upper_pages_of_the_lines_before() -> None:
    def kinds(rows: int, names: int, pairing: str) -> list[int]:
        geometry = Geometry(groups=1, pus=1, chunks=4, sectors=8 * rows, ws_min=4, ws_opt=8, mw_cunits=0)
        numbers = {"sense_ns": tuple(range(1, names + 1)), "pairing": pairing}
        latency = resolve("none", numbers, geometry)
        assert latency is not None
        return latency.kinds_of_rows(geometry.sectors)

    assert kinds(12, 3, "shadow") == [0, 0, 1, 0, 1, 2, 0, 1, 2, 1, 2, 2]
    assert kinds(8, 2, "shadow") == [0, 0, 1, 0, 1, 0, 1, 1]
    assert kinds(6, 3, "modulo") == [0, 1, 2, 0, 1, 2]
    assert kinds(7, 3, "shadow") == [0, 0, 1, 0, 1, 2, 1]
    for names in (1, 2, 3, 4):  # each word line has one page of each kind
        assert sorted(kinds(12, names, "shadow")) == sorted(kinds(12, names, "modulo"))


def test_the_profiles_of_flash_with_several_bits_a_cell_pair_their_pages() -> None:
    assert {name: profile.pairing for name, profile in PROFILES.items()} == {
        "none": "modulo", "slc": "modulo", "mlc": "shadow", "tlc": "shadow", "qlc": "shadow"
    }  # fmt: skip


def test_the_kind_of_the_row_decides_under_pairing_too() -> None:
    t = timing(sense_ns=(10, 20, 30), program_ns=(100, 200, 300), transfer_ns_per_sector=0, pairing="shadow")
    t.begin(0)
    assert [t.sense(0, 0, row * 8) for row in range(4)] == [10, 20, 40, 50]


def test_planes_work_together_within_one_command_and_one_after_the_other_without() -> None:
    together, alone = timing(planes=2), timing(planes=1)
    for t in (together, alone):
        t.begin(0)
    assert together.program(0, 0, 8) == 8 * 7 + 300  # one row of both planes
    assert alone.program(0, 0, 8) == 4 * 7 + 2 * 300  # two rows; the second transfer overlaps the first program


def test_sectors_of_one_row_cost_one_sense_in_one_command_and_two_in_two() -> None:
    t = timing()
    t.begin(0)
    assert [t.sense(0, 0, sector) for sector in (0, 1, 7)] == [47, 54, 61]
    t.begin(100)
    assert t.sense(0, 0, 1) == 147
    assert t.stats()["senses"] == 2


def test_the_page_kind_decides_what_a_sense_and_a_program_cost() -> None:
    t = timing(sense_ns=(10, 20, 30), program_ns=(100, 200, 300), transfer_ns_per_sector=0)
    t.begin(0)
    assert [t.sense(0, 0, row * 8) for row in range(4)] == [10, 30, 60, 70]
    assert t.program(1, 0, 24) == 600  # rows 0, 1, 2 one after the other


def test_a_sense_waits_for_an_erase_unless_it_may_suspend_it() -> None:
    waiting, suspending = timing(), timing(suspend=True, suspend_ns=5)
    for t in (waiting, suspending):
        t.begin(0)
        assert t.erase(0) == 900
        t.begin(100)
    assert waiting.sense(0, 0, 0) == 900 + 40 + 7
    assert suspending.sense(0, 0, 0) == 100 + 5 + 40 + 7
    assert suspending.busy(0) == [(0, 945)]  # the erase ends later by as much
    assert suspending.stats()["suspensions"] == 1


def test_a_transfer_in_the_far_future_does_not_block_the_channel_now() -> None:
    t = timing()
    t.begin(0)
    t.erase(0)
    assert t.sense(0, 0, 0) == 947
    assert t.sense(1, 4, 0) == 47
