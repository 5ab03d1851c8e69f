"""Listening sockets: addresses, leftovers, and sockets passed by a parent."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ocssd_daemon.transport import listen
from ocssd_daemon.transport.listen import AddressError, ListenError, TcpAddress, UnixAddress


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x.sock", UnixAddress("/run/x.sock")),
        ("unix:relative", UnixAddress("relative")),
        ("tcp:localhost:10809", TcpAddress("localhost", 10809)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp::10809", TcpAddress("", 10809)),
    ],
)
def test_addresses_are_understood(text: str, address: listen.Address) -> None:
    assert listen.parse_address(text) == address
    assert listen.parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "unix:", "tcp:", "tcp:host", "tcp:host:x", "tcp:h:65536", "http://x", "/run/x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        listen.parse_address(text)


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(AddressError, match="at most 107 bytes"):
        listen.unix_address("/" + "x" * 107)


async def test_the_socket_file_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen.open_listener(UnixAddress(str(path)))
    assert path.is_socket()
    listener.close()
    assert os.listdir(tmp_path) == []


async def test_somebody_elses_file_at_our_path_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen.open_listener(UnixAddress(str(path)))
    path.unlink()
    path.write_text("theirs")
    listener.close()
    assert path.read_text() == "theirs"


async def test_a_dead_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = listen.open_listener(UnixAddress(str(path)))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()
    assert os.listdir(tmp_path) == []


async def test_a_live_socket_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen.open_listener(UnixAddress(str(path)))
    with pytest.raises(ListenError, match="a running server listens there"):
        listen.open_listener(UnixAddress(str(path)))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    first.close()


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_symlink(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [make_file, make_symlink, make_directory])
async def test_what_is_no_socket_is_never_replaced(tmp_path: Path, make: object) -> None:
    path = tmp_path / "s"
    make(path)  # type: ignore[operator]
    before = os.lstat(path)
    with pytest.raises(ListenError, match="something that is no socket"):
        listen.open_listener(UnixAddress(str(path)))
    assert os.lstat(path).st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["s"]


async def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=r"^unix:.*/none/s: No such file or directory$"):
        listen.open_listener(UnixAddress(str(tmp_path / "none" / "s")))


async def test_port_zero_says_which_port_it_became() -> None:
    listener = listen.open_listener(TcpAddress("127.0.0.1", 0))
    assert isinstance(listener.address, TcpAddress)
    assert listener.address.port > 0
    listener.close()


async def test_a_taken_port_is_one_line() -> None:
    first = listen.open_listener(TcpAddress("127.0.0.1", 0))
    with pytest.raises(ListenError, match=r"^tcp:127\.0\.0\.1:\d+: Address already in use$"):
        listen.open_listener(first.address)
    first.close()


async def test_an_inherited_socket_may_listen_or_be_connected(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    connected = listen.from_fd(ours.detach())
    stream = await connected.sockets[0].accept()
    theirs.send(b"x")
    assert await stream.receive_some() == b"x"
    theirs.close()
    await stream.aclose()


@pytest.mark.parametrize("family", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
async def test_an_inherited_socket_of_another_type_is_refused(family: int) -> None:
    with (
        socket.socket(socket.AF_UNIX, family) as odd,
        pytest.raises(ListenError, match="must be a stream socket"),
    ):
        listen.from_fd(os.dup(odd.fileno()))


def activation(count: str, names: str, pid: str | None = None) -> dict[str, str]:
    return {"LISTEN_FDS": count, "LISTEN_FDNAMES": names, "LISTEN_PID": pid or str(os.getpid())}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (activation("0", ""), "LISTEN_FDS=0: must be from 1 to 64"),
        (activation("-1", ""), "LISTEN_FDS=-1: must be from 1 to 64"),
        (activation("1000", "x"), "LISTEN_FDS=1000: must be from 1 to 64"),
        (activation("2", "nbd"), "LISTEN_FDNAMES=nbd: must name 2 sockets"),
    ],
)
def test_activation_that_lies_is_refused(environment: dict[str, str], line: str) -> None:
    with pytest.raises(ListenError, match=line):
        listen.inherited(environment)
    assert environment == {}


def test_activation_meant_for_another_process_is_ignored() -> None:
    assert listen.inherited(activation("1", "nbd", pid="1")) == {}
