"""The FTL loses no acknowledged data whatever fails within its spare space, and goes read-only when that ends."""

from __future__ import annotations

import errno
import random

import pytest

from ocssd_daemon.device import Device
from ocssd_daemon.nand import faults
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
        lba = self.random.randrange(self.sectors)
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


def test_lines_that_become_hard_to_read_are_refreshed_before_data_is_lost() -> None:
    # A read disturbs its chunk; at the notice level the line moves, so the count starts again.
    flash = device("wear.ecc_bits=100", "wear.disturb=0.00001", "wear.retries=0", "wear.notice_share=0.5")
    shadow = Shadow(flash, 4)
    for _ in range(shadow.sectors):
        shadow.write()
    flash.disk.flush()
    for _ in range(60):
        shadow.check()
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
