"""The fault methods of the control socket, on a device without transports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    ("method", "params", "complaint"),
    [
        ("fault.add", schema.FaultAdd("on=write"), "do= is missing"),
        ("fault.remove", schema.FaultId(9), "no fault rule 9"),
        ("fault.import", schema.FaultImport("rules", "/nonexistent"), "/nonexistent: No such file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(handlers: Any, method: str, params: Any, complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        handlers[method](params)
