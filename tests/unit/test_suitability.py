"""check-geometry names who refuses a device and the number that is wrong; the presets are taken by everybody."""

from __future__ import annotations

import msgspec
import pytest
from click.testing import CliRunner

from ocssd_daemon import settings as sets
from ocssd_daemon.cli.client import main
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nvme.suitability import problems

GOOD = Geometry(chunks=128, mw_cunits=0)


def refusals(version="ocssd20", planes=1, mdts=7, **changes):
    found = problems(msgspec.structs.replace(GOOD, **changes), version, planes=planes, mdts=mdts)
    return [problem.who for problem in found if problem.fatal]


@pytest.mark.parametrize(("changes", "who"), [
    ({}, []),
    ({"sector_bytes": 512}, ["pblk"]),
    ({"ws_opt": 128}, ["pblk", "SPDK"]),
    ({"mdts": 2}, ["pblk"]),
    ({"chunks": 12}, ["pblk"]),
    ({"oob_bytes": 8}, []),
    ({"oob_bytes": 0, "ws_min": 1, "ws_opt": 1}, ["pblk"]),
    ({"version": "ocssd12", "groups": 3}, ["pblk"]),
    ({"version": "ocssd12", "planes": 2, "chunks": 201}, ["lightnvm driver"]),
])
def test_each_broken_rule_is_refused_by_the_one_who_has_it(changes, who):
    assert refusals(**changes) == who


@pytest.mark.parametrize("changes", [{"chunks": 40}, {"mw_cunits": 24}])
def test_few_chunks_and_sectors_that_cannot_be_read_yet_are_a_warning(changes):
    assert [p.fatal for p in problems(msgspec.structs.replace(GOOD, **changes), "ocssd20")] == [False]


@pytest.mark.parametrize("preset", ["pblk-20", "pblk-12"])
def test_the_presets_for_pblk_are_taken(preset):
    s = sets.build(sets.from_preset(preset))
    found = problems(s.geometry, s.nvme.namespaces[0], planes=s.nvme.planes, mdts=s.nvme.mdts)
    assert [p for p in found if p.who != "SPDK"] == []


def test_the_command_names_the_number_and_fails():
    done = CliRunner().invoke(main, ["check-geometry", "--set", "geometry.chunks=10"])
    assert done.exit_code == 1
    assert "10 chunks per PU" in done.output
    assert CliRunner().invoke(main, ["check-geometry", "--preset", "pblk-20"]).output == "ocssd20: good for all\n"
