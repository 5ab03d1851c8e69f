"""``ocssd sweep``: owns its arguments and where its results go. Everything heavy is imported when it runs.

Exit codes: 0 every point ran, 1 a point cannot be run or the results not written, 2 usage or a wrong sweep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ocssd_daemon.cli.output import Refusal, WrongSettings, progress_bar


def _plots(sweep: Any, rows: list[dict[str, Any]], path: str) -> list[str]:
    """Draw WAF and, with latency, the p99 of reads and writes. Returns the files' paths."""
    from ocssd_daemon.sim import plots
    from ocssd_daemon.sim import sweep as sweeps

    x, series = sweeps.axes(sweep)
    drawn = sweeps.with_series([row for row in rows if not row["error"]], series)
    stem, ending = str(Path(path).with_suffix("")), Path(path).suffix or ".png"
    paths = []
    for name, column in (
        ("waf", "waf"),
        ("read-p99", "latency_ns.read.p99"),
        ("write-p99", "latency_ns.write.p99"),
    ):
        if any(row.get(column) is not None for row in drawn):
            paths.append(f"{stem}-{name}{ending}")
            plots.grid(drawn, x, column, series, paths[-1])
    return paths


@click.command()
@click.argument("file")
@click.option(
    "--table", default="sweep.csv", show_default=True, metavar="OUT.csv|OUT.parquet", help="Where rows go."
)
@click.option(
    "--plot",
    metavar="OUT.png",
    help="Draw OUT-waf.png, and with latency OUT-read-p99.png, OUT-write-p99.png.",
)
@click.option(
    "--dask", "address", metavar="ADDRESS", help="Run on this Dask cluster, such as tcp://host:8786."
)
@click.option("--processes", type=click.IntRange(1), help="Local processes; default: one per core.")
def sweep(file: str, table: str, plot: str | None, address: str | None, processes: int | None) -> None:
    """Run a grid of simulations. Stop it at any time: it goes on where it stood."""
    from ocssd_daemon.sim import plots, tables
    from ocssd_daemon.sim import sweep as sweeps

    try:
        tables.check_path(table)
        if plot:
            plots.check_path(plot)
        plan = sweeps.load(file)
    except (sweeps.SweepError, tables.OutputError) as error:
        raise WrongSettings(str(error)) from None
    try:
        with progress_bar(file) as progress:
            rows = sweeps.results(
                plan,
                f"{table}.journal",
                lambda points: sweeps.dask(points, address) if address else sweeps.local(points, processes),
                progress,
            )
        tables.write(tables.squared(rows), table)
        written = [table, *(_plots(plan, rows, plot) if plot else [])]
    except (sweeps.SweepError, tables.OutputError, OSError) as error:
        raise Refusal(str(error)) from None
    failed = [row for row in rows if row["error"]]
    click.echo(f"{len(rows)} points, {len(failed)} failed: {', '.join(written)}")
    if failed:
        raise Refusal(f"{len(failed)} points failed, the first: {failed[0]['error']}")
