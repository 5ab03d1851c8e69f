"""Owns result tables as files: CSV by the standard library, Parquet by pyarrow. Rows are flat dicts of one shape."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


class OutputError(ValueError):
    """A file that cannot be written; one line."""


def _write_csv(rows: list[dict[str, Any]], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(rows: list[dict[str, Any]], path: str) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise OutputError(f"{path}: Parquet needs pyarrow (pip install 'ocssd-daemon[sim]')") from None
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet}


def check_path(path: str) -> None:
    """Raises OutputError unless *path* names a known kind of table in a directory that is there."""
    if Path(path).suffix not in _WRITERS:
        raise OutputError(f"{path}: must end in {' or '.join(_WRITERS)}")
    check_directory(path)


def check_directory(path: str) -> None:
    """Raises OutputError unless the directory of *path* exists: said before the work, not after it."""
    if not Path(path).parent.is_dir():
        raise OutputError(f"{path}: No such file or directory")


def write(rows: list[dict[str, Any]], path: str) -> None:
    """Write *rows* in the format that the name's ending asks for. Raises OutputError."""
    check_path(path)
    try:
        _WRITERS[Path(path).suffix](rows, path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one row: ``latency_ns.read.p99``. Lists are left out."""
    row: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            row[prefix + name] = value
    return row


def squared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each with every column that any of them has."""
    columns = {name: None for row in rows for name in row}
    return [columns | row for row in rows]
