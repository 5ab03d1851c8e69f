"""Simple cases in which the model's answer is known in closed form: the simulation must agree within 1 %."""

from __future__ import annotations

import pytest

from ocssd_daemon._sim import Workload
from tests.kit.virtual import NUMBERS, PROGRAM_NS, SENSE_NS, TRANSFER_NS, measure, rig

ONE_PERCENT = 0.01


def reads(span: int) -> Workload:
    return Workload("uniform", span, reads=1.0, seed=3)


def test_an_unloaded_read_takes_sense_plus_transfer() -> None:
    device = rig()
    done = measure(device, reads(device.ftl.capacity_sectors), ios=2_000, depth=1)
    assert done.reads is not None
    assert done.reads["max"] == SENSE_NS + TRANSFER_NS
    assert done.iops == pytest.approx(1e9 / (SENSE_NS + TRANSFER_NS), rel=ONE_PERCENT)


def test_one_saturated_pu_reads_one_row_per_sense() -> None:
    device = rig()
    done = measure(device, reads(device.ftl.capacity_sectors), ios=20_000, depth=16, lead_in=1_000)
    assert done.iops == pytest.approx(1e9 / SENSE_NS, rel=ONE_PERCENT)


def test_a_saturated_channel_carries_its_bandwidth() -> None:
    device = rig(pus=32)
    done = measure(device, reads(device.ftl.capacity_sectors), ios=100_000, depth=128, lead_in=10_000)
    assert done.iops == pytest.approx(1e9 / TRANSFER_NS, rel=ONE_PERCENT)


def test_two_saturated_channels_carry_twice_as_much() -> None:
    device = rig(groups=2, pus=32)
    done = measure(device, reads(device.ftl.capacity_sectors), ios=100_000, depth=256, lead_in=10_000)
    assert done.iops == pytest.approx(2e9 / TRANSFER_NS, rel=ONE_PERCENT)


@pytest.mark.parametrize(("groups", "pus", "ws_opt"), [(1, 1, 8), (4, 4, 8), (2, 8, 16)])
def test_steady_writes_run_at_pus_times_sectors_per_program_time(groups: int, pus: int, ws_opt: int) -> None:
    device = rig(op=2.0, groups=groups, pus=pus, ws_opt=ws_opt, chunks=256)
    device.ftl.trim(0, device.ftl.capacity_sectors)
    lead_in = 20 * device.geometry.total_pus * ws_opt
    ios = device.ftl.capacity_sectors - lead_in  # everything once: nothing to collect
    done = measure(
        device, Workload("sequential", device.ftl.capacity_sectors), ios, depth=256, lead_in=lead_in
    )
    assert done.iops == pytest.approx(device.geometry.total_pus * ws_opt * 1e9 / PROGRAM_NS, rel=ONE_PERCENT)


def test_a_write_that_finds_room_ends_when_the_buffer_has_it() -> None:
    device = rig(numbers={**NUMBERS, "buffer_ns": 3_000, "controller_ns": 1_000})
    done = measure(device, Workload("uniform", 1000, seed=1), ios=8, depth=1)
    assert done.writes is not None
    assert done.writes["max"] == 4_000


def test_without_a_write_buffer_the_last_sector_of_a_unit_waits_for_its_program() -> None:
    device = rig(numbers={**NUMBERS, "buffer_sectors": 0})
    done = measure(device, Workload("uniform", 1000, seed=1), ios=8, depth=1)
    assert done.writes is not None
    assert done.writes["max"] == 8 * TRANSFER_NS + PROGRAM_NS
    assert done.writes["p50"] == 0


def test_garbage_collection_makes_the_tail() -> None:
    device = rig(pus=4, groups=2)
    span = device.ftl.capacity_sectors
    mixed = Workload("uniform", span, reads=0.7, seed=5)
    alone = measure(device, reads(span), ios=20_000, depth=4)
    busy = measure(device, mixed, ios=200_000, depth=4, lead_in=200_000)
    assert device.ftl.stats()["gc_sectors_moved"] > 0
    assert alone.reads is not None
    assert busy.reads is not None
    assert busy.reads["p99"] > 5 * alone.reads["p99"]
    assert busy.reads["max"] > 2_000_000  # somebody waited for an erase


def test_the_same_seed_gives_the_same_time_to_the_nanosecond() -> None:
    def outcome() -> object:
        device = rig(pus=4)
        done = measure(device, Workload("zipf", 10_000, reads=0.5, skew=1.1, seed=7), ios=50_000, depth=8)
        return done, device.timing.stats(), device.ftl.stats()

    assert outcome() == outcome()


def test_zipf_ranks_follow_the_law() -> None:
    workload = Workload("zipf", 1000, skew=1.0, seed=11)
    _, lbas = workload.sample(200_000)
    harmonic = sum(1 / k for k in range(1, 1001))
    first = (lbas == 0).mean()  # rank 1 lies at address 0
    assert first == pytest.approx(1 / harmonic, rel=0.05)


def test_hot_sectors_get_their_share() -> None:
    _, lbas = Workload("hotcold", 10_000, hot=0.05, heat=0.95, seed=11).sample(200_000)
    assert (lbas < 500).mean() == pytest.approx(0.95, abs=0.005)
