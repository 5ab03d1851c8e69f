"""``ocssd sweep``: a grid on local processes and on a Dask cluster; resumed, drawn, refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ocssd_daemon.cli.client import main
from ocssd_daemon.sim import sweep
from ocssd_daemon.sim.sweep import SweepError
from tests.kit.requires import missing

GRID = """
workload = "mix:50"
ios = 2000
warmup = 0.5
[set]
"geometry.chunks" = 64
"geometry.sectors" = 64
"latency.profile" = "slc"
[grid]
"ftl.op" = [0.28, 0.5]
"ftl.victim" = ["greedy", "cost-benefit"]
"""


def grid_file(tmp_path: Path, text: str = GRID) -> str:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return str(path)


def run_sweep(tmp_path: Path, *flags: str) -> Result:
    table = ("--table", str(tmp_path / "out.csv"))
    return CliRunner().invoke(main, ["sweep", grid_file(tmp_path), *table, *flags])


def rows(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "out.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    points = sweep.load(grid_file(tmp_path)).points
    assert [(p["ftl.op"], p["ftl.victim"]) for p in points] == [
        (0.28, "greedy"),
        (0.28, "cost-benefit"),
        (0.5, "greedy"),
        (0.5, "cost-benefit"),
    ]


def test_local_processes_give_one_row_per_point(tmp_path: Path) -> None:
    done = run_sweep(tmp_path, "--processes", "2")
    assert done.exit_code == 0, done.output
    assert [(row["ftl.op"], row["ftl.victim"]) for row in rows(tmp_path)] == [
        ("0.28", "greedy"), ("0.28", "cost-benefit"), ("0.5", "greedy"), ("0.5", "cost-benefit")
    ]  # fmt: skip
    assert all(float(row["waf"]) >= 1 and float(row["latency_ns.read.p99"]) > 0 for row in rows(tmp_path))


def test_a_stopped_sweep_goes_on_where_it_stood(tmp_path: Path) -> None:
    plan = sweep.load(grid_file(tmp_path))
    journal = tmp_path / "journal"
    kept = {"point": plan.points[0], "row": {"waf": 42.0, "error": None}}
    journal.write_text(json.dumps(kept) + "\n" + '{"point": {"cut of')
    asked: list[Any] = []

    def source(points: list[sweep.Point]) -> Any:
        asked.extend(points)
        return ((point, {"waf": 1.0, "error": None}) for point in points)

    done = sweep.results(plan, str(journal), source)
    assert asked == plan.points[1:]
    assert [row["waf"] for row in done] == [42.0, 1.0, 1.0, 1.0]
    assert len(sweep.journal(str(journal))) == 4


def test_plots_of_waf_and_p99_are_drawn(tmp_path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("matplotlib", "pip install matplotlib")
    done = run_sweep(tmp_path, "--plot", str(tmp_path / "out.png"))
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "out-waf.png",
        "out-read-p99.png",
        "out-write-p99.png",
    }


def test_a_dask_cluster_gives_the_same_rows_as_local_processes(tmp_path: Path) -> None:
    try:
        from distributed import LocalCluster
    except ImportError:
        missing("distributed", "pip install distributed")
    (tmp_path / "local").mkdir()
    (tmp_path / "dask").mkdir()
    assert run_sweep(tmp_path / "local").exit_code == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        done = run_sweep(tmp_path / "dask", "--dask", cluster.scheduler_address)
    assert done.exit_code == 0, done.output
    clock = {"wall_seconds", "cpu_seconds", "placements_per_second", "ios_per_wall_second"}
    local, dask = (
        [{key: value for key, value in row.items() if key not in clock} for row in rows(tmp_path / side)]
        for side in ("local", "dask")
    )
    assert local == dask


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[grid]\n'ftl.opp' = [1]", "ftl.opp: no such setting"),
        ("[grid]\n'ftl.op' = 1", "grid.ftl.op: must be a list of values"),
        ("workload = 'randwrite'\n[grid]\n'ftl.op' = [0.2, 99]", "ftl.op=99 (sweep): must be a number from"),
        ("[grid]\n'ftl.op' = [0.2]", "name one of workload and trace"),
        ("workload = 'random'", "workload random: must be randwrite"),
        ("workload = ", "Invalid value"),
        ("workload = 'randwrite'\nqd = 'many'", "qd = many: must be a whole number from 1 to 65536"),
        ("workload = 'randwrite'\n[grid]\nfill = [0.5, 2]", "fill = 2: must be a number from 0 to 1"),
        ("workload = 'randwrite'\nios = 0", "ios = 0: must be a whole number from 1"),
        ("workload = 'randwrite'\nwarmup = -1", "warmup = -1: must be a number from 0"),
        ("trace = 7", "trace = 7: must be the path of a file"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(SweepError) as caught:
        sweep.load(grid_file(tmp_path, text))
    assert complaint in str(caught.value)


def test_a_point_that_cannot_be_run_is_a_row_with_its_error(tmp_path: Path) -> None:
    row = sweep.run_point({"workload": "randwrite", "ios": 10, "geometry.chunks": 4})
    assert "geometry.chunks = 4: the FTL needs at least 5 chunks per PU" in row["error"]
