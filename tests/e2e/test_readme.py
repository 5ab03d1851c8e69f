"""The README's shell examples work: each is run as it stands, but for the directory of its sockets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ocssd_daemon.cli.attach import qemu_line
from tests.kit.daemon import ROOT, Daemon, daemon, environment
from tests.kit.requires import requires

BLOCKS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
DAEMON_BLOCK = next(block for block in BLOCKS if block.startswith("ocssd-daemon --socket"))
QEMU_BLOCK = next(block for block in BLOCKS if block.startswith("qemu-system-x86_64"))
# `make run` has a test of its own, in test_make.py.
OTHERS = [block for block in BLOCKS if block not in (DAEMON_BLOCK, QEMU_BLOCK) and not block.startswith("make ")]
GUEST_READS_S = 60


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Daemon]:
    """The README's daemon, with its sockets in *tmp_path* instead of /run."""
    program, *arguments = shlex.split(DAEMON_BLOCK.replace("/run/", f"{tmp_path}/"), comments=True)
    assert program == "ocssd-daemon"
    with daemon(tmp_path, *arguments, "--control", tmp_path / "ocssd.sock.ctl") as ours:
        ours.control = tmp_path / "ocssd.sock.ctl"
        yield ours


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A directory with ocssd and ocssd-daemon, as ``pip install`` makes them."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, module in (("ocssd", "client"), ("ocssd-daemon", "daemon")):
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -m ocssd_daemon.cli.{module} "$@"\n')
        path.chmod(0o755)
    return directory


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: " ".join(block.split()[:2]))
def test_the_example_works(served: Daemon, commands: Path, tmp_path: Path, block: str) -> None:
    for program in ("nbdinfo", "nbdcopy"):
        requires(program, "libnbd-bin")
    requires("qemu-img", "qemu-utils")
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", block.replace("/run/", f"{tmp_path}/")],
        cwd=tmp_path,
        env=environment(PATH=f"{commands}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_qemu_line_is_the_one_that_the_daemon_prints() -> None:
    assert QEMU_BLOCK.strip() == qemu_line("/run/ocssd.sock")


def test_the_qemu_line_gives_a_guest_the_disk(served: Daemon, tmp_path: Path) -> None:
    requires("qemu-system-x86_64", "qemu-system-x86")
    line = QEMU_BLOCK.replace("/run/", f"{tmp_path}/")
    with open(tmp_path / "qemu.log", "wb") as log:
        qemu = subprocess.Popen(["/bin/sh", "-c", f"exec {line}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            # The firmware looks for a boot sector: that is the first request.
            deadline_s = time.monotonic() + GUEST_READS_S
            while served.ask("stats")["transports"]["vhost-user"]["requests"] == 0:
                assert qemu.poll() is None, (tmp_path / "qemu.log").read_text()
                assert time.monotonic() < deadline_s, "the firmware read nothing"
        finally:
            qemu.kill()
            qemu.wait()
