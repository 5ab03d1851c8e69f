"""Replies wait for the flash: with a latency model they come at their deadlines, out of order, and are never lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import nbd_client as nbd
from tests.kit.nbd_server import NbdServer, nbd_server

SENSE_NS = 2_000_000
MODES: list[dict[str, bool]] = [{}, {"structured": True}, {"extended": True}]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[NbdServer]:
    """A device whose reads of flash take 2 ms; what is not mapped is read at once."""
    with nbd_server(tmp_path, latency__sense_ns=SENSE_NS) as server:
        with server.connect() as client:
            for i in range(1024):  # beyond the write buffer
                client.write(4096 * i, bytes([i % 251]) * 4096)
            assert client.call(nbd.FLUSH).error == 0
        yield server


@pytest.mark.parametrize("mode", MODES, ids=["simple", "structured", "extended"])
@pytest.mark.parametrize("length", [4096, 1 << 20])
def test_a_read_is_answered_no_sooner_than_the_flash_would(slow: NbdServer, mode: dict[str, bool], length: int) -> None:
    with slow.connect(**mode) as client:
        start_ns = time.monotonic_ns()
        data = client.read(0, length)
        assert time.monotonic_ns() - start_ns >= SENSE_NS
        assert data == b"".join(bytes([i % 251]) * 4096 for i in range(length // 4096))


def test_a_reply_that_need_not_wait_overtakes_one_that_must(slow: NbdServer) -> None:
    with slow.connect(structured=True) as client:
        unmapped = client.size_bytes - 4096
        client.send(client.request(nbd.READ, 0, 4096, cookie=1) + client.request(nbd.READ, unmapped, 4096, cookie=2))
        assert [client.reply().cookie, client.reply().cookie] == [2, 1]


def test_reads_of_different_chunks_wait_together(slow: NbdServer) -> None:
    with slow.connect() as client:
        start_ns = time.monotonic_ns()
        client.send(b"".join(client.request(nbd.READ, 4096 * i, 4096) for i in range(256)))
        assert all(client.reply().error == 0 for _ in range(256))
        assert time.monotonic_ns() - start_ns < 256 * SENSE_NS / 2


def test_a_disconnect_waits_for_the_replies_that_are_held(slow: NbdServer) -> None:
    with slow.connect() as client:
        client.send(b"".join(client.request(nbd.READ, 0, 4096) for _ in range(4)) + client.request(nbd.DISC))
        assert all(client.reply().error == 0 for _ in range(4))
        assert client.is_closed()


def test_a_client_that_leaves_while_replies_are_held_costs_nobody_anything(slow: NbdServer) -> None:
    tasks = slow.task_count()
    with slow.connect() as other:
        with slow.connect() as client:
            client.send(client.request(nbd.READ, 0, 4096) * 64)
        assert len(other.read(0, 4096)) == 4096
    slow.wait(lambda: slow.tasks_now() == tasks, "both are gone")


def test_many_held_replies_stop_the_reading_of_requests_not_the_server(slow: NbdServer) -> None:
    with slow.connect() as client, slow.connect() as other:
        client.send(b"".join(client.request(nbd.READ, 0, 1 << 20) for _ in range(32)))  # twice the limit
        assert len(other.read(other.size_bytes - 4096, 4096)) == 4096
        assert all(len(client.reply().data) == 1 << 20 for _ in range(32))


def test_a_write_is_answered_when_its_program_ends_after_a_read_that_came_later_has_suspended_it(
    tmp_path: Path,
) -> None:
    """The reply of the write is held already when the read arrives, and moves back by what the read takes."""
    program_ms, sense_ms = 80, 40
    with nbd_server(
        tmp_path,
        latency__program_ns=program_ms * 10**6,
        latency__sense_ns=sense_ms * 10**6,
        latency__buffer_sectors=0,
        latency__suspend=True,
        geometry__groups=1,
        geometry__pus=1,
    ) as server, server.connect() as client:
        unit = 8 * 4096
        assert client.write(0, bytes(unit)) == 0
        start = time.monotonic()
        client.send(client.request(nbd.WRITE, unit, unit, cookie=1) + bytes(unit))
        client.send(client.request(nbd.READ, 0, 4096, cookie=2))
        ends = {client.reply().cookie: time.monotonic() - start for _ in range(2)}
        assert list(ends) == [2, 1]
        assert sense_ms <= ends[2] * 1000
        assert program_ms + sense_ms <= ends[1] * 1000
