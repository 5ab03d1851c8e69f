"""``python -m bench``: run the groups, print one table, write one JSON document."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.compare import Row
from bench.programs import Unavailable
from bench.report import machine, table, write_json
from bench.settings import Settings

GROUPS = ("vhost", "nbd", "vfio", "ftl", "sim", "latency", "start")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"which of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side; the median counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement")
    parser.add_argument("--size", default="4G", help="raw flash of our daemon")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the JSON document goes")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    chosen = parser.parse_args()
    unknown = set(chosen.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    return chosen


def group_rows(name: str, settings: Settings) -> Iterator[Row]:
    """The rows of one group; what it cannot measure is a row that says why."""
    try:
        yield from importlib.import_module(f"bench.{name}").rows(settings)
    except (Unavailable, RuntimeError) as reason:
        yield Row(name, "not measured", "", note=str(reason))


def main() -> int:
    chosen = arguments()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="ocssd-bench-") as directory:
        settings = Settings(Path(directory), chosen.rounds, chosen.seconds, chosen.size)
        for name in chosen.groups or GROUPS:
            settings.say(f"group {name}")
            rows += group_rows(name, settings)
    print(" · ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"medians of {chosen.rounds} alternated runs of {chosen.seconds:g} s; ratio = ours ÷ peer\n")
    print(table(rows))
    write_json(chosen.json, rows, {"rounds": chosen.rounds, "seconds": chosen.seconds, "size": chosen.size})
    return 1 if chosen.strict and any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
