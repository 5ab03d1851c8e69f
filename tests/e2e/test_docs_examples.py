"""The examples of the documentation run as they stand: shell blocks, and the FTL of the Python page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.daemon import ROOT, environment
from tests.kit.reference_image import ReferenceWriter

PAGES = ("images.md", "troubleshooting.md")
SHELL = [(page, block) for page in PAGES
         for block in re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with ocssd, as ``pip install`` makes it."""
    directory = tmp_path / "bin"
    directory.mkdir()
    path = directory / "ocssd"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m ocssd_daemon.cli.client "$@"\n')
    path.chmod(0o755)
    return directory


@pytest.mark.parametrize(("page", "block"), SHELL, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SHELL)])
def test_a_shell_example_works(tmp_path: Path, programs: Path, page: str, block: str) -> None:
    ReferenceWriter(tmp_path / "old.img")
    done = subprocess.run(["/bin/sh", "-e", "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False,
                          timeout=60, env=environment(PATH=f"{programs}:/usr/bin:/bin"))
    assert done.returncode == 0, done.stdout + done.stderr


# What each program of the Python page prints: 2 us controller, 40 us sense, 5 us transfer; then the FTL's pages.
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
PRINTS = (r"47 us for a read\n", r"\d+ pages recovered\n")


@pytest.mark.parametrize(("program", "prints"), list(zip(PROGRAMS, PRINTS, strict=True)), ids=("time", "ftl"))
def test_a_program_of_the_python_page_prints_what_it_should(tmp_path: Path, program: str, prints: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
                          timeout=60, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(prints, done.stdout)
