"""The layering: import-linter holds the Python packages to it; this file holds the compiled modules to it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ocssd_daemon"

CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", re.MULTILINE)
# What the compiled modules may name of others: C's library, CPython, numpy's views of memory, the standard library.
FOREIGN = ("libc", "cpython", "posix", "cython", "numpy", *sys.stdlib_module_names)


def imports_of(path: Path) -> set[str]:
    return {a or b for a, b in CIMPORT.findall(path.read_text())}


def python_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("header", sorted((PACKAGE / "native").glob("*.pxd")), ids=lambda p: p.name)
def test_native_headers_import_only_each_other(header: Path) -> None:
    allowed = ("ocssd_daemon.native", "libc", "cpython", "posix", "cython")
    assert [m for m in imports_of(header) if not m.startswith(allowed)] == []


@pytest.mark.parametrize("facade", sorted(PACKAGE.glob("*.p[yx][xd]")), ids=lambda p: p.name)
def test_compiled_facades_import_nothing_of_ours_but_native_and_each_other(facade: Path) -> None:
    foreign = {m for m in imports_of(facade) if not m.startswith(("ocssd_daemon.native", "ocssd_daemon._"))}
    assert [m for m in foreign if m.split(".")[0] not in FOREIGN] == []


def construct_imports(path: Path) -> list[str]:
    return re.findall(r"^\s*((?:from construct|import construct).*)$", path.read_text(), re.MULTILINE)


def test_construct_appears_only_in_protocol() -> None:
    users = {p for p in python_sources() if construct_imports(p)}
    assert users
    assert [p for p in users if PACKAGE / "protocol" not in p.parents] == []


def test_the_client_loads_neither_trio_nor_numpy() -> None:
    heavy = "{'trio', 'numpy', 'construct', 'rich', 'ssl', 'asyncio'} & set(sys.modules)"
    program = f"import sys, ocssd_daemon.cli.client; print(*({heavy}))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_commands_stand_beside_each_other_and_import_what_they_share_from_below() -> None:
    shared = {"arguments", "output", "rpc"}
    commands = {p.stem for p in (PACKAGE / "cli").glob("*.py")} - shared - {"__init__", "client"}
    for module in sorted(commands | shared):
        text = (PACKAGE / "cli" / f"{module}.py").read_text()
        taken = set(re.findall(r"from ocssd_daemon\.cli\.(\w+) import", text))
        assert "client" not in taken, module
        assert module not in shared or taken <= shared - {module}, module
