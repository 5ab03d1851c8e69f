"""The rule language of faults: what is taken, what is refused, and the files of the reference emulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from ocssd_daemon._physics import Faults, attach_faults
from ocssd_daemon.nand import faults
from ocssd_daemon.nand.faults import ANY, FaultError
from ocssd_daemon.nand.geometry import Geometry
from tests.kit.virtual import Rig, rig


def test_a_rule_says_where_what_and_when() -> None:
    rule = faults.parse("on=read+write group=1 pu=* chunk=5-9 do=slow:2.5ms p=0.25 every=3 after=10 times=2 while=/t")
    assert (rule.operations, rule.action, rule.amount) == (3, faults.ACTIONS["slow"], 2_500_000)
    assert (rule.group, rule.pu, rule.chunk, rule.sector) == ((1, 1), ANY, (5, 9), ANY)
    assert (rule.chance, rule.every, rule.after, rule.times, rule.trigger) == (0.25, 3, 10, 2, "/t")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "on= is missing"),
        ("on=write", "do= is missing"),
        ("on=wrte do=fail", "on=wrte: must be one of read, write, reset, any"),
        ("on=write do=explode", "do=explode: must be one of fail, offline, slow:..., hang:..."),
        ("on=write do=slow", "do=slow: must be one of"),
        ("on=write do=slow:5", "do=slow:5: must be a time such as 5ms"),
        ("on=write do=fail:3", "do=fail:3: must be one of"),
        ("on=write do=corrupt:1", "do=corrupt:1: only with on=read"),
        ("on=read do=torn", "do=torn: only with on=write"),
        ("on=read do=corrupt:0", "do=corrupt=0: must be a whole number from 1"),
        ("on=write do=fail chunk=9-5", "chunk=9-5: ends before it begins"),
        ("on=write do=fail chunk=x", "chunk=x: must be a whole number"),
        ("on=write do=fail p=0", "p=0: must be a probability above 0, at most 1"),
        ("on=write do=fail p=nan", "p=nan: must be a probability"),
        ("on=write do=fail every=0", "every=0: must be a whole number from 1"),
        ("on=write do=fail while=/tmp\0x", "must be a path of at most 255 bytes"),
        ("on=write do=fail do=fail", "do is given twice"),
        ("on=write do=fail colour=red", "colour=red: must be KEY=VALUE with one of on, group"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_word(text: str, complaint: str) -> None:
    with pytest.raises(FaultError) as caught:
        faults.parse(text)
    assert complaint in str(caught.value)


def test_a_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text("# comment\non=write do=fail  # why not\n\non=write do=fai\n")
    with pytest.raises(FaultError, match=rf"{path}:4: do=fai: must be one of"):
        faults.load(str(path))


# What rules do.


def with_rules(*texts: str) -> tuple[Rig, Faults]:
    device = rig(op=4.0, chunks=8, sectors=64)
    rules = Faults(device.geometry, seed=3)
    for text in texts:
        rules.add(faults.parse(text))
    attach_faults(device.media, rules)
    return device, rules


def sector() -> bytes:
    return bytes(4096)


def fresh_chunk(device: Rig) -> int:
    return int((device.media.chunks["state"] == 1).argmax())


def write(device: Rig, chunk: int, at: int, n: int = 4) -> int:
    return int(device.media.write((chunk << 6) | at, sector() * n))


def test_every_nth_after_so_many_at_most_so_often() -> None:
    device, rules = with_rules("on=read do=fail every=3 after=2 times=2")
    device.media.now_ns = 0
    outcomes = [device.media.read(0)[0] for _ in range(14)]
    # two pass, then each third fails, twice
    assert [i for i, status in enumerate(outcomes) if status == 0x281] == [4, 7]
    assert rules.list()[0]["hits"] == 2


def test_a_write_fault_closes_the_chunk_early_and_the_next_reset_takes_it_offline() -> None:
    device, _ = with_rules("on=write sector=8-11 do=fail once")
    chunk = fresh_chunk(device)
    assert [write(device, chunk, at) for at in (0, 4, 8)] == [0, 0, 0x2F1]
    assert (device.media.chunks["state"][chunk], device.media.chunks["wp"][chunk]) == (2, 8)
    assert device.media.reset(chunk) == 0x2C1
    assert device.media.chunks["state"][chunk] == 8


def test_offline_takes_the_chunk_at_once() -> None:
    device, _ = with_rules("on=write do=offline")
    chunk = fresh_chunk(device)
    assert write(device, chunk, 0) == 0x2F1
    assert device.media.chunks["state"][chunk] == 8


def test_a_reset_fault_takes_the_chunk_offline() -> None:
    device, _ = with_rules("on=reset chunk=0 do=fail")
    assert device.media.reset(0) == 0x2C1
    assert device.media.chunks["state"][0] == 8
    assert device.media.reset(1) == 0


def test_a_rule_with_a_trigger_strikes_while_the_file_is_there(tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    device, _ = with_rules(f"on=read do=fail while={trigger}")
    assert device.media.read(0)[0] == 0
    trigger.touch()
    assert device.media.read(0)[0] == 0x281
    trigger.unlink()
    assert device.media.read(0)[0] == 0


def test_probabilities_come_from_the_seed() -> None:
    def struck() -> list[int]:
        device, _ = with_rules("on=read do=fail p=0.3")
        return [device.media.read(0)[0] for _ in range(1000)]

    first = struck()
    assert struck() == first
    assert 250 < sum(status == 0x281 for status in first) < 350


def test_slow_and_hang_take_time_on_the_pu() -> None:
    device, _ = with_rules("on=read do=slow:1ms", "on=read do=hang:3ms")
    device.timing.begin(0)
    device.media.read(0)
    assert device.timing.busy(0) == [(0, 4_040_000)]  # 4 ms, then one sense of 40 us


def test_a_rule_for_a_later_sector_lets_the_sectors_before_it_be_written() -> None:
    device, _ = with_rules("on=write sector=10 do=fail once")
    chunk = fresh_chunk(device)
    assert [write(device, chunk, 0), write(device, chunk, 4, 8)] == [0, 0x2F1]
    assert (device.media.chunks["state"][chunk], device.media.chunks["wp"][chunk]) == (2, 10)


def test_there_may_be_thousands_of_rules() -> None:
    device, rules = with_rules(*(f"on=write chunk={i} do=fail" for i in range(4096)))
    assert [rule["id"] for rule in rules.list()] == list(range(1, 4097))
    with pytest.raises(ValueError, match="at most 4096 fault rules"):
        rules.add(faults.parse("on=write do=fail"))
    chunk = fresh_chunk(device)
    assert write(device, chunk, 0) == 0x2F1


def test_rules_can_be_removed_by_number() -> None:
    _, rules = with_rules("on=read do=fail", "on=write do=fail")
    rules.remove(1)
    assert [rule["id"] for rule in rules.list()] == [2]
    with pytest.raises(KeyError):
        rules.remove(1)


# Files of the reference emulator.


def test_reset_and_write_failure_files_become_rules(tmp_path: Path) -> None:
    resets, writes = tmp_path / "resets", tmp_path / "writes"
    lines = ("grp=0 pu=1 chk=2 resetfail_prob=100", "# all", "group=* punit=* chunk=* prob=5", "grp=0 chk=0 prob=0")
    resets.write_text("\n".join(lines))
    writes.write_text("grp=0 pu=0 chk=0x10 sec=7 writefail_prob=50\n")
    assert [rule.text for rule in faults.load_reset_failures(str(resets))] == [
        "on=reset group=0 pu=1 chunk=2 do=fail",
        "on=reset do=fail p=0.05",
    ]
    assert [rule.text for rule in faults.load_write_failures(str(writes))] == [
        "on=write group=0 pu=0 chunk=16 sector=7 do=fail p=0.5"
    ]


STATES = Geometry(groups=2, pus=2, chunks=8, sectors=64, mw_cunits=0)


def test_a_chunk_state_file_says_states(tmp_path: Path) -> None:
    path = tmp_path / "states"
    path.write_text("grp=0 pu=0 chk=3 wi=300 wp=64 state=CLOSED type=W_SEQ\ngroup=0 punit=* chunk=1 state=OFFLINE\n"
                    "grp=1 pu=0 chk=0x2 state=OPEN wp=8 # half\n")  # fmt: skip
    closed, offline, half = faults.load_chunk_states(str(path), STATES)
    assert (closed.indices, closed.state, closed.type, closed.wp, closed.wear_index) == ([3], 2, 1, 64, 44)
    assert (offline.indices, offline.state, offline.wp) == ([1, 9], 8, 0xFFFF_FFFF)
    assert (half.indices, half.state, half.wp) == ([18], 4, 8)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("grp=0 pu=0 chk=0 state=BROKEN", ":2: state=BROKEN: must be one of FREE, CLOSED, OPEN, OFFLINE"),
        ("grp=zero pu=0 chk=0 state=FREE", ":2: group=zero: must be a whole number"),
        ("grp 0", ":2: grp: must be KEY=VALUE"),
        ("grp=0 pu=0 chk=0 state=FREE colour=red", ":2: colour=red: must be KEY=VALUE with one of group, grp"),
        ("pu=0 chk=0 state=FREE", ":2: group= is missing"),
        ("grp=9 pu=0 chk=0 state=FREE", ":2: group=9: there are 2"),
        ("grp=0 pu=0 chk=0 state=CLOSED wp=65", ":2: wp=65: a chunk that is CLOSED has at most 64"),
        ("grp=0 pu=0 chk=0 state=OPEN wp=64", ":2: wp=64: a chunk that is OPEN has at most 63"),
    ],
)
def test_a_chunk_state_line_that_cannot_be_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "states"
    path.write_text(f"\n{line}\n")
    with pytest.raises(FaultError) as caught:
        faults.load_chunk_states(str(path), STATES)
    assert complaint in str(caught.value)


def test_a_bad_block_table_holds_a_byte_per_block_and_plane(tmp_path: Path) -> None:
    path = tmp_path / "bbt"
    table = bytearray(2 * 8 * 2)  # 2 PUs, 8 blocks, 2 planes
    table[3 * 2 + 1] = 1
    table[(8 + 5) * 2] = 2
    path.write_bytes(table)
    assert faults.load_bad_blocks(str(path), 2, 8) == [3, 13]
    path.write_bytes(bytes(7))
    with pytest.raises(FaultError, match="has 7 bytes, expected a multiple of 2 PUs x 8 blocks"):
        faults.load_bad_blocks(str(path), 2, 8)
