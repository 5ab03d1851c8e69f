"""Reads with structured replies say where the disk has holes instead of sending zeroes; with DF they must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import nbd_client as nbd
from tests.kit.nbd_client import NbdClient
from tests.kit.nbd_server import NbdServer, nbd_server

SECTOR = 4096
MIB = 1 << 20
CHUNKED: list[dict[str, bool]] = [{"structured": True}, {"extended": True}]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdServer]:
    with nbd_server(tmp_path_factory.mktemp("holes")) as running:
        yield running


@pytest.fixture(params=CHUNKED, ids=["structured", "extended"])
def client(request: pytest.FixtureRequest, server: NbdServer) -> Iterator[NbdClient]:
    with server.connect(**request.param) as connected:
        yield connected


def test_a_hole_between_data_is_a_chunk_of_its_own(client: NbdClient) -> None:
    data = bytes(range(1, 17)) * 256
    assert client.write(SECTOR, data) == client.write(4 * SECTOR, data) == 0
    reply = client.call(nbd.READ, 0, 6 * SECTOR)
    assert reply.pieces == [
        ("hole", 0, SECTOR),
        ("data", SECTOR, SECTOR),
        ("hole", 2 * SECTOR, 2 * SECTOR),
        ("data", 4 * SECTOR, SECTOR),
        ("hole", 5 * SECTOR, SECTOR),
    ]
    assert reply.data == bytes(SECTOR) + data + bytes(2 * SECTOR) + data + bytes(SECTOR)


def test_what_is_mapped_throughout_is_one_chunk(client: NbdClient) -> None:
    assert client.write(0, b"x" * MIB) == 0
    assert client.call(nbd.READ, 0, MIB).pieces == [("data", 0, MIB)]
    assert client.call(nbd.READ, 512, 1024).pieces == [("data", 512, 1024)]


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (512, 3584), (3 * SECTOR, MIB)])
def test_what_is_not_mapped_at_all_is_one_hole(client: NbdClient, offset: int, length: int) -> None:
    reply = client.call(nbd.READ, offset, length)
    assert (reply.error, reply.pieces, reply.data) == (0, [("hole", offset, length)], bytes(length))


def test_parts_of_sectors_at_both_ends(client: NbdClient) -> None:
    assert client.write(SECTOR, b"y" * SECTOR) == 0
    reply = client.call(nbd.READ, SECTOR - 512, SECTOR + 1024)
    assert reply.pieces == [("hole", SECTOR - 512, 512), ("data", SECTOR, SECTOR), ("hole", 2 * SECTOR, 512)]


def test_a_trim_makes_a_hole(client: NbdClient) -> None:
    assert client.write(0, b"z" * (3 * SECTOR)) == 0
    assert client.call(nbd.TRIM, SECTOR, SECTOR).error == 0
    kinds = [piece[0] for piece in client.call(nbd.READ, 0, 3 * SECTOR).pieces]
    assert kinds == ["data", "hole", "data"]


def test_zeroes_that_must_not_be_a_hole_are_data(client: NbdClient) -> None:
    assert client.call(nbd.WRITE_ZEROES, 0, SECTOR, nbd.NO_HOLE).error == 0
    assert client.call(nbd.READ, 0, SECTOR).pieces == [("data", 0, SECTOR)]


def test_dont_fragment_is_one_chunk_of_data(client: NbdClient) -> None:
    assert client.write(SECTOR, b"a" * SECTOR) == 0
    reply = client.call(nbd.READ, 0, 3 * SECTOR, nbd.DF)
    assert reply.pieces == [("data", 0, 3 * SECTOR)]
    assert reply.data == bytes(SECTOR) + b"a" * SECTOR + bytes(SECTOR)


@pytest.mark.parametrize("length", [MIB, 8 * MIB])
def test_every_other_sector_a_hole(client: NbdClient, length: int) -> None:
    """The longest reply: twice as many chunks as mapped sectors, more than one turn's work."""
    for offset in range(0, length, 2 * SECTOR):
        assert client.write(offset, b"b" * SECTOR) == 0
    reply = client.call(nbd.READ, 0, length)
    expected = [("hole" if at % (2 * SECTOR) else "data", at, SECTOR) for at in range(0, length, SECTOR)]
    assert reply.pieces == expected
    assert reply.data == (b"b" * SECTOR + bytes(SECTOR)) * (length // SECTOR // 2)


def test_simple_replies_send_zeroes(server: NbdServer) -> None:
    with server.connect() as client:
        reply = client.call(nbd.READ, 0, 3 * SECTOR)
        assert (reply.pieces, reply.data) == ([], bytes(3 * SECTOR))


def test_a_sector_that_cannot_be_read_is_an_error_for_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The reply is not sent before all of it was read, so no data comes before the error."""
    directory = tmp_path_factory.mktemp("failing")
    with (
        nbd_server(directory, faults__rules=("on=read do=fail",)) as server,
        server.connect(structured=True) as client,
    ):
        sectors = 128  # enough to leave the write buffer
        assert client.write(2 * SECTOR, b"c" * (sectors * SECTOR)) == 0
        reply = client.call(nbd.READ, 0, (sectors + 4) * SECTOR)
        assert (reply.error, reply.pieces) == (nbd.EIO, [])
        assert client.call(nbd.READ, 0, SECTOR).pieces == [("hole", 0, SECTOR)]
