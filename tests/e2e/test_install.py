"""Getting it: `pip install .` on a machine without Cython, and `make run` on a checkout."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.daemon import READY_S, ROOT
from tests.kit.requires import missing, requires

BUILD_S = 900
NOT_SOURCE = shutil.ignore_patterns(".*", "run", "build", "*.so", "*.c", "*.egg-info", "__pycache__")


@pytest.mark.slow
@pytest.mark.timeout(BUILD_S)
def test_pip_install_builds_both_commands_without_a_cython_of_ours(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "."], cwd=source, capture_output=True, text=True, check=False, env=outside())
    if "No matching distribution" in done.stderr or "Failed to establish" in done.stderr:
        missing("a package index that pip can reach", "connect, or set PIP_INDEX_URL")
    assert done.returncode == 0, done.stderr
    command = [tmp_path / "venv/bin/ocssd-daemon", "--nbd", "unix:-", "--socket", "-", "--run"]
    served = subprocess.run(
        [*command, f'{tmp_path}/venv/bin/ocssd --control "$ctl" info -o json'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=outside(),
    )
    assert served.returncode == 0, served.stderr
    assert '"addresses"' in served.stdout


def outside() -> dict[str, str]:
    """An environment in which nothing of this checkout can be imported."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_make_run_serves_a_disk_and_an_interrupt_ends_it(tmp_path: Path) -> None:
    if not (ROOT / ".venv/.runtime").exists():
        missing("the environment that make has set up", "make dev")
    nbdinfo = requires("nbdinfo", "libnbd-bin")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, open(tmp_path / "log", "wb") as log:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(READY_S)
        # A session of its own, so that the interrupt goes to make and the daemon alike, as from a terminal.
        make = subprocess.Popen(
            ["make", "-C", str(ROOT), "run", f"RUN_DIR={tmp_path}/run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "MAKEFLAGS": ""},
            start_new_session=True,
        )
        try:
            assert b"READY=1" in manager.recv(4096)
            printed = (tmp_path / "log").read_text()
            uri = f"nbd+unix:///?socket={tmp_path}/run/nbd.sock"
            assert f"'{uri}'" in printed
            assert "qemu-system-x86_64 -machine" in printed
            subprocess.run([nbdinfo, uri], check=True, stdout=subprocess.DEVNULL)
            os.killpg(make.pid, signal.SIGINT)
            make.wait(READY_S)
        finally:
            if make.poll() is None:
                os.killpg(make.pid, signal.SIGKILL)
                make.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert os.listdir(tmp_path / "run") == []
