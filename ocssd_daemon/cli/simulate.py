"""``ocssd simulate``: owns its arguments and how its result looks. Everything heavy is imported when it runs.

Exit codes: 0 done, 1 it cannot be run (trace, no space, output), 2 usage, settings or workload.
"""

from __future__ import annotations

from typing import Any

import click

from ocssd_daemon.cli.arguments import FiniteRange, config_option, preset_option, set_option, settings_of
from ocssd_daemon.cli.output import Refusal, WrongSettings, output_option, progress_bar, show


def _show_text(result: dict[str, Any]) -> None:
    show({key: value for key, value in result.items() if key != "over_time"}, "text")


def _check_extras(plot: str | None, table: str | None) -> None:
    """Refuse files that could not be written: before the run, not after it."""
    from ocssd_daemon.sim import plots, tables

    try:
        if table:
            tables.check_path(table)
        if plot:
            plots.check_path(plot)
    except tables.OutputError as error:
        raise WrongSettings(str(error)) from None


def _write_extras(result: dict[str, Any], plot: str | None, table: str | None) -> None:
    from ocssd_daemon.sim import tables

    try:
        if table:
            tables.write(result["over_time"], table)
        if plot:
            from ocssd_daemon.sim import plots

            plots.over_time(result, plot)
    except tables.OutputError as error:
        raise Refusal(str(error)) from None


@click.command(short_help="Run a workload in virtual time, without a daemon.")
@set_option
@config_option
@preset_option
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
    type=FiniteRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of the disk written beforehand.",
)
@click.option(
    "--overwrites",
    type=FiniteRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Length, in times the filled part.",
)
@click.option("--ios", type=click.IntRange(1), help="Length in requests, instead.")
@click.option(
    "--warmup", type=FiniteRange(0), default=5.0, show_default=True, help="Overwrites before measuring."
)
@click.option("--seed", type=click.IntRange(0), default=7, show_default=True, help="Seed of the workload.")
@click.option("--plot", metavar="OUT.png", help="Draw IOPS, WAF and GC share over time.")
@click.option("--table", metavar="OUT.csv|OUT.parquet", help="Write the course over time.")
@output_option
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
    _check_extras(plot, table)
    from ocssd_daemon.device import DeviceError
    from ocssd_daemon.sim import run, traces, workloads

    try:
        spec = workloads.parse(workload) if workload else None
        plan = run.Plan(workload=spec, trace=trace, **lengths)
        with progress_bar(workload or trace or "") as progress:
            result = run.simulate(settings, plan, named, progress)
    except (DeviceError, workloads.WorkloadError) as error:
        raise WrongSettings(str(error)) from None
    except (traces.TraceError, run.NoSpaceError) as error:
        raise Refusal(str(error)) from None
    _write_extras(result, plot, table)
    show(result, output, _show_text)
