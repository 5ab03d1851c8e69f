"""Owns the drawings of results (matplotlib, an extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ocssd_daemon.sim.tables import OutputError, check_directory


def check_path(path: str) -> None:
    """Raises OutputError for a drawing that could not be saved: no matplotlib, no such directory or kind of file."""
    _pyplot(path)
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix[1:] not in {"", *kinds}:
        raise OutputError(f"{path}: must end in one of .{', .'.join(sorted(kinds))}")
    check_directory(path)


def _pyplot(path: str) -> Any:
    try:
        import matplotlib
    except ImportError:
        raise OutputError(f"{path}: plots need matplotlib (pip install 'ocssd-daemon[sim]')") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: str) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: {error}") from None


def over_time(result: dict[str, Any], path: str) -> None:
    """IOPS (with latency), WAF and the share of GC, over virtual time or over requests."""
    pyplot = _pyplot(path)
    rows = result["over_time"]
    timed = result["iops"] is not None
    x = [row["virtual_s" if timed else "ios"] for row in rows]
    names = (["iops"] if timed else []) + ["waf", "gc_share"]
    figure, axes = pyplot.subplots(len(names), 1, sharex=True, figsize=(8, 2.2 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.plot(x, [row[name] for row in rows])
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("virtual time, s" if timed else "requests")
    figure.suptitle(result["workload"] or result["trace"])
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def grid(rows: list[dict[str, Any]], x: str, y: str, series: str | None, path: str) -> None:
    """One line per value of *series*: *y* over *x*."""
    pyplot = _pyplot(path)
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for value in sorted({str(row[series]) for row in rows} if series else {""}):
        mine = [row for row in rows if series is None or str(row[series]) == value]
        points = sorted((row[x], row[y]) for row in mine if row.get(y) is not None)
        axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=value)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if series:
        axis.legend(title=series)
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)
