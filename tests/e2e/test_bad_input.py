"""Bad input at start: one clear line on stderr, the right exit code, and nothing left behind.

Exit code 2 is for what the user should write differently, 1 for what the machine does not allow now.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.daemon import daemon, run_client, run_daemon


def complaint(*arguments: str | Path, code: int, **options: Any) -> str:
    """The one line that a daemon with *arguments* ends with."""
    done = run_daemon(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ocssd-daemon: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("ocssd-daemon: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "geometry.groups=0"], "geometry.groups=0 (--set): must be between 1 and 256"),
        (["--set", "geometry.ws_opt=7"], "geometry.ws_opt=7 (--set): must be a multiple of ws_min (4)"),
        (["--set", "geometry.sector_bytes=5000"], "geometry.sector_bytes=5000 (--set): must be a power of two"),
        (["--set", "geometry.chunks=2"], "geometry.chunks = 2: the FTL needs at least"),
        (["--set", "geometry.oob_bytes=8"], "geometry.oob_bytes = 8: the FTL needs at least 16"),
        (["--set", "ftl.op=0.02", "--set", "geometry.chunks=32"], "ftl.op = 0.02: leaves"),
        (["--set", "ftl.block_bytes=8192"], "ftl.block_bytes = 8192: must be a power of two from 512 to 4096"),
        (["--set", "ftl.opp=1"], "ftl.opp=1 (--set): no such setting; did you mean ftl.op?"),
        (["--set", "nonsense"], "--set=nonsense: must be key=value"),
        (["--size", "much"], "size=much (--size): must be a size such as 512M or 4G"),
        (["--preset", "huge"], "preset=huge: no such preset"),
        (["--config", "/none.toml"], "config=/none.toml: No such file or directory"),
        (["--durability", "best"], "durability=best (--durability): must be one of host, process"),
        (["--nbd", "ftp:x"], "nbd.listen: ftp:x: must be unix:PATH or tcp:HOST:PORT"),
        (["--socket", "/" + "x" * 200], "a Unix socket's path has at most 107 bytes"),
        (["--fd", "0", "--socket", "/tmp/x"], "--fd and --socket exclude each other"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in complaint("--nbd", f"unix:{tmp_path}/nbd", *arguments, code=2)
    assert os.listdir(tmp_path) == []


def test_nbd_in_clear_on_a_network_address_is_refused_unless_asked_for(tmp_path: Path) -> None:
    said = complaint("--nbd", "tcp:0.0.0.0:0", code=2)
    assert "--insecure" in said
    with daemon(tmp_path, "--nbd", "tcp:0.0.0.0:0", "--insecure"):
        pass


def busy(directory: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(directory / "nbd"))
    sock.listen()
    return sock


def file_in_the_way(directory: Path) -> None:
    (directory / "nbd").write_text("precious")


def symlink_in_the_way(directory: Path) -> None:
    (directory / "nbd").symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (busy, "a running server listens there"),
        (file_in_the_way, "there is something that is no socket"),
        (symlink_in_the_way, "there is something that is no socket"),
    ],
)
def test_a_socket_path_in_use_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], object], said: str
) -> None:
    held = prepare(tmp_path)
    before = os.lstat(tmp_path / "nbd")
    assert complaint("--nbd", f"unix:{tmp_path}/nbd", code=1) == f"unix:{tmp_path}/nbd: {said}"
    assert os.lstat(tmp_path / "nbd").st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["nbd"]
    del held


def test_a_second_daemon_on_the_same_socket_does_not_disturb_the_first(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd") as first:
        complaint("--nbd", f"unix:{tmp_path}/nbd", code=1)
        assert first.ask("info")["pid"] == first.process.pid


def test_a_dead_daemons_socket_is_taken_over(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd") as first:
        first.process.kill()
        first.process.wait()
        assert (tmp_path / "nbd").is_socket()
        with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd"):
            pass
    assert not (tmp_path / "nbd").exists()


def test_one_bad_door_closes_those_that_were_open(tmp_path: Path) -> None:
    said = complaint("--nbd", f"unix:{tmp_path}/a", "--nbd", f"unix:{tmp_path}/none/b", code=1)
    assert said == f"unix:{tmp_path}/none/b: No such file or directory"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bytes_before", [None, 0, 1 << 20], ids=["missing", "empty", "zeros"])
def test_a_door_that_cannot_open_leaves_no_image_behind(tmp_path: Path, bytes_before: int | None) -> None:
    image = tmp_path / "flash.img"
    if bytes_before is not None:
        image.touch()
        os.truncate(image, bytes_before)
    said = complaint("--nbd", f"unix:{tmp_path}/none/nbd", "--store", image, "--size", "256M", code=1)
    assert said == f"unix:{tmp_path}/none/nbd: No such file or directory"
    assert (image.stat().st_size if image.exists() else None) == bytes_before


def test_a_door_that_cannot_open_leaves_an_image_with_data_as_good_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "flash.img"
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--store", image, "--size", "256M"):
        pass
    complaint("--nbd", f"unix:{tmp_path}/none/nbd", "--store", image, code=1)
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--store", image) as again:
        assert again.ask("info")["disk"]["started"] == "checkpoint"


@pytest.mark.parametrize("arguments", [["--print-capabilities"], ["--help"]])
def test_a_daemon_whose_output_cannot_be_written_says_so_in_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run_daemon(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "ocssd-daemon: standard output: No space left on device\n")


@pytest.mark.parametrize("arguments", [["stats"], ["info", "-o", "json"], ["--help"]])
def test_a_client_whose_output_cannot_be_written_says_so_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", "--size", "256M") as running, open("/dev/full", "w") as full:
        done = run_client(
            "--control", str(running.control), *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, "ocssd: standard output: No space left on device\n")


def test_a_directory_without_permission_is_one_line(tmp_path: Path) -> None:
    # Root may write anywhere, unless it gives that up.
    modest = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    tmp_path.chmod(0o500)
    said = complaint("--nbd", f"unix:{tmp_path}/nbd", code=1, wrapper=modest)
    assert said == f"unix:{tmp_path}/nbd: Permission denied"


def test_a_store_that_another_process_has_open_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "flash.img"
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/a", "--store", image, "--size", "256M"):
        said = complaint("--nbd", f"unix:{tmp_path}/b", "--store", image, code=1)
        assert said.startswith(f"{image}: in use by another process")
    assert sorted(os.listdir(tmp_path)) == ["daemon.log", "flash.img"]


def test_a_store_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "letters"
    image.write_bytes(b"dear diary" * 1000)
    assert "not an image of this program" in complaint("--nbd", f"unix:{tmp_path}/a", "--store", image, code=1)
    assert image.read_bytes() == b"dear diary" * 1000


def test_a_store_of_another_shape_is_refused_when_a_shape_was_asked_for(tmp_path: Path) -> None:
    image = tmp_path / "flash.img"
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/a", "--store", image, "--size", "256M"):
        pass
    said = complaint("--nbd", f"unix:{tmp_path}/a", "--store", image, "--size", "512M", code=1)
    assert "the image was made with geometry." in said
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/a", "--store", image) as ours:
        assert ours.ask("info")["disk"]["started"] == "checkpoint"


def test_a_store_in_a_missing_directory_leaves_nothing(tmp_path: Path) -> None:
    said = complaint("--nbd", f"unix:{tmp_path}/a", "--store", tmp_path / "none" / "image", code=1)
    assert "No such file or directory" in said
    assert os.listdir(tmp_path) == []


def test_a_pid_file_of_a_live_daemon_is_refused(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/a", "--pidfile", pidfile) as ours:
        said = complaint("--nbd", f"unix:{tmp_path}/b", "--pidfile", pidfile, code=1)
        assert said == f"--pidfile {pidfile}: another process has locked it"
        assert pidfile.read_text() == f"{ours.process.pid}\n"


def test_an_fd_that_is_no_socket_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        fd = file.fileno()
        assert complaint("--fd", str(fd), code=1, pass_fds=[fd]) == f"fd {fd}: Socket operation on non-socket"


def test_an_unreachable_manager_does_not_keep_the_disk_from_being_served(tmp_path: Path) -> None:
    done = run_daemon("--nbd", "unix:-", "--run", "exit 0", env={"NOTIFY_SOCKET": str(tmp_path / "none")})
    assert done.returncode == 0
    assert "notify.failed" in done.stderr
