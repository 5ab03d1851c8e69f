"""Wear, bit errors, ECC and read retries; used drives. Statistics are seeded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ocssd_daemon._physics import Wear, age_of
from ocssd_daemon.device import Device, DeviceError
from ocssd_daemon.nand import aging
from ocssd_daemon.nand.aging import AgingError
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.store import open_file
from ocssd_daemon.nand.wear import Model
from ocssd_daemon.settings import build, from_assignments

GEOMETRY = Geometry(groups=1, pus=2, chunks=32, sectors=32, mw_cunits=0)
SMALL = ("geometry.groups=1", "geometry.pus=2", "geometry.chunks=32", "geometry.sectors=32", "ftl.op=0.4")


def wear(**numbers: float) -> Wear:
    return Wear(GEOMETRY, Model(**numbers), retry_ns=1000, seed=9)  # type: ignore[arg-type]


def test_bit_errors_grow_with_cycles_retention_and_reads() -> None:
    model = wear(rber=1e-6, cycles_factor=10, retention_factor=0.1, disturb=1e-9, pe_limit=1000, ecc_bits=40)
    bits = 8 * 4096
    assert model.error_mean(0) == pytest.approx(1e-6 * bits)
    assert model.error_mean(1000) == pytest.approx(11e-6 * bits)
    assert model.error_mean(1000, days=30) == pytest.approx(11e-6 * 4 * bits)
    assert model.error_mean(0, days=30) == pytest.approx(1e-6 * bits)  # fresh flash keeps its charge
    assert model.error_mean(0, reads=1000) == pytest.approx(2e-6 * bits)


@pytest.mark.parametrize("mean", [0.5, 8.0, 60.0])
def test_errors_of_a_read_are_poisson_distributed(mean: float) -> None:
    model = wear(ecc_bits=100_000, rber=1e-6)
    for _ in range(20_000):
        model.read(mean)
    assert model.stats()["bits_corrected"] / 20_000 == pytest.approx(mean, rel=0.02)


def test_ecc_corrects_to_its_strength_then_retries_then_gives_up() -> None:
    model = wear(ecc_bits=100, retries=3, retry_gain=0.5, rber=1e-6)
    assert model.read(10) == (0, 0)
    assert model.read(90)[0] == 1  # corrected, with high effort
    outcome, levels = model.read(300)
    assert (outcome, levels) == (2, 2)  # 300, 150, 75
    assert model.read(2000) == (3, 3)
    assert model.stats()["high_ecc_reads"] == 2
    assert model.stats()["very_high_ecc_reads"] == 1
    assert model.stats()["uncorrectable_reads"] == 1


def test_life_is_spent_evenly_and_shows_in_the_wear_index() -> None:
    used = ("wear.pe_limit=1000", "wear.pe_spread=0.05", "age=life=90%,seed=7")
    flash = Device(build(from_assignments((*SMALL, *used))))
    chunks = flash.media.chunks
    assert chunks["pe_cycles"].mean() == pytest.approx(900, rel=0.02)
    assert chunks["wear_index"].mean() == pytest.approx(0.9 * 255, rel=0.03)
    assert chunks["pe_limit"].std() == pytest.approx(50, rel=0.3)
    flash.close()


def test_a_used_drive_starts_filled() -> None:
    flash = Device(build(from_assignments((*SMALL, "age=fill=80%,retention=180d"))))
    assert flash.ftl.stats()["mapped_sectors"] == round(0.8 * flash.ftl.capacity_sectors)
    flash.close()


def test_old_data_of_a_worn_drive_needs_retries_and_young_data_does_not() -> None:
    model = ("wear.pe_limit=1000", "wear.ecc_bits=40", "wear.rber=1e-5", "wear.cycles_factor=10")

    def retried(retention: str) -> int:
        flash = Device(build(from_assignments((*SMALL, *model, f"age=life=90%,fill=100%,retention={retention}"))))
        for lba in range(500):
            flash.disk.read(lba * 4096, 4096)
        retries = int(flash.physics.stats()["retried_reads"])
        flash.close()
        return retries

    assert retried("0d") == 0
    assert retried("365d") > 400


DAY_NS = 86_400_000_000_000
AGING = ("wear.pe_limit=1000", "wear.ecc_bits=40", "wear.rber=1e-5", "wear.retention_factor=1")


class WallClock:
    """Time of day that a test sets."""

    def __init__(self) -> None:
        self.now_ns = 1_800_000_000 * 10**9

    def __call__(self) -> int:
        return self.now_ns


def age_days(flash: Device) -> int:
    return round(age_of(flash.media) / DAY_NS)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_data_ages_while_the_daemon_is_down(tmp_path: Path, how: str) -> None:
    wall = WallClock()
    path = tmp_path / "image"

    def start(*more: str) -> Device:
        layers = from_assignments((*SMALL, *AGING, f"store={path}", *more))
        return Device(build(layers), frozenset(), "real", wall)

    flash = start("age=retention=100d")
    flash.disk.write(0, bytes(4096))
    assert age_days(flash) == 100
    wall.now_ns += 10 * DAY_NS  # while it runs: its own clock says that no time has passed
    if how == "killed":
        copy = tmp_path / "copy"
        shutil.copyfile(path, copy)
        flash.close()
        path = copy
    else:
        flash.close()
    wall.now_ns += 30 * DAY_NS
    flash = start()
    assert age_days(flash) == (140 if how == "killed" else 130)
    flash.close()
    wall.now_ns += 7 * DAY_NS
    flash = start("wear.shelf=false")
    assert age_days(flash) == (140 if how == "killed" else 130)
    flash.close()
    wall.now_ns -= 1000 * DAY_NS  # somebody has set the clock back
    flash = start()
    assert age_days(flash) == (140 if how == "killed" else 130)
    flash.close()
    wall.now_ns += 1000 * DAY_NS  # and right again: those days have not passed
    flash = start()
    assert age_days(flash) == (140 if how == "killed" else 130)
    flash.close()


@pytest.mark.parametrize("said", [{"age_ns": 2**64 - 1, "wall_ns": 1}, {"age_ns": 2**80}, {"age_ns": -1}])
def test_an_image_that_says_it_is_absurdly_old_starts_and_goes_on_ageing(tmp_path: Path, said: dict[str, int]) -> None:
    path = str(tmp_path / "image")
    layers = from_assignments((*SMALL, *AGING, f"store={path}"))
    Device(build(layers), frozenset(), "real", WallClock()).close()
    store = open_file(path, Geometry())
    store.save_superblock(**said)
    store.close()
    for _ in range(2):
        flash = Device(build(layers), frozenset(), "real", WallClock())
        assert 0 <= age_of(flash.media) < 1 << 63
        flash.close()


def test_a_raw_device_without_wear_remembers_its_age_too(tmp_path: Path) -> None:
    wall = WallClock()
    texts = (*SMALL, "ftl.pus=none", f"store={tmp_path / 'image'}")
    Device(build(from_assignments(texts)), frozenset(), "real", wall).close()
    wall.now_ns += 5 * DAY_NS
    flash = Device(build(from_assignments(texts)), frozenset(), "real", wall)
    assert age_days(flash) == 5
    flash.close()


@pytest.mark.parametrize(
    ("assignments", "complaint"),
    [
        (("age=life=90%",), "age: life needs an endurance; set wear.pe_limit"),
        (("age=lives=9",), "lives=9: must be KEY=VALUE with one of life, fill, retention, seed"),
        (("age=life=190%",), "age=life=190%: must be a share such as 90% or 0.9"),
        (("faults.bad=1/0/0",), "faults.bad=1/0/0: the flash has 1/2/32"),
        (("faults.bad=65",), "faults.bad=65: the flash has 64 chunks"),
        (("faults.rules=on=write",), "faults: on=write: do= is missing"),
        (("faults.file=/nonexistent",), "faults: /nonexistent: No such file or directory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(assignments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(DeviceError) as caught:
        Device(build(from_assignments((*SMALL, *assignments))))
    assert complaint in str(caught.value)


def test_bad_chunks_come_by_number_percentage_or_list() -> None:
    assert len(aging.bad_chunks("5", GEOMETRY, 1)) == 5
    assert len(aging.bad_chunks("12.5%", GEOMETRY, 1)) == 8
    assert aging.bad_chunks("0/1/3, 0/0/2", GEOMETRY, 1) == [35, 2]
    assert aging.bad_chunks("5", GEOMETRY, 1) == aging.bad_chunks("5", GEOMETRY, 1)
    with pytest.raises(AgingError):
        aging.bad_chunks("many", GEOMETRY, 1)


def test_endurance_is_normal_around_its_limit() -> None:
    chunks = np.zeros(10_000, dtype=[("pe_limit", "u4")])
    aging.set_endurance(chunks, 3000, 0.1, seed=1)
    assert chunks["pe_limit"].mean() == pytest.approx(3000, rel=0.01)
    assert chunks["pe_limit"].std() == pytest.approx(300, rel=0.05)
