"""Owns how results look: one table for people, one JSON document for programs."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.compare import Row, number

HEADINGS = ("case", "unit", "ours", "peer", "its value", "ratio", "goal", "")
VERDICT = {True: "pass", False: "MISS", None: ""}


def cells(row: Row) -> tuple[str, ...]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    goal = str(row.goal) if row.goal else ""
    verdict = row.note or VERDICT[row.met]
    return (
        row.what,
        row.unit,
        number(row.ours),
        row.peer_name or "-",
        number(row.peer),
        ratio,
        goal,
        verdict,
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as one Markdown table, a heading line before each group."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append((f"**{group}**", *[""] * (len(HEADINGS) - 1)))
        lines.append(cells(row))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    drawn = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([drawn[0], rule, *drawn[1:]])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> dict[str, object]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "load_1min": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def write_json(path: Path, rows: Iterable[Row], settings: dict[str, object]) -> None:
    document = {"machine": machine(), "settings": settings, "rows": [row.as_json() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
