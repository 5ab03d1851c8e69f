"""Any sequence of valid requests, cut into any pieces, has the effect that a plain byte array would show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit import nbd_client as nbd
from tests.kit.nbd_server import NbdServer, nbd_server

BLOCK = 512
SPAN_BLOCKS = 128  # small, so that requests overlap, and that all replies fit before the client reads them
MODES = ["simple", "structured", "extended"]
WRITERS = {nbd.WRITE, nbd.WRITE_ZEROES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NbdServer]:
    with nbd_server(tmp_path_factory.mktemp("model")) as running:
        yield running


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(command, offset, length, flags, fill)"""
    kind = draw(st.sampled_from([nbd.READ, nbd.WRITE, nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.FLUSH, nbd.CACHE]))
    first = draw(st.integers(0, SPAN_BLOCKS - 1))
    count = draw(st.integers(1, SPAN_BLOCKS - first))
    flags = draw(st.sampled_from([0, nbd.FUA])) if kind in WRITERS else 0
    if kind == nbd.WRITE_ZEROES:
        flags |= draw(st.sampled_from([0, nbd.NO_HOLE, nbd.FAST_ZERO]))
    if kind == nbd.FLUSH:
        first = count = 0
    return kind, first * BLOCK, count * BLOCK, flags, draw(st.integers(1, 255))


def apply(model: bytearray, request: tuple[int, int, int, int, int]) -> bytes:
    """What the request does to the model; what it answers."""
    kind, offset, length, _, fill = request
    if kind == nbd.WRITE:
        model[offset : offset + length] = bytes([fill]) * length
    elif kind == nbd.WRITE_ZEROES:
        model[offset : offset + length] = bytes(length)
    elif kind == nbd.TRIM:  # whole sectors read as zeroes, the parts at the edges keep their content
        first, last = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
        model[first:last] = bytes(max(0, last - first))
    return bytes(model[offset : offset + length]) if kind == nbd.READ else b""


def check_tiling(reply: nbd.Reply, request: tuple[int, int, int, int, int]) -> None:
    """Chunks of a read follow each other without a gap, and no two holes do."""
    at, before = request[1], ""
    for kind, offset, length in reply.pieces:
        assert offset == at
        assert not kind == before == "hole"
        at, before = at + length, kind
    assert not reply.pieces or at == request[1] + request[2]


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(requests(), min_size=1, max_size=20), pieces=st.lists(st.integers(1, 9000), min_size=1))
def test_any_valid_stream_does_what_a_byte_array_would(
    server: NbdServer, mode: str, sent: list[tuple[int, int, int, int, int]], pieces: list[int]
) -> None:
    agreed = {} if mode == "simple" else {mode: True}
    with server.connect(**agreed) as client:
        assert client.write(0, bytes(SPAN_BLOCKS * BLOCK)) == 0
        model = bytearray(SPAN_BLOCKS * BLOCK)
        stream = bytearray()
        for kind, offset, length, flags, fill in sent:
            payload = bytes([fill]) * length if kind == nbd.WRITE else b""
            flags |= nbd.PAYLOAD_LEN if payload and client.extended else 0
            stream += client.request(kind, offset, length, flags) + payload
        at = 0
        for turn in range(len(stream)):
            client.send(bytes(stream[at : at + pieces[turn % len(pieces)]]))
            at += pieces[turn % len(pieces)]
            if at >= len(stream):
                break
        for request in sent:
            reply = client.reply()
            assert (reply.error, reply.data) == (0, apply(model, request))
            check_tiling(reply, request)
        assert client.read(0, len(model)) == model


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=400), valid_magic=st.booleans())
def test_any_garbage_is_answered_or_ends_the_connection(
    server: NbdServer, mode: str, garbage: bytes, valid_magic: bool
) -> None:
    agreed = {} if mode == "simple" else {mode: True}
    with server.connect() as bystander:
        with server.connect(**agreed) as client:
            magic = nbd.EXTENDED if client.extended else nbd.COMPACT
            client.send((magic.to_bytes(4) if valid_magic else b"") + garbage)
        assert len(bystander.read(0, BLOCK)) == BLOCK
