"""The fault methods of the control socket, on a device without transports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ocssd_daemon.control import faults, schema
from ocssd_daemon.control.server import Refused
from ocssd_daemon.device import Device
from ocssd_daemon.settings import build, from_assignments


@pytest.fixture
def handlers() -> Any:
    device = Device(build(from_assignments(("geometry.chunks=16", "geometry.sectors=32", "ftl.op=1"))))
    yield faults.handlers(device)
    device.close()


def texts(answer: Any) -> list[str]:
    return [rule["rule"] for rule in answer.rules]


def test_rules_are_added_listed_and_removed(handlers: Any) -> None:
    handlers["fault.add"](schema.FaultAdd("on=write do=fail p=0.5"))
    handlers["fault.add"](schema.FaultAdd("on=read do=slow:1ms"))
    assert texts(handlers["fault.list"](schema.NoParams())) == ["on=write do=fail p=0.5", "on=read do=slow:1ms"]
    assert texts(handlers["fault.remove"](schema.FaultId(1))) == ["on=read do=slow:1ms"]


def test_a_file_of_the_reference_emulator_is_imported(handlers: Any, tmp_path: Path) -> None:
    path = tmp_path / "resets"
    path.write_text("grp=0 pu=0 chk=1 resetfail_prob=10\n")
    answer = handlers["fault.import"](schema.FaultImport("resetfail", str(path)))
    assert texts(answer) == ["on=reset group=0 pu=0 chunk=1 do=fail p=0.1"]


@pytest.fixture
def mixed(tmp_path: Path) -> Any:
    """PUs 0 to 3 are the disk's, 4 to 7 a guest's."""
    texts = ("geometry.chunks=16", "geometry.sectors=32", "ftl.op=1", "ftl.pus=0-3")
    device = Device(build(from_assignments(texts)))
    yield device
    device.close()


def test_chunk_states_are_taken_over_where_a_guest_owns_the_unit(mixed: Device, tmp_path: Path) -> None:
    path = tmp_path / "states"
    path.write_text("grp=1 pu=0 chk=3 state=OPEN wp=8 wi=9\ngrp=1 pu=1 chk=2 state=CLOSED\n"
                    "grp=* pu=3 chk=5 state=OFFLINE\n")  # fmt: skip
    faults.handlers(mixed)["fault.import"](schema.FaultImport("chunkstate", str(path)))
    chunks = mixed.media.chunks
    assert chunks[["state", "wp", "wear_index"]][4 * 16 + 3].tolist() == (4, 8, 9)
    assert chunks[["state", "wp"]][5 * 16 + 2].tolist() == (2, 32)
    assert [int(chunks["state"][pu * 16 + 5]) for pu in (3, 7)] == [8, 8]
    assert mixed.media.stats()["chunks_open"] == 1


def test_of_the_ftls_own_chunks_only_offline_is_taken_and_a_refused_file_changes_nothing(
    mixed: Device, tmp_path: Path
) -> None:
    path = tmp_path / "states"
    path.write_text("grp=1 pu=0 chk=3 state=OPEN wp=8\ngrp=0 pu=2 chk=5 state=FREE\n")
    before = mixed.media.chunks.copy()
    with pytest.raises(Refused, match="the running FTL owns PU 2: there, only OFFLINE can be imported"):
        faults.handlers(mixed)["fault.import"](schema.FaultImport("chunkstate", str(path)))
    assert (mixed.media.chunks == before).all()


def test_a_file_of_too_many_rules_adds_none(handlers: Any, tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text("on=write do=fail p=0.001\n" * 4097)
    with pytest.raises(Refused, match="at most 4096 fault rules"):
        handlers["fault.import"](schema.FaultImport("rules", str(path)))
    assert texts(handlers["fault.list"](schema.NoParams())) == []


def test_a_number_that_no_rule_has_is_an_invalid_parameter() -> None:
    for number in (0, -1, 2**31, 10**23):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"id":%d}' % number, type=schema.FaultId)


@pytest.mark.parametrize(
    ("method", "params", "complaint"),
    [
        ("fault.add", schema.FaultAdd("on=write"), "do= is missing"),
        ("fault.add", schema.FaultAdd("on=write chunk=9999999 do=fail"), "chunk= must begin below"),
        ("fault.remove", schema.FaultId(9), "no fault rule 9"),
        ("fault.import", schema.FaultImport("rules", "/nonexistent"), "/nonexistent: No such file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(handlers: Any, method: str, params: Any, complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        handlers[method](params)
