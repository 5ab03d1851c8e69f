"""Owns a grid of experiments: read it, run what is missing on many cores, keep each result as soon as it is there.

    workload = "randwrite"              a value, or in [grid] a list
    overwrites = 5                      and qd, fill, ios, warmup, seed as for one experiment
    [set]
    "geometry.chunks" = 256             settings of all points
    [grid]
    "ftl.op" = [0.11, 0.2, 0.28]        one experiment per combination
    "ftl.victim" = ["greedy", "cost-benefit"]

Results are appended to a journal (one JSON object a line, with the point's settings), so that a sweep that was stopped
goes on where it stood.
"""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from ocssd_daemon import settings as sets
from ocssd_daemon.device import DeviceError
from ocssd_daemon.sim import run, tables, traces, workloads

Point = dict[str, Any]
Row = dict[str, Any]

PLAN_KEYS = {"workload": "workload", "trace": "trace", "qd": "depth", "fill": "fill", "overwrites": "overwrites",
             "ios": "ios", "warmup": "warmup", "seed": "seed"}  # fmt: skip


_WHOLE, _REAL = int, (int, float)
_MOST = 1 << 62
_PLAN_RULES: dict[str, tuple[Any, Any, Any, str]] = {  # type, least, most, in words
    "qd": (_WHOLE, 1, 65536, "a whole number from 1 to 65536"),
    "fill": (_REAL, 0, 1, "a number from 0 to 1"),
    "overwrites": (_REAL, 0, _MOST, "a number from 0"),
    "ios": (_WHOLE, 1, _MOST, "a whole number from 1"),
    "warmup": (_REAL, 0, _MOST, "a number from 0"),
    "seed": (_WHOLE, 0, _MOST, "a whole number from 0"),
    "trace": (str, "", "", "the path of a file"),
}


class SweepError(ValueError):
    """A sweep that cannot be; one line."""


class Sweep(msgspec.Struct, frozen=True):
    """What a sweep file says: the points in order, and the keys that vary."""

    points: list[Point]
    varied: list[str]


def _check_key(path: str, key: str) -> None:
    if key not in PLAN_KEYS and key not in sets.KEYS:
        raise SweepError(f"{path}: {key}: no such setting, and none of {', '.join(PLAN_KEYS)}")


def _grid(path: str, table: dict[str, Any]) -> dict[str, list[Any]]:
    for key, values in table.items():
        _check_key(path, key)
        if not isinstance(values, list) or not values:
            raise SweepError(f"{path}: grid.{key}: must be a list of values")
    return table


def load(path: str) -> Sweep:
    """The sweep of a TOML file; every point is checked before any runs. Raises SweepError."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: {error}") from None
    grid = _grid(path, tree.pop("grid", {}))
    common = {**tree.pop("set", {}), **tree}
    for key in common:
        _check_key(path, key)
    points = [common | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for point in points:
        try:
            plan_of(point)
        except (sets.SettingsError, workloads.WorkloadError, SweepError) as error:
            raise SweepError(f"{path}: {error}") from None
    return Sweep(points, list(grid))


def plan_of(point: Point) -> tuple[sets.Settings, run.Plan, frozenset[str]]:
    """Settings, plan and named keys of one point. Raises SettingsError, WorkloadError and SweepError."""
    layer = {key: sets.Given(value, "sweep") for key, value in point.items() if key not in PLAN_KEYS}
    fields = {PLAN_KEYS[key]: value for key, value in point.items() if key in PLAN_KEYS}
    if ("workload" in fields) == ("trace" in fields):
        raise SweepError("name one of workload and trace")
    for key, (kind, low, high, words) in _PLAN_RULES.items():
        value = point.get(key, low)
        if isinstance(value, bool) or not isinstance(value, kind) or (kind is not str and not low <= value <= high):
            raise SweepError(f"{key} = {value}: must be {words}")
    if "workload" in fields:
        fields["workload"] = workloads.parse(str(fields["workload"]))
    return sets.build(layer), run.Plan(**fields), frozenset(layer)


def run_point(point: Point) -> Row:
    """One experiment as one flat row: the point's keys, then its results; ``error`` when it could not be run."""
    try:
        settings, plan, named = plan_of(point)
        result = run.simulate(settings, plan, named)
    except (DeviceError, run.NoSpaceError, traces.TraceError) as error:
        return {**point, "error": str(error)}
    return {**tables.flat(result), **point, "error": None}


def _name(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def journal(path: str) -> dict[str, Row]:
    """Rows of an earlier run, by point. A line that was cut off by a crash is dropped."""
    rows: dict[str, Row] = {}
    if os.path.exists(path):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                rows[_name(entry["point"])] = entry["row"]
            except (ValueError, KeyError, TypeError):
                continue
    return rows


def _local_results(pool: Executor, points: list[Point]) -> Iterator[tuple[Point, Row]]:
    waiting: dict[Future[Row], Point] = {pool.submit(run_point, point): point for point in points}
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future.result()


def local(points: list[Point], processes: int | None = None) -> Iterator[tuple[Point, Row]]:
    """Results of *points* from this machine's cores, as they come."""
    with ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")
    ) as pool:
        yield from _local_results(pool, points)


def dask(points: list[Point], address: str) -> Iterator[tuple[Point, Row]]:
    """Results of *points* from a Dask cluster, as they come. Raises SweepError when it cannot be reached."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise SweepError("--dask needs the package distributed (pip install 'ocssd-daemon[dask]')") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise SweepError(f"--dask {address}: {error}") from None
    with client:
        futures = {client.submit(run_point, point, pure=False): point for point in points}
        for future in as_completed(list(futures)):
            yield futures[future], future.result()


def results(
    sweep: Sweep,
    journal_path: str,
    source: Callable[[list[Point]], Iterator[tuple[Point, Row]]],
    progress: Callable[[float], None] = lambda share: None,
) -> list[Row]:
    """All rows in the order of the points: those of the journal, and the missing ones from *source*."""
    known = journal(journal_path)
    missing = [point for point in sweep.points if _name(point) not in known]
    with open(journal_path, "a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # a crash may have cut the last line off
        for done, (point, row) in enumerate(source(missing) if missing else (), 1):
            known[_name(point)] = row
            file.write(json.dumps({"point": point, "row": row}) + "\n")
            file.flush()
            progress(1 - (len(missing) - done) / len(sweep.points))
    return [known[_name(point)] for point in sweep.points]


def axes(sweep: Sweep) -> tuple[str, str | None]:
    """What to draw over (the first key that varies in numbers), and what makes the lines (the other keys, joined)."""
    numeric = [key for key in sweep.varied if all(isinstance(p[key], int | float) for p in sweep.points)]
    if not numeric:
        raise SweepError("nothing to draw over: no key of the grid is numeric")
    others = [key for key in sweep.varied if key != numeric[0]]
    return numeric[0], ", ".join(others) or None


def with_series(rows: list[Row], series: str | None) -> list[Row]:
    """Rows with the joined key of ``axes`` as one more column."""
    if series is None:
        return rows
    keys = series.split(", ")
    return [{**row, series: ", ".join(str(row[key]) for key in keys)} for row in rows]
