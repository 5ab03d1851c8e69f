"""``ocssd simulate``: owns its arguments and how its result looks. Everything heavy is imported when it runs.

Exit codes: 0 done, 1 it cannot be run (settings, trace, workload, no space), 2 usage.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import msgspec


def refuse(line: str) -> click.ClickException:
    return click.ClickException(line)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the share done: a bar when a person looks at stderr, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda share: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def settings_of(preset: str, config: str | None, assignments: tuple[str, ...]) -> tuple[Any, frozenset[str]]:
    """Settings as the daemon reads them, and the keys that were named. Raises ClickException."""
    from ocssd_daemon import settings as sets

    try:
        layers = [
            sets.from_preset(preset),
            sets.from_toml(config) if config else {},
            sets.from_assignments(assignments),
        ]
        return sets.build(*layers), frozenset(key for layer in layers for key in layer)
    except sets.SettingsError as error:
        raise refuse(str(error)) from None


def _show_text(result: dict[str, Any]) -> None:
    from ocssd_daemon.cli.client import rows_of

    shown = {key: value for key, value in result.items() if key != "over_time"}
    rows = list(rows_of(shown))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _write_extras(result: dict[str, Any], plot: str | None, table: str | None) -> None:
    from ocssd_daemon.sim import tables

    try:
        if table:
            tables.write(result["over_time"], table)
        if plot:
            from ocssd_daemon.sim import plots

            plots.over_time(result, plot)
    except tables.OutputError as error:
        raise refuse(str(error)) from None


@click.command()
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting, as for ocssd-daemon."
)
@click.option("--config", metavar="FILE", help="TOML file of settings.")
@click.option("--preset", default="default", metavar="NAME", help="Settings to start from.")
@click.option(
    "--workload",
    metavar="NAME",
    help="randwrite, randread, seqwrite, seqread, mix:70, zipf:1.1, hotcold:0.05/0.95.",
)
@click.option(
    "--trace", metavar="FILE", help="fio iolog, blkparse text or MSR Cambridge CSV; also .gz and .zst."
)
@click.option(
    "--qd", "depth", type=click.IntRange(1, 65536), default=32, show_default=True, help="Requests in flight."
)
@click.option(
    "--fill",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of the disk written beforehand.",
)
@click.option(
    "--overwrites",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Length, in times the filled part.",
)
@click.option("--ios", type=click.IntRange(1), help="Length in requests, instead.")
@click.option(
    "--warmup", type=click.FloatRange(0), default=5.0, show_default=True, help="Overwrites before measuring."
)
@click.option("--seed", type=click.IntRange(0), default=7, show_default=True, help="Seed of the workload.")
@click.option("--plot", metavar="OUT.png", help="Draw IOPS, WAF and GC share over time.")
@click.option("--table", metavar="OUT.csv|OUT.parquet", help="Write the course over time.")
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output."
)
def simulate(
    assignments: tuple[str, ...],
    config: str | None,
    preset: str,
    plot: str | None,
    table: str | None,
    output: str,
    workload: str | None,
    trace: str | None,
    **lengths: Any,
) -> None:
    """Run a workload on a simulated drive, as fast as the CPU allows, in virtual time."""
    if (workload is None) == (trace is None):
        raise click.UsageError("name one of --workload and --trace")
    settings, named = settings_of(preset, config, assignments)
    from ocssd_daemon.device import DeviceError
    from ocssd_daemon.sim import run, traces, workloads

    try:
        spec = workloads.parse(workload) if workload else None
        plan = run.Plan(workload=spec, trace=trace, **lengths)
        with progress_bar(workload or trace or "") as progress:
            result = run.simulate(settings, plan, named, progress)
    except (DeviceError, workloads.WorkloadError, traces.TraceError, run.NoSpaceError) as error:
        raise refuse(str(error)) from None
    _write_extras(result, plot, table)
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    else:
        _show_text(result)
