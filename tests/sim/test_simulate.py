"""``ocssd simulate``: its flags, the fields of its JSON, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from ocssd_daemon.cli.client import main
from ocssd_daemon.sim import workloads
from ocssd_daemon.sim.workloads import WorkloadError

SMALL = ("--set", "geometry.chunks=64", "--set", "geometry.sectors=64", "--set", "ftl.op=0.28")
PERCENTILES = {"p50", "p99", "p999", "max"}


def ocssd(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["simulate", *SMALL, *arguments])


def result(*arguments: str) -> dict[str, Any]:
    done = ocssd(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    return dict(msgspec.json.decode(done.stdout))


def test_the_json_has_the_promised_fields() -> None:
    done = result("--workload", "mix:70", "--set", "latency.profile=slc", "--ios", "5000", "--warmup", "1")
    assert {
        "waf",
        "user_sectors_written",
        "gc_sectors_moved",
        "flash_sectors_written",
        "iops",
        "virtual_seconds",
        "wall_seconds",
        "placements_per_second",
        "latency_ns",
        "gc_share",
        "wear",
        "over_time",
    } <= done.keys()
    assert done["latency_ns"].keys() == {"read", "write"}
    assert done["latency_ns"]["read"].keys() >= PERCENTILES
    assert done["ios"] == 5000
    assert done["iops"] == pytest.approx(5000 / done["virtual_seconds"])


@pytest.mark.parametrize(
    "workload",
    [
        "randwrite",
        "randread",
        "seqwrite",
        "seqread",
        "mix:70",
        "zipf:1.1",
        "hotcold:0.05/0.95",
        "zipf:1.1+mix:70",
    ],
)
def test_every_workload_runs_with_and_without_latency(workload: str) -> None:
    for profile in ("none", "tlc"):
        done = result(
            "--workload", workload, "--set", f"latency.profile={profile}", "--ios", "3000", "--warmup", "0.5"
        )
        assert done["ios"] == 3000


def test_the_same_seed_gives_the_same_result_and_another_seed_another() -> None:
    def figures(seed: str) -> dict[str, Any]:
        flags = ("--workload", "mix:50", "--set", "latency.profile=mlc", "--ios", "4000", "--seed", seed)
        done = result(*flags)
        return {
            key: value
            for key, value in done.items()
            if "wall" not in key and key not in ("placements_per_second", "cpu_seconds")
        }

    assert figures("7") == figures("7")
    assert figures("7") != figures("8")


def test_sequential_overwrites_need_no_moves() -> None:
    done = result("--workload", "seqwrite", "--overwrites", "3", "--set", "ftl.victim=greedy")
    assert done["waf"] == pytest.approx(1.0, abs=0.01)


def test_a_trace_runs_at_its_own_pace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    lines = [f"f read {4096 * i} 4096\nf wait 1000" for i in range(1000)]
    path.write_text("fio version 2 iolog\nf add\nf open\n" + "\n".join(lines) + "\n")
    done = result("--trace", str(path), "--set", "latency.profile=slc")
    assert done["ios"] == 1000
    assert done["virtual_seconds"] == pytest.approx(0.999, rel=0.01)
    assert done["latency_ns"]["read"]["max"] == 40_000 + 5_000 + 2_000


def test_a_table_can_be_written_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    result("--workload", "randwrite", "--ios", "5000", "--table", str(path))
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 100
    assert float(rows[-1]["waf"]) > 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "name one of --workload and --trace"),
        (("--workload", "randwrit"), "workload randwrit: must be randwrite, randread"),
        (("--workload", "mix:seventy"), "percentage of reads is seventy: must be a number from 0 to 100"),
        (("--workload", "hotcold:0.05"), "share of the I/O that they get is missing"),
        (("--workload", "zipf:1.1+seqread"), "joins two of the same kind"),
        (("--workload", "randwrite", "--set", "ftl.opp=1"), "no such setting; did you mean ftl.op?"),
        (
            ("--workload", "randwrite", "--set", "latency.profile=plc"),
            "latency.profile=plc (--set): must be one of none",
        ),
        (
            ("--workload", "randwrite", "--set", "latency.sense_ns=1,2,3,4,5"),
            "must be 1 to 4 numbers, one per page kind",
        ),
        (
            ("--workload", "randwrite", "--set", "latency.erase_ns=-1"),
            "latency.erase_ns=-1 (--set): must be from 0 to",
        ),
        (("--workload", "randread", "--set", "latency.erase_ns=1", "--set", "latency.planes=-3"), "must be at least 1"),
        (("--workload", "randread", "--set", "latency.erase_ns=1", "--set", "latency.page_sectors=0"), "at least 1"),
        (("--trace", "/nonexistent"), "/nonexistent: No such file or directory"),
        (
            ("--workload", "randwrite", "--ios", "100", "--table", "out.xls"),
            "out.xls: must end in .csv or .parquet",
        ),
        (
            ("--workload", "randwrite", "--table", "/no/such/directory/out.csv"),
            "/no/such/directory/out.csv: No such file or directory",
        ),
        (("--workload", "randwrite", "--plot", "/no/such/directory/out.png"), "/no/such/directory/out.png: "),
        (("--workload", "randwrite", "--plot", "out.doc"), "out.doc: "),
        (("--workload", "randwrite", "--fill", "nan"), "'--fill': nan is not finite"),
        (("--workload", "randwrite", "--warmup", "nan"), "'--warmup': nan is not finite"),
        (("--workload", "randwrite", "--overwrites", "inf"), "'--overwrites': inf is not finite"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments: tuple[str, ...], complaint: str) -> None:
    done = ocssd(*arguments)
    assert complaint in done.output
    assert done.exit_code == (1 if "/nonexistent" in arguments else 2)


def test_a_profile_file_names_file_and_key_when_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "drive.toml"
    path.write_text("sense_ns = 40000\nprogramm_ns = 3\n")
    done = ocssd("--workload", "randread", "--set", f"latency.profile={path}")
    assert f"{path}:2: Object contains unknown field `programm_ns`; there are sense_ns, program_ns," in done.output
    path.write_text('sense_ns = 40000\n\nerase_ns = "long"\n')
    done = ocssd("--workload", "randread", "--set", f"latency.profile={path}")
    assert f"{path}:3: Expected `int`, got `str` - at `$.erase_ns`" in done.output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sense_ns = 40000\nerase_ns = -1\n", ":2: erase_ns = -1: must be from 0 to 1000000000000 ns"),
        ("sense_ns = [1, 2, 3, 4, 5]\n", ":1: sense_ns = [1,2,3,4,5]: must be 1 to 4 numbers, one per page kind"),
        ("erase_ns = 1\n\nplanes = 100000\n", ":3: planes = 100000: a row of all planes must fit a chunk of"),
    ],
)
def test_a_number_of_a_profile_file_that_cannot_be_is_named_with_its_line(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "drive.toml"
    path.write_text(text)
    done = ocssd("--workload", "randread", "--set", f"latency.profile={path}")
    assert f"{path}{complaint}" in done.output
    assert done.exit_code == 2


def test_a_profile_file_sets_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "drive.toml"
    path.write_text("sense_ns = [10000, 30000]\ntransfer_ns_per_sector = 1000\n")
    done = result("--workload", "randread", "--qd", "1", "--ios", "1000", "--set", f"latency.profile={path}")
    assert done["latency_ns"]["read"]["max"] == 31_000


def test_workload_names_can_be_joined() -> None:
    spec = workloads.parse("hotcold:0.1/0.9+mix:30")
    assert (spec.pattern, spec.hot, spec.heat, spec.reads) == ("hotcold", 0.1, 0.9, 0.3)
    with pytest.raises(WorkloadError):
        workloads.parse("")
