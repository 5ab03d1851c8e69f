"""The native codec of the hot path and the construct structs are the same bytes and the same fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocssd_daemon import _nbd
from ocssd_daemon.protocol.nbd import wire

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
REQUESTS = {
    "simple": wire.CompactRequest,
    "structured": wire.CompactRequest,
    "extended": wire.ExtendedRequest,
}


@pytest.mark.parametrize("mode", REQUESTS)
@given(flags=u16, type=u16, cookie=u64, offset_bytes=u64, length_bytes=u64)
def test_requests_decode_to_the_same_fields(mode: _nbd.Mode, **fields: int) -> None:
    if mode != "extended":
        fields["length_bytes"] >>= 32
    assert _nbd.decode_request(REQUESTS[mode].build(fields), mode) == fields


@pytest.mark.parametrize("mode", REQUESTS)
@given(data=st.binary(min_size=32, max_size=32))
def test_any_other_magic_is_told_apart(mode: _nbd.Mode, data: bytes) -> None:
    assert _nbd.decode_request(data[: REQUESTS[mode].sizeof()], mode) is None


@given(cookie=u64, error=u32)
def test_simple_replies_encode_to_the_same_bytes(cookie: int, error: int) -> None:
    assert _nbd.encode_simple(cookie, error) == wire.SimpleReply.build({"cookie": cookie, "error": error})


@given(cookie=u64, offset_bytes=u64, flags=u16, type=u16, length_bytes=u32)
def test_chunks_encode_to_the_same_bytes(**fields: int) -> None:
    for mode, shape in (("structured", wire.StructuredReply), ("extended", wire.ExtendedReply)):
        assert _nbd.encode_chunk(mode, **fields) == shape.build(fields)  # type: ignore[arg-type]


def test_contexts_have_distinct_ids_that_fit_the_table() -> None:
    assert len(set(_nbd.CONTEXTS.values())) == len(_nbd.CONTEXTS)
    assert all(0 < number < 4 for number in _nbd.CONTEXTS.values())
