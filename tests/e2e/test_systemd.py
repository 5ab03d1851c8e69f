"""The service manager's side: units that systemd accepts, socket activation, readiness, watchdog.

The tests play systemd: they open the sockets, pass them from descriptor 3 on, and listen on the notification socket.
"""

from __future__ import annotations

import fcntl
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon, daemon, run_daemon
from tests.kit.requires import requires

UNITS = Path(__file__).resolve().parents[2] / "systemd"
EXPOSURE_MAX = "15"  # tenths; systemd-analyze calls up to 2.0 "OK"... "SAFE"

# Play systemd: put the given sockets at descriptor 3 and up, and say so with our own pid, which exec keeps.
LAUNCHER = """
import os, sys
fds, names, *command = sys.argv[1:]
for at, fd in enumerate(map(int, fds.split(",")), 3):
    os.dup2(fd, at)
os.environ |= {"LISTEN_FDS": str(len(fds.split(","))), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names}
os.execvp(command[0], command)
"""


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = requires("systemd-analyze", "systemd")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("unit", sorted(p.name for p in UNITS.glob("*.s*")))
def test_systemd_accepts_the_unit(tmp_path: Path, unit: str) -> None:
    for path in UNITS.iterdir():
        shutil.copy(path, tmp_path)
    done = systemd_analyze("verify", "--man=no", str(tmp_path / unit.replace("@.", "@disk.")))
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_the_service_is_well_confined() -> None:
    done = systemd_analyze(
        "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", str(UNITS / "ocssd-daemon@.service")
    )
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def launcher(sockets: Sequence[socket.socket], names: str) -> list[str]:
    return [sys.executable, "-c", LAUNCHER, ",".join(str(s.fileno()) for s in sockets), names]


def moved_up(sock: socket.socket) -> socket.socket:
    """The same socket at a descriptor that the launcher does not overwrite."""
    raised = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 100))
    sock.close()
    return raised


def activated(tmp_path: Path, sockets: Sequence[socket.socket], names: str) -> AbstractContextManager[Daemon]:
    fds = [s.fileno() for s in sockets]
    return daemon(tmp_path, wrapper=launcher(sockets, names), pass_fds=fds)


def test_a_passed_socket_is_served_and_stays_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    sock = moved_up(listening(path))
    with activated(tmp_path, [sock], "nbd") as ours:
        assert ours.ask("info")["addresses"] == [f"nbd+unix:///?socket={path}"]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            assert client.recv(8) == b"NBDMAGIC"
    # systemd keeps listening for the next start, so the file must stay.
    assert path.is_socket()


def test_sockets_are_told_apart_by_name_not_by_order(tmp_path: Path) -> None:
    control, nbd = moved_up(listening(tmp_path / "c")), moved_up(listening(tmp_path / "n"))
    with activated(tmp_path, [control, nbd], "control:nbd") as ours:
        ours.control = tmp_path / "c"
        assert ours.ask("info")["addresses"] == [f"nbd+unix:///?socket={tmp_path}/n"]


def complaint(sockets: Sequence[socket.socket], names: str, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a daemon that refuses what it was passed."""
    fds = [s.fileno() for s in sockets]
    done = run_daemon(*arguments, wrapper=launcher(sockets, names), pass_fds=fds)
    return done.returncode, done.stderr.strip()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    code, said = complaint([moved_up(listening(tmp_path / "x"))], "ftp")
    known = "vhost-user, nbd, vfio-user, control"
    assert (code, said) == (2, f"ocssd-daemon: FileDescriptorName=ftp: must be one of {known}")


def test_a_passed_socket_and_a_named_one_exclude_each_other(tmp_path: Path) -> None:
    code, said = complaint([moved_up(listening(tmp_path / "x"))], "nbd", "--nbd", f"unix:{tmp_path}/y")
    assert code == 2
    assert "sockets were passed by the service manager" in said


def test_more_names_than_sockets_are_refused(tmp_path: Path) -> None:
    code, said = complaint([moved_up(listening(tmp_path / "x"))], "nbd:control")
    assert (code, said) == (1, "ocssd-daemon: LISTEN_FDNAMES=nbd:control: must name 1 sockets")


def test_a_datagram_socket_is_refused(tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "x"))
    code, said = complaint([moved_up(sock)], "nbd")
    assert (code, said) == (1, "ocssd-daemon: fd 3: must be a stream socket")


def test_sockets_meant_for_another_process_are_not_ours() -> None:
    done = run_daemon(env={"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "nbd"})
    assert done.returncode == 2
    assert "no transport named" in done.stderr


def test_the_watchdog_is_fed(tmp_path: Path) -> None:
    with daemon(tmp_path, "--nbd", f"unix:{tmp_path}/nbd", env={"WATCHDOG_USEC": "200000"}, ready=False) as ours:
        states = [ours.state() for _ in range(4)]
    assert sum("WATCHDOG" in state for state in states) >= 2
