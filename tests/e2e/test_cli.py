"""The command lines as users meet them: what they take, what they print, how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ocssd_daemon import __version__
from tests.kit.daemon import CLIENT, daemon, environment, run_client, run_daemon

START_S = 0.6


# ocssd-daemon: what needs no device


def test_without_a_transport_it_shows_the_ways() -> None:
    done = run_daemon()
    assert done.returncode == 2
    for way in ("--socket ", "--nbd unix:", "--nbd tcp:", "--vfio-user "):
        assert way in done.stderr


def test_capabilities_are_what_vhost_user_programs_are_asked_for() -> None:
    done = run_daemon("--print-capabilities")
    assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_version_is_the_packages() -> None:
    assert __version__ in run_daemon("--version").stdout


def test_check_says_what_the_device_would_be_and_starts_nothing(tmp_path: Path) -> None:
    done = run_daemon("--check", "--socket", tmp_path / "s", "--size", "1G")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1073741824 bytes of flash" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--size", "1M"], "geometry.chunks = 1"),
        (["--size", "16M", "--set", "ftl.op=0.02"], "ftl.op = 0.02"),
        (["--set", "geometry.sector_bytes=512", "--set", "ftl.block_bytes=4096"], "ftl.block_bytes = 4096"),
        (["--set", "ftl.pus=0-8"], "ftl.pus = 0-8"),
        (["--set", "geometry.maxocpu=1"], "geometry.maxocpu = 1"),
    ],
)
def test_check_refuses_what_the_start_would_refuse(tmp_path: Path, arguments: list[str], key: str) -> None:
    checked = run_daemon("--check", *arguments, "--store", tmp_path / "image")
    started = run_daemon("--nbd", f"unix:{tmp_path}/nbd", *arguments, "--store", tmp_path / "image")
    assert (checked.returncode, checked.stderr) == (2, started.stderr)
    assert key in checked.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_looks_at_the_image_and_leaves_it_alone(tmp_path: Path) -> None:
    store = tmp_path / "image"
    check = ("--check", "--store", store)
    assert run_client("create", "--preset", "tiny", str(store)).returncode == 0
    whole, room = store.stat().st_size, store.stat().st_blocks
    assert "64 sectors each, 67108864 bytes of flash" in run_daemon(*check).stdout
    other = run_daemon(*check, "--set", "geometry.groups=4")
    assert (other.returncode, "the image was made with geometry.groups = 1, not 4" in other.stderr) == (1, True)
    assert (store.stat().st_size, store.stat().st_blocks) == (whole, room)
    os.truncate(store, whole - 1)
    cut = run_daemon(*check)
    assert (cut.returncode, f"is cut short, {whole - 1} of {whole} bytes" in cut.stderr) == (1, True)
    store.write_bytes(b"something else")
    foreign = run_daemon(*check)
    assert (foreign.returncode, "is not an image of this program" in foreign.stderr) == (1, True)


def test_a_refused_start_leaves_an_empty_file_as_it_was(tmp_path: Path) -> None:
    store = tmp_path / "image"
    store.touch()
    start = ("--nbd", "unix:-", "--store", store, "--run", "true")
    assert run_daemon(*start, "--size", "1M").returncode == 2
    assert store.stat().st_size == 0
    done = run_daemon(*start, "--size", "64M")
    assert done.returncode == 0, done.stderr


# ocssd-daemon: its life


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_and_leaves_no_socket(tmp_path: Path, number: signal.Signals) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with daemon(tmp_path, "--nbd", f"unix:{sockets}/nbd", "--control", sockets / "ctl") as ours:
        assert sorted(os.listdir(sockets)) == ["ctl", "nbd"]
        assert ours.stop(number) == 0
    assert os.listdir(sockets) == []


def test_it_tells_its_manager_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", ready=False) as ours:
        ready = ours.state()
        assert ready["READY"] == "1"
        assert f"nbd+unix:///?socket={tmp_path}/nbd" in ready["STATUS"]
        ours.process.terminate()
        assert ours.state()["STOPPING"] == "1"
        assert ours.process.wait(30) == 0


def test_the_pid_file_has_the_pid_once_it_is_ready_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--pidfile", path) as ours:
        assert path.read_text() == f"{ours.process.pid}\n"
    assert not path.exists()


def test_a_captive_command_gets_the_uris_and_decides_the_exit_code(tmp_path: Path) -> None:
    command = f'echo "$uri $ctl" > {tmp_path}/seen; exit 7'
    done = run_daemon("--nbd", "unix:-", "--run", command)
    assert done.returncode == 7, done.stderr
    uri, control = (tmp_path / "seen").read_text().split()
    assert uri.startswith("nbd+unix:///?socket=/")
    assert not Path(control).parent.exists()


def test_a_captive_command_is_ended_with_the_daemon(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--run", f"echo $$ > {fifo}; exec cat") as ours:
        pid = int(fifo.read_text())
        assert ours.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    # The shell is the parent; it ends when its input does, after it has told us the daemon's pid.
    parent = ["/bin/sh", "-c", 'exec 3>&1; "$@" >&2 & echo $! >&3; exec 3>&-; read end', "sh"]
    arguments = ["--nbd", f"unix:{tmp_path}/nbd", "--exit-with-parent"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        shell = subprocess.Popen(
            [*parent, sys.executable, "-m", "ocssd_daemon.cli.daemon", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify")),
        )
        assert shell.stdout is not None
        child = os.pidfd_open(int(shell.stdout.readline()))
        assert b"READY=1" in manager.recv(4096)
        shell.communicate(b"", timeout=30)
        assert b"STOPPING=1" in manager.recv(4096)
    os.close(child)


def test_a_second_signal_ends_it_at_once_but_leaves_no_socket(tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with daemon(tmp_path, "--nbd", f"unix:{sockets}/nbd", "--control", sockets / "ctl") as ours:
        # A stopped process takes both signals before it runs again.
        ours.process.send_signal(signal.SIGSTOP)
        ours.process.send_signal(signal.SIGTERM)
        ours.process.send_signal(signal.SIGINT)
        ours.process.send_signal(signal.SIGCONT)
        assert ours.process.wait(30) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert os.listdir(sockets) == []


def test_it_is_ready_within_its_budget(tmp_path: Path) -> None:
    def start_s() -> float:
        begin_s = time.monotonic()
        with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd"):
            return time.monotonic() - begin_s

    # The best of a few: this asks what a start costs, not what else the machine does.
    assert min(start_s() for _ in range(5)) <= START_S


def test_show_attach_prints_lines_to_paste(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--show-attach") as ours:
        assert f"'nbd+unix:///?socket={tmp_path}/nbd'" in ours.said()
        ask = f"--control {tmp_path}/control.ctl stats"
        line = next(line for line in ours.said().splitlines() if line.endswith(ask))
        told = subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout
        assert "user_sectors_written" in told


# ocssd


def test_stats_have_the_promised_names(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd") as ours:
        stats = ours.ask("stats")
    assert {"user_sectors_written", "gc_sectors_moved", "flash_sectors_written", "waf"} <= stats["ftl"].keys()
    assert {"requests", "errors"} <= stats["transports"]["nbd"].keys()


def test_info_says_what_runs(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--size", "1G") as ours:
        info = ours.ask("info")
    assert info["version"] == __version__
    assert info["pid"] == ours.process.pid
    assert info["addresses"] == [f"nbd+unix:///?socket={tmp_path}/nbd"]
    assert info["settings"]["geometry"] == info["geometry"]


def test_the_control_socket_is_beside_the_first_socket_and_found_without_being_named(tmp_path: Path) -> None:
    runtime = tmp_path / "ocssd"
    runtime.mkdir()
    ask = f"{' '.join(CLIENT)} info; echo $ctl"
    done = run_daemon(
        "--nbd", f"unix:{runtime}/nbd", "--run", ask, cwd=tmp_path, env={"XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert f"{runtime}/nbd" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == f"{runtime}/nbd.ctl"


def test_text_is_one_name_and_value_a_line(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd") as ours:
        done = run_client("--control", str(ours.control), "stats")
    assert all(len(line.split()) >= 2 for line in done.stdout.splitlines())
    assert "ftl.waf" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--control", "/none/ctl", "stats"], 1, "ocssd: /none/ctl: No such file or directory"),
        (["stats"], 1, "ocssd: no daemon found; name its control socket with --control PATH or in $OCSSD_CONTROL"),
    ],
)
def test_a_client_that_finds_nobody_says_so(tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    done = run_client(*arguments, cwd=tmp_path, env={"XDG_RUNTIME_DIR": str(tmp_path)})
    if "no daemon found" in line and "several daemons" in done.stderr:
        pytest.skip("daemons of somebody else run here")
    assert (done.returncode, done.stderr.strip()) == (code, line)


@pytest.mark.parametrize("door", ["nbd", "vhost"])
def test_a_client_that_is_led_to_another_socket_says_so(tmp_path: Path, door: str) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--socket", f"{tmp_path}/vhost"):
        done = run_client("--control", f"{tmp_path}/{door}", "info")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "is no control socket" in done.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run_client("frobnicate").returncode == 2
