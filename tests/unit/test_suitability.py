"""check-geometry names who refuses a device and the number that is wrong; the presets are taken by everybody."""

from __future__ import annotations

import msgspec
import pytest
from click.testing import CliRunner

from ocssd_daemon import settings as sets
from ocssd_daemon.cli import qemu_img, qemu_nvme
from ocssd_daemon.cli.client import main
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nvme.pblk_needs import Shape, needs
from ocssd_daemon.nvme.suitability import problems

GOOD = Geometry(chunks=128, mw_cunits=0)


def found(version="ocssd20", planes=1, mdts=7, **changes):
    return problems(msgspec.structs.replace(GOOD, **changes), version, planes=planes, mdts=mdts)


def refusals(**changes):
    return [f"{p.who}: {p.text}" for p in found(**changes) if p.fatal]


V12 = {"version": "ocssd12", "mw_cunits": 0}
# What is refused just beyond its limit and taken at it, and by whom; the sentence has the numbers.
LIMITS = [
    ("groups", {"groups": 256, "pus": 1, "chunks": 128}, {"groups": 257, "pus": 1}, "lightnvm driver: 257 groups"),
    ("pus", {"groups": 1, "pus": 256}, {"groups": 1, "pus": 257}, "lightnvm driver: 1 groups, 257 PUs"),
    ("chunks", {"groups": 1, "pus": 2, "chunks": 65536, "sectors": 512}, {"groups": 1, "pus": 2, "chunks": 65537,
                                                                       "sectors": 512}, "at most 256, 256 and 65536"),
    ("sector_bytes", {"sector_bytes": 4096}, {"sector_bytes": 8192}, "pblk: geometry.sector_bytes = 8192"),
    ("addresses", {"ws_opt": 64}, {"ws_opt": 65}, "pblk: write unit of 65 sectors: a command has at most 64"),
    ("mdts", {"ws_opt": 32, "mdts": 5}, {"ws_opt": 64, "mdts": 5}, "nvme.mdts = 5 lets 32 sectors through"),
    ("mdts 0 is no limit", {"ws_opt": 64, "mdts": 0}, {"ws_opt": 65, "mdts": 0}, "at most 64 addresses"),
    ("planes make the unit", V12 | {"planes": 4, "ws_min": 16}, V12 | {"planes": 4, "ws_min": 32},
     "write unit of 128 sectors"),
    ("clba", {"sectors": 1024, "ws_opt": 8}, {"sectors": 1020, "ws_opt": 8}, "pblk: 1020 sectors in a chunk"),
    ("oob", {"oob_bytes": 16}, {"oob_bytes": 15, "ws_min": 1, "ws_opt": 1}, "pblk: geometry.oob_bytes = 15"),
    ("packed metadata", {"oob_bytes": 0, "ws_opt": 2}, {"oob_bytes": 0, "ws_opt": 1}, "gives one to metadata"),
    ("lines", {"chunks": 13}, {"chunks": 12}, "pblk: 12 chunks per PU: 10 lines of 11 %"),
    ("lines of planes", V12 | {"planes": 2, "chunks": 26}, V12 | {"planes": 2, "chunks": 24}, "12 chunks per PU"),
    ("PUs of a line", {"groups": 1, "pus": 2, "sectors": 256}, {"groups": 1, "pus": 2, "sectors": 8,
                                                                  "mw_cunits": 0},
     "pblk: 2 PUs of 8 sectors: a line needs 3 chunks, for 16 sectors of metadata"),
    ("room for data", {"groups": 1, "pus": 1, "sectors": 104, "chunks": 13}, {"groups": 1, "pus": 1, "sectors": 96,
                                                                         "chunks": 13},
     "13 chunks: 10 spare ones and 3 of metadata leave none for data"),
    ("rate limiter", {"groups": 1, "pus": 1, "sectors": 160}, {"groups": 1, "pus": 1, "sectors": 152},
     "of 15 spare chunks 14 are metadata and 1 a line in hand"),
    ("write buffer", {"groups": 1, "pus": 4, "chunks": 20, "sectors": 4096, "mw_cunits": 512},
     {"groups": 1, "pus": 4, "chunks": 20, "sectors": 4096, "mw_cunits": 1024},
     "a write buffer of 8192 sectors is 128"),
    ("channels", V12 | {"groups": 2}, V12 | {"groups": 3}, "pblk: geometry.groups (channels) = 3"),
    ("LUNs", V12 | {"pus": 8}, V12 | {"pus": 6}, "pblk: geometry.pus (LUNs) = 6"),
    ("blocks", V12 | {"planes": 2, "chunks": 200}, V12 | {"planes": 2, "chunks": 201},
     "lightnvm driver: geometry.chunks = 201"),
    ("pages", V12 | {"sectors": 1024, "ws_min": 4}, V12 | {"sectors": 1022, "ws_min": 4},
     "lightnvm driver: geometry.sectors = 1022"),
    ("planes of 2.0", {"planes": 1}, {"planes": 2}, "lightnvm driver: nvme.planes = 2"),
    ("mw_cunits", {"mw_cunits": 1024, "chunks": 1024}, {"mw_cunits": 1028, "chunks": 1024},
     "SPDK: geometry.mw_cunits = 1028"),
    ("SPDK's unit", {"ws_opt": 64}, {"ws_opt": 128}, "SPDK: geometry.ws_opt = 128"),
]


@pytest.mark.parametrize(("name", "good", "bad", "says"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_limit_is_taken_and_beyond_it_refused_by_the_one_who_has_it(name, good, bad, says):
    assert refusals(**good) == []
    assert any(says in line for line in refusals(**bad)), refusals(**bad)


@pytest.mark.parametrize(("good", "warned", "says"), [
    ({"chunks": 60}, {"chunks": 59}, "59 chunks per PU: below 60"),
    ({"oob_bytes": 16}, {"oob_bytes": 8}, "each write unit of 8 sectors gives one to metadata"),
    (V12, V12 | {"mw_cunits": 8}, "1.2 hosts expect to read what was written"),
    ({}, {"mw_cunits": 24}, "geometry.mw_cunits = 24: after a crash"),
])
def test_what_works_badly_is_a_warning(good, warned, says):
    assert [p.text for p in found(**good) if p.who != "SPDK"] == []
    assert [p.fatal for p in found(**warned) if says in p.text] == [False]


def test_the_kernels_own_numbers():
    """Worked out by hand for 8 PUs x 128 chunks x 512 sectors, unit 8: pblk logs these at creation."""
    n = needs(Shape(luns=8, lines=128, clba=512, ws_opt=8, mw_cunits=24, csecs=4096, sos=16))
    assert (n.smeta, n.emeta, n.min_blk_line) == (8, 16, 2)     # 4080 addresses of 8 bytes, and two sectors more
    assert n.op_chunks == 1024 - 1024 * 89 // 100 == 113
    assert n.meta_chunks == -(-24 * 128 // 512) == 6
    assert n.high_chunks == 113 - 6 - 8
    assert n.capacity == (911 - 6) * 512
    assert (n.buffer, n.windows) == (256, 4)


@pytest.mark.parametrize("preset", ["pblk-20", "pblk-12", "reference-20", "reference-12"])
def test_the_presets_are_taken(preset):
    """Without a warning, but for what the reference's own defaults are known for."""
    s = sets.build(sets.from_preset(preset))
    told = problems(s.geometry, s.nvme.namespaces[0], planes=s.nvme.planes, mdts=s.nvme.mdts)
    warned = {p.text.partition(" = ")[0] for p in told if p.who != "SPDK"}
    assert warned == ({"geometry.mw_cunits"} if preset == "reference-20" else set())
    assert not any(p.fatal for p in told)


@pytest.mark.parametrize(("preset", "line"), [("reference-20", None), ("reference-12", "serial=deadbeef,lver=1")])
def test_the_presets_of_the_reference_are_what_its_tools_made(preset, line):
    """2.0: qemu-img's defaults. 1.2: what the emulator makes of a 1 GiB file."""
    shape = sets.build(sets.from_preset(preset)).geometry
    if line is None:
        assert shape == sets.build(qemu_img.translate("").layer()).geometry
    else:
        made = sets.build(qemu_nvme.translate(line, qemu_nvme.Backing(1 << 30)).layer())
        assert (made.geometry, made.nvme.mdts) == (shape, 10)


def test_the_command_names_the_number_and_fails():
    done = CliRunner().invoke(main, ["check-geometry", "--set", "geometry.chunks=10"])
    assert done.exit_code == 1
    assert "10 chunks per PU" in done.output
    assert CliRunner().invoke(main, ["check-geometry", "--preset", "pblk-20"]).output == "ocssd20: good for all\n"


def test_a_wrong_setting_is_no_verdict():
    done = CliRunner().invoke(main, ["check-geometry", "--set", "geometry.chunk=10"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "ocssd: geometry.chunk=10 (--set): no such setting; did you mean geometry.chunks?\n"
