"""What fault rules do to a client of a real daemon over NBD; they are given, listed and removed by ``ocssd fault``."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit import nbd_client as nbd
from tests.kit.daemon import Daemon, daemon, run_client
from tests.kit.nbd_client import NbdClient

SECTOR = 4096
SHAPE = ("--set", "geometry.groups=1", "--set", "geometry.pus=2", "--set", "geometry.chunks=32", "--set",
         "geometry.sectors=32", "--set", "geometry.mw_cunits=0", "--set", "ftl.op=0.4")  # fmt: skip
EIO = 5


def fault(running: Daemon, *arguments: str) -> str:
    done = run_client("--control", str(running.control), "fault", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def served(directory: Path, *arguments: str) -> Iterator[tuple[Daemon, NbdClient]]:
    socket = directory / "nbd"
    with (
        daemon(directory, "--nbd", f"unix:{socket}", *SHAPE, *arguments) as running,
        NbdClient.unix(str(socket)) as client,
    ):
        client.negotiate()
        yield running, client


def sector(number: int) -> bytes:
    return number.to_bytes(8, "little") * (SECTOR // 8)


def write(client: NbdClient, *numbers: int) -> list[int]:
    return [client.write(SECTOR * number, sector(number)) for number in numbers]


def errors_of_reads(client: NbdClient, count: int) -> list[int]:
    return [client.call(nbd.READ, SECTOR * i, SECTOR).error for i in range(count)]


def test_a_failed_read_is_an_io_error_while_the_rule_is_there(tmp_path: Path) -> None:
    with served(tmp_path) as (running, client):
        write(client, *range(64))
        client.call(nbd.FLUSH)
        fault(running, "add", "on=read", "pu=1", "do=fail")
        errors = errors_of_reads(client, 64)
        assert set(errors) == {0, EIO}
        assert running.ask("stats")["ftl"]["read_failures"] == errors.count(EIO)
        assert fault(running, "list").split()[1] == str(errors.count(EIO))
        fault(running, "remove", "1")
        assert client.read(0, 64 * SECTOR) == b"".join(map(sector, range(64)))


@pytest.mark.parametrize("action", ["fail", "offline"])
def test_failed_programs_and_erases_are_not_seen_by_the_client(tmp_path: Path, action: str) -> None:
    with served(tmp_path) as (running, client):
        fault(running, "add", "on=write+reset", "chunk=1-3", f"do={action}")
        for _ in range(3):
            assert set(write(client, *range(1024))) == {0}
        assert client.read(0, 1024 * SECTOR) == b"".join(map(sector, range(1024)))
        assert running.ask("stats")["physics"]["fault_hits"] > 0


@pytest.mark.parametrize("action", ["slow", "hang"])
def test_a_slow_read_and_a_hanging_unit_take_their_time(tmp_path: Path, action: str) -> None:
    with served(tmp_path) as (running, client):
        write(client, *range(64))
        client.call(nbd.FLUSH)
        fault(running, "add", "on=read", f"do={action}:1s", "once")
        start = time.monotonic()
        assert client.read(0, SECTOR) == sector(0)
        assert time.monotonic() - start >= 1
        start = time.monotonic()
        assert client.read(0, SECTOR) == sector(0)
        assert time.monotonic() - start < 1


def test_corrupt_flips_bits_and_says_nothing(tmp_path: Path) -> None:
    with served(tmp_path) as (running, client):
        write(client, *range(64))
        client.call(nbd.FLUSH)
        fault(running, "add", "on=read", "do=corrupt:3", "once")
        found, meant = client.read(0, SECTOR), sector(0)
        assert sum((a ^ b).bit_count() for a, b in zip(found, meant, strict=True)) == 3
        assert client.read(0, SECTOR) == found  # stored that way


def test_a_torn_write_is_there_after_a_restart_without_its_second_half(tmp_path: Path) -> None:
    image = ("--store", str(tmp_path / "image"))
    with served(tmp_path, *image) as (running, client):
        fault(running, "add", "on=write", "do=torn", "once")
        assert set(write(client, *range(8))) == {0}
        client.call(nbd.FLUSH)
        running.stop(signal.SIGKILL)
    with served(tmp_path, *image) as (_, client):
        assert client.read(0, 7 * SECTOR) == b"".join(map(sector, range(7)))
        assert client.read(7 * SECTOR, SECTOR) == sector(7)[: SECTOR // 2] + bytes(SECTOR // 2)


def test_a_power_cut_ends_the_process_at_that_write_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    image = ("--store", str(tmp_path / "image"))
    acknowledged: list[int] = []

    def write_on() -> None:
        for number in range(1024):
            assert write(client, number) == [0]
            acknowledged.append(number)

    with served(tmp_path, *image) as (running, client):
        fault(running, "add", "on=write", "do=powercut", "after=20")
        with pytest.raises((nbd.Gone, ConnectionError)):
            write_on()
        assert running.process.wait(30) == -signal.SIGKILL
    assert 100 < len(acknowledged) < 1024
    with served(tmp_path, *image) as (running, client):
        assert running.ask("info")["disk"]["started"] == "recovered"
        for number in acknowledged:
            assert client.read(SECTOR * number, SECTOR) == sector(number)


@pytest.mark.parametrize(
    ("kind", "line", "complaint"),
    [
        ("rules", "on=write do=fai", "rules:2: do=fai: must be one of fail, offline"),
        ("chunkstate", "grp=0 pu=0 chk=99 state=OFFLINE", "chunkstate:2: chunk=99: there are 32"),
        ("writefail", "grp=0 pu=0 chk=0 sec=1 writefail_prob=101", "writefail:2: probability 101: must be from 0"),
        ("resetfail", "grp=0 pu=0 chk=0 resetfail_prob=x", "resetfail:2: probability=x: must be a whole number"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(tmp_path: Path, kind: str, line: str, complaint: str) -> None:
    good = {"rules": "on=read do=fail", "chunkstate": "grp=0 pu=0 chk=1 state=OFFLINE"}
    path = tmp_path / kind
    path.write_text(f"{good.get(kind, 'grp=0 pu=0 chk=1 prob=100')}\n{line}\n")
    with served(tmp_path) as (running, client):
        done = run_client("--control", str(running.control), "fault", "import", kind, str(path))
        assert done.returncode != 0
        assert complaint in done.stderr
        assert fault(running, "list") == ""
        assert write(client, 0) == [0]
