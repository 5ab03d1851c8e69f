"""The layering: import-linter holds the Python packages to it; this file holds the compiled modules to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ocssd_daemon"

CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", re.MULTILINE)
# What Cython code may name besides ocssd_daemon.native: C's library, CPython, and numpy for views of memory.
FOREIGN = ("libc", "cpython", "posix", "cython", "numpy")


def imports_of(path: Path) -> set[str]:
    return {a or b for a, b in CIMPORT.findall(path.read_text())}


def python_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("header", sorted((PACKAGE / "native").glob("*.pxd")), ids=lambda p: p.name)
def test_native_headers_import_only_each_other(header: Path) -> None:
    allowed = ("ocssd_daemon.native", *FOREIGN)
    assert [m for m in imports_of(header) if not m.startswith(allowed)] == []


@pytest.mark.parametrize("facade", sorted(PACKAGE.glob("*.p[yx][xd]")), ids=lambda p: p.name)
def test_compiled_facades_import_nothing_of_ours_but_native_and_each_other(facade: Path) -> None:
    allowed = ("ocssd_daemon.native", "ocssd_daemon._", *FOREIGN)
    assert [m for m in imports_of(facade) if not m.startswith(allowed)] == []


def test_construct_appears_only_in_protocol() -> None:
    users = {p for p in python_sources() if any(m.split(".")[0] == "construct" for m in imports_of(p))}
    assert [p for p in users if PACKAGE / "protocol" not in p.parents] == []

