"""The FTL loses no acknowledged data whatever fails within its spare space, and goes read-only when that ends."""

from __future__ import annotations

import collections
import errno
import itertools
import random
import shutil
from pathlib import Path

import pytest

from ocssd_daemon.device import Device
from ocssd_daemon.nand import faults
from ocssd_daemon.nand.store import open_file
from ocssd_daemon.settings import build, from_assignments

SMALL = ("geometry.groups=1", "geometry.pus=2", "geometry.chunks=32", "geometry.sectors=32", "geometry.ws_min=4",
         "geometry.ws_opt=8", "geometry.mw_cunits=0", "ftl.op=0.4", "ftl.block_bytes=4096", "seed=5")  # fmt: skip
SECTOR = 4096


class Shadow:
    """What the disk has acknowledged, by sector: a number that fills it."""

    def __init__(self, device: Device, seed: int) -> None:
        self.disk = device.disk
        self.sectors = device.disk.size_bytes // SECTOR
        self.content: dict[int, int] = {}
        self.random = random.Random(seed)
        self.last = 0

    def write(self) -> int:
        """Write a random sector. Returns the errno; an acknowledged sector must be kept from now on."""
        return self.write_at(self.random.randrange(self.sectors))

    def write_at(self, lba: int) -> int:
        self.last += 1
        failed = self.disk.write(lba * SECTOR, self.last.to_bytes(8, "little") * (SECTOR // 8))
        if not failed:
            self.content[lba] = self.last
        return int(failed)

    def check(self) -> None:
        wrong = [lba for lba, number in self.content.items() if not self.holds(lba, number)]
        assert wrong == []

    def holds(self, lba: int, number: int) -> bool:
        return bool(self.disk.read(lba * SECTOR, SECTOR) == number.to_bytes(8, "little") * (SECTOR // 8))


def device(*assignments: str) -> Device:
    return Device(build(from_assignments((*SMALL, *assignments))))


@pytest.mark.parametrize("operation", ["write", "reset", "write+reset"])
@pytest.mark.parametrize("action", ["fail", "offline"])
@pytest.mark.parametrize("pu", [0, 1])
def test_any_single_chunk_may_fail(operation: str, action: str, pu: int) -> None:
    for chunk in range(32):
        flash = device()
        flash.physics.add_rule(faults.parse(f"on={operation} pu={pu} chunk={chunk} do={action}"))
        shadow = Shadow(flash, seed=chunk)
        assert [shadow.write() for _ in range(4 * shadow.sectors)].count(0) == 4 * shadow.sectors
        shadow.check()
        flash.close()


@pytest.mark.parametrize("rule", ["on=write do=fail p=0.003", "on=reset do=fail p=0.02", "on=any do=offline p=0.0005"])
@pytest.mark.parametrize("seed", range(4))
def test_failures_at_a_rate_lose_nothing_and_end_in_read_only_mode(rule: str, seed: int) -> None:
    flash = device(f"seed={seed}")
    flash.physics.add_rule(faults.parse(rule.replace("any", "write+reset")))
    shadow = Shadow(flash, seed)
    for _ in range(200):
        failures = [failed for failed in (shadow.write() for _ in range(shadow.sectors // 2)) if failed]
        assert set(failures) <= {errno.EIO}
        if failures:
            break
    shadow.check()
    assert flash.ftl.read_only
    assert shadow.write() == errno.EIO
    shadow.check()
    flash.close()


def test_a_read_that_fails_is_an_io_error_and_the_next_one_is_not() -> None:
    flash = device()
    shadow = Shadow(flash, 1)
    for _ in range(200):
        shadow.write()
    flash.disk.flush()
    flash.physics.add_rule(faults.parse("on=read do=fail once"))
    with pytest.raises(OSError, match="Input/output error"):
        [flash.disk.read(lba * SECTOR, SECTOR) for lba in shadow.content]
    shadow.check()
    flash.close()


def test_factory_bad_chunks_are_not_used_and_cost_only_spare_space() -> None:
    flash = device("faults.bad=0/0/3,0/1/3,0/1/9")
    shadow = Shadow(flash, 2)
    for _ in range(6 * shadow.sectors):
        assert shadow.write() == 0
    shadow.check()
    states = flash.media.chunks["state"]
    assert [i for i in range(64) if states[i] == 8] == [3, 35, 41]
    assert flash.media.chunks["pe_cycles"][[3, 35, 41]].sum() == 0
    flash.close()


def test_worn_out_chunks_are_retired_until_the_spare_space_has_ended() -> None:
    flash = device("wear.pe_limit=30", "wear.pe_spread=0.1")
    shadow = Shadow(flash, 3)
    while shadow.write() == 0:
        assert shadow.last < 200 * shadow.sectors
    shadow.check()
    assert flash.ftl.read_only
    assert (flash.media.chunks["state"] == 8).sum() > 0
    flash.close()


def read_until_lines_move() -> Device:
    """A full disk that was read so often that each read's disturbance added up to the notice level."""
    flash = device("wear.ecc_bits=100", "wear.disturb=0.00001", "wear.retries=0", "wear.notice_share=0.5")
    shadow = Shadow(flash, 4)
    for _ in range(shadow.sectors):
        shadow.write()
    flash.disk.flush()
    for _ in range(60):
        shadow.check()
    return flash


def test_lines_that_become_hard_to_read_are_refreshed_before_data_is_lost() -> None:
    # A read disturbs its chunk; at the notice level the line moves, so the count starts again.
    flash = read_until_lines_move()
    stats = flash.ftl.stats()
    assert stats["lines_refreshed"] > 0
    assert stats["read_failures"] == 0
    flash.close()


def test_the_end_of_spare_space_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    flash = device("wear.pe_limit=8")
    shadow = Shadow(flash, 6)
    while shadow.write() == 0:
        pass
    with caplog.at_level("WARNING"):
        flash.dispatch()
        flash.dispatch()
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["ftl.read_only"]
    flash.close()


# Reads that fail, and restarts in the middle of it.


def image(path: Path, *assignments: str) -> Device:
    return Device(build(from_assignments((*SMALL, f"store={path}", *assignments))), frozenset({"geometry.chunks"}))


def after_a_kill(device: Device, path: Path, *assignments: str) -> Device:
    """What a daemon finds that starts on the image as it is at this instant."""
    copy = path.with_name(f"{path.name}+")
    shutil.copyfile(path, copy)
    device.close()
    path.unlink()
    found = image(copy, *assignments)
    assert found.target.how_started == "recovered"
    return found


@pytest.mark.parametrize("fault", ["write", "reset"])
@pytest.mark.parametrize("writes", [37, 700])
def test_any_single_chunk_may_fail_during_recovery_and_after_it(tmp_path: Path, fault: str, writes: int) -> None:
    for chunk in range(64):
        path = tmp_path / "image"
        flash = image(path)
        shadow = Shadow(flash, seed=chunk)
        assert [shadow.write() for _ in range(writes)].count(0) == writes
        flash.media.arm_fault(chunk, fault)  # the next operation on it fails, which may be recovery's own
        flash = after_a_kill(flash, path)
        shadow.disk = flash.disk
        shadow.check()
        assert [shadow.write() for _ in range(2 * shadow.sectors)].count(0) == 2 * shadow.sectors
        shadow.check()
        flash.close()


@pytest.mark.parametrize("action", ["fail", "offline"])
def test_what_a_failed_chunk_holds_is_found_after_a_kill(tmp_path: Path, action: str) -> None:
    """The chunk is OFFLINE or closed early, and nothing was moved out of it yet."""
    for chunk in range(64):
        path = tmp_path / "image"
        flash = image(path)
        shadow = Shadow(flash, seed=chunk)
        rule = flash.physics.add_rule(faults.parse(f"on=write pu={chunk // 32} chunk={chunk % 32} do={action} after=2"))
        while not flash.physics.faults.list()[0]["hits"] and shadow.last < 6 * shadow.sectors:
            assert shadow.write() == 0
        flash.physics.remove_rule(rule)
        flash = after_a_kill(flash, path)
        shadow.disk = flash.disk
        shadow.check()
        flash.close()


def outcome(shadow: Shadow, lba: int) -> str:
    try:
        return "right" if shadow.holds(lba, shadow.content[lba]) else "wrong"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def test_a_chunk_that_cannot_be_read_costs_its_own_sectors_and_never_gives_wrong_data() -> None:
    for chunk in range(64):
        flash = device()
        flash.physics.add_rule(faults.parse(f"on=read pu={chunk // 32} chunk={chunk % 32} do=fail"))
        shadow = Shadow(flash, seed=chunk)
        for _ in range(4 * shadow.sectors):
            assert shadow.write() == 0
        seen = collections.Counter(outcome(shadow, lba) for lba in shadow.content)
        assert seen.keys() <= {"right", "EIO"}
        assert seen["EIO"] < len(shadow.content) // 8
        for lba in shadow.content:
            shadow.write_at(lba)
        flash.physics.remove_rule(1)
        shadow.check()  # writing makes them readable again
        flash.close()


def test_a_read_that_fails_now_and_then_loses_nothing_when_gc_moves_the_sector() -> None:
    flash = device()
    flash.physics.add_rule(faults.parse("on=read do=fail every=7"))
    shadow = Shadow(flash, 8)
    for _ in range(6 * shadow.sectors):
        assert shadow.write() == 0
    assert flash.ftl.stats()["lost_sectors"] == 0
    flash.physics.remove_rule(1)
    shadow.check()
    flash.close()


def test_a_sector_that_gc_could_not_read_stays_unreadable_after_the_move_and_after_restarts(tmp_path: Path) -> None:
    """The move gives it new out-of-band bytes: without a mark there, lost data would turn into wrong data."""
    path = tmp_path / "image"
    flash = image(path, "ftl.retire=false")
    shadow = Shadow(flash, 9)
    for _ in range(2 * shadow.sectors):
        assert shadow.write() == 0
    flash.disk.flush()
    rule = flash.physics.add_rule(faults.parse("on=read chunk=0-31 do=fail"))
    lost = [lba for lba in shadow.content if outcome(shadow, lba) == "EIO"][:40]
    assert len(lost) == 40
    at_first = {lba: flash.ftl.arrays["l2p"][lba] for lba in lost}
    others = sorted(set(shadow.content) - set(lost))
    for lba in itertools.islice(itertools.cycle(others), 8 * len(others)):
        assert shadow.write_at(lba) == 0
    moved = [lba for lba in lost if flash.ftl.arrays["l2p"][lba] != at_first[lba]]
    assert len(moved) > 10
    flash.physics.remove_rule(rule)

    def outcomes() -> set[str]:
        return {outcome(shadow, lba) for lba in moved}

    assert outcomes() == {"EIO"}
    assert shadow.disk.write(moved[0] * SECTOR + 512, bytes(512)) in (errno.EIO, errno.EINVAL)
    flash = after_a_kill(flash, path)
    shadow.disk = flash.disk
    assert outcomes() == {"EIO"}
    flash.close()
    flash = image(path.with_name("image+"))
    assert flash.target.how_started == "checkpoint"
    shadow.disk = flash.disk
    assert outcomes() == {"EIO"}
    for lba in moved:
        assert shadow.write_at(lba) == 0
    assert outcomes() == {"right"}
    flash.close()


def test_a_chunk_that_lost_data_is_retired_while_there_is_spare_space() -> None:
    """Every chunk loses a sector now and then: as many are retired as there is space for."""

    def after(*assignments: str) -> Device:
        flash = device("wear.ecc_bits=20", "wear.rber=0.00035", "wear.retries=0", *assignments)
        shadow = Shadow(flash, 10)
        for _ in range(8):
            for _ in range(shadow.sectors):
                assert shadow.write() == 0
            assert {outcome(shadow, lba) for lba in shadow.content} <= {"right", "EIO"}
        return flash

    retired = after()
    assert retired.ftl.stats()["chunks_retired"] > 0
    assert not retired.ftl.read_only
    assert (retired.media.chunks["state"] == 8).sum() == retired.ftl.stats()["chunks_retired"]
    retired.close()
    kept = after("ftl.retire=false")
    assert kept.ftl.stats()["chunks_retired"] == 0
    kept.close()


def test_restarts_do_not_retire_more_chunks_than_there_is_space_for(tmp_path: Path) -> None:
    """Each start sees other chunks lose data, before the ones of the starts before have been collected."""
    path = tmp_path / "image"
    flash = image(path)
    shadow = Shadow(flash, 3)
    for lba in range(shadow.sectors):
        assert shadow.write_at(lba) == 0
    flash.close()
    for _ in range(15):
        flash = image(path, "wear.ecc_bits=20", "wear.rber=0.0009", "wear.retries=0")
        shadow.disk = flash.disk
        assert {outcome(shadow, lba) for lba in shadow.random.sample(range(shadow.sectors), 4)} <= {"right", "EIO"}
        flash.close()
    flash = image(path)
    shadow.disk = flash.disk
    for _ in range(6 * shadow.sectors):
        assert shadow.write() == 0
    assert flash.ftl.stats()["chunks_retired"] > 0
    flash.close()


def test_refreshed_lines_are_noted() -> None:
    flash = read_until_lines_move()
    states = {state for _, _, _, state in flash.physics.wear.notices()}
    assert {1 << 1, 1 << 4} <= states
    flash.close()


@pytest.mark.parametrize("rule", ["on=write do=torn once", "on=read do=corrupt:3 once"])
def test_with_durability_host_a_torn_or_corrupt_sector_is_found_after_a_crash_of_the_host(
    tmp_path: Path, rule: str
) -> None:
    """Entries cover their data: what does not match gives way to what was there before it."""
    path = tmp_path / "image"
    flash = image(path, "durability=host")
    old, new = b"o" * SECTOR, b"n" * SECTOR
    at = 3 * SECTOR  # the last sector of a write of ws_min
    for content in (old, new):
        if content == new and "write" in rule:
            flash.physics.add_rule(faults.parse(rule))
        assert flash.disk.write(0, 4 * content) == 0
        assert flash.disk.flush() == 0
    if "read" in rule:
        flash.physics.add_rule(faults.parse(rule))
    assert flash.disk.read(at, SECTOR) not in (old, new)  # silently
    copy = tmp_path / "copy"
    shutil.copyfile(path, copy)
    flash.close()
    store = open_file(str(copy), flash.geometry)
    store.save_superblock(boot_id="another boot")
    store.close()
    flash = image(copy, "durability=host")
    assert flash.target.how_started == "recovered"
    assert flash.disk.read(at, SECTOR) == old
    flash.close()
