"""Runs the table of hostile clients, and holds for each: others are served on, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.certs import Authority
from tests.kit.nbd_server import NbdServer, nbd_server, open_descriptors
from tests.nbd import hostile_negotiation, hostile_transmission  # noqa: F401  (they fill the table)
from tests.nbd.hostile import CASES, Case

MARK = b"sentinel" * 512


@contextmanager
def server_for(case: Case, directory: Path) -> Iterator[NbdServer]:
    settings = dict(case.settings)
    if "nbd__tls__mode" not in settings:
        with nbd_server(directory, **settings) as server:
            yield server
        return
    ours, stranger = Authority(directory, "ours"), Authority(directory, "stranger")
    pair = ours.sign("localhost")
    if settings.pop("verify_clients", False):
        settings["nbd__tls__client_ca"] = ours.certificate
    settings |= {"nbd__tls__certificate": pair.certificate, "nbd__tls__key": pair.key}
    with nbd_server(directory, **settings) as server:
        server.authority, server.stranger = ours, stranger
        yield server


@contextmanager
def bystander(server: NbdServer, writes: bool) -> Iterator[None]:
    """A well-behaved client beside the hostile one: what it wrote before is there afterwards."""
    with server.connect() as client:
        last = client.size_bytes - len(MARK)
        if writes:
            assert client.write(last, MARK) == 0
        yield
        assert client.read(last, len(MARK)) == (MARK if writes else bytes(len(MARK)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_hostile_client(case: Case, tmp_path: Path) -> None:
    with server_for(case, tmp_path) as server:
        tasks, descriptors = server.task_count(), open_descriptors()
        if not case.leaves_server or case.settings.get("nbd__tls__mode") == "require":
            case.run(server)
        else:
            with bystander(server, writes=not (case.erases or case.settings.get("read_only"))):
                case.run(server)
        if case.leaves_server:
            server.wait(
                lambda: server.tasks_now() <= tasks and open_descriptors() <= descriptors,
                f"{case.id} leaves no task and no descriptor",
            )


def test_every_row_of_the_matrix_has_a_case() -> None:
    assert {case.row for case in CASES} == {f"NB-{row:02}" for row in range(1, 43)}
