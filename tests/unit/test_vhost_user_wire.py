"""vhost-user messages: the bytes of the spec, and round trips through the typed messages."""

from __future__ import annotations

import contextlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.wire import Request

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the literal bytes are little-endian")

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
regions = st.builds(m.Region, u64, u64, u64, u64)
configs = st.binary(max_size=256).flatmap(lambda data: st.builds(m.Config, u32, st.just(len(data)), u32, st.just(data)))
requests = st.one_of(
    st.tuples(st.just(Request.SET_FEATURES), st.builds(m.U64, u64)),
    st.tuples(st.just(Request.SET_VRING_NUM), st.builds(m.VringState, u32, u32)),
    st.tuples(st.just(Request.SET_VRING_ADDR), st.builds(m.VringAddr, u32, u32, u64, u64, u64, u64)),
    st.tuples(st.just(Request.SET_VRING_KICK), st.builds(m.VringFd, st.integers(0, 255), st.booleans())),
    st.tuples(
        st.just(Request.SET_MEM_TABLE),
        st.builds(m.MemTable, st.lists(regions, min_size=1, max_size=8).map(tuple)),
    ),
    st.tuples(st.just(Request.ADD_MEM_REG), st.builds(m.MemRegion, regions)),
    st.tuples(st.just(Request.SET_LOG_BASE), st.builds(m.Log, u64, u64)),
    st.tuples(st.just(Request.GET_CONFIG), configs),
    st.tuples(st.just(Request.SET_INFLIGHT_FD), st.builds(m.Inflight, u64, u64, u16, u16)),
    st.tuples(st.just(Request.SET_DEVICE_STATE_FD), st.builds(m.DeviceState, u32, u32)),
    st.tuples(st.just(Request.GET_STATUS), st.just(m.Empty())),
)


def decode(data: bytes) -> tuple[m.Header, m.Message]:
    header = m.decode_header(data[: wire.HEADER_BYTES])
    return header, m.decode_payload(header, data[wire.HEADER_BYTES :])


@pytest.mark.parametrize(
    ("layout", "size_bytes"),
    [
        ("Header", 12),
        ("U64", 8),
        ("VringState", 8),
        ("VringAddr", 40),
        ("Region", 32),
        ("MemRegion", 40),
        ("Log", 16),
        ("Inflight", 24),  # not 20: C pads the struct, and every peer sends the padding
        ("DeviceState", 8),
        ("Iotlb", 32),
        ("ConfigHead", 12),
        ("VirtioBlkConfig", 60),
    ],
)
def test_each_layout_has_the_size_of_its_c_struct(layout, size_bytes):
    assert getattr(wire, layout).sizeof() == size_bytes


def test_set_vring_addr_has_the_bytes_that_qemu_sends():
    data = bytes.fromhex(
        "09000000 09000000 28000000"  # SET_VRING_ADDR, version 1 | need_reply, 40 bytes
        "01000000 01000000"  # ring 1, flags LOG
        "0010000000000000 0030000000000000 0020000000000000"  # desc, used, avail
        "0030000001000000"  # log address
    )
    header, message = decode(data)
    assert header.need_reply
    assert message == m.VringAddr(1, 1, desc=0x1000, used=0x3000, avail=0x2000, log=0x1_0000_3000)
    assert m.encode_request(Request.SET_VRING_ADDR, message, need_reply=True) == data


def test_a_memory_table_has_the_bytes_that_qemu_sends():
    data = bytes.fromhex(
        "05000000 01000000 28000000"  # SET_MEM_TABLE, version 1, 8 + 32 bytes
        "01000000 00000000"  # nregions, padding
        "0000000000000000 0000004000000000 00000080ff7f0000 0000000000000000"  # gpa, size, user, offset
    )
    _, message = decode(data)
    assert message == m.MemTable((m.Region(0, 0x4000_0000, 0x7FFF_8000_0000, 0),))
    assert m.encode_request(Request.SET_MEM_TABLE, message) == data


def test_an_inflight_reply_is_24_bytes_and_flagged_as_reply():
    data = m.encode_reply(Request.GET_INFLIGHT_FD, m.Inflight(0x2000, 0, num_queues=2, queue_size=128))
    assert data == bytes.fromhex(
        "1f000000 05000000 18000000"  # GET_INFLIGHT_FD, version 1 | reply, 24 bytes
        "0020000000000000 0000000000000000 0200 8000 00000000"  # size, offset, queues, queue size, padding
    )


def test_bit_8_of_a_kick_message_says_that_no_descriptor_comes():
    assert m.encode_payload(m.VringFd(3, has_fd=False)) == bytes.fromhex("0301000000000000")


@given(requests, st.booleans())
def test_every_message_survives_the_way_to_bytes_and_back(request_and_message, need_reply):
    request, message = request_and_message
    header, decoded = decode(m.encode_request(request, message, need_reply=need_reply))
    assert (header.request, header.need_reply, decoded) == (request, need_reply, message)


@given(st.binary(min_size=12, max_size=12), st.binary(min_size=300, max_size=300))
def test_arbitrary_bytes_are_a_message_or_rejected_and_nothing_else(head, body):
    with contextlib.suppress(m.Violation, m.Refusal):
        header = m.decode_header(head)
        m.decode_payload(header, body[: header.size_bytes])


@given(st.sampled_from(sorted(m.PAYLOADS)), st.data())
def test_a_known_request_with_an_arbitrary_payload_is_a_message_or_refused(request, data):
    payload = m.PAYLOADS[request]
    size_bytes = data.draw(st.integers(payload.min_bytes, payload.max_bytes))
    body = data.draw(st.binary(min_size=size_bytes, max_size=size_bytes))
    with contextlib.suppress(m.Refusal):
        m.decode_payload(m.Header(request, 1, size_bytes), body)


@pytest.mark.parametrize("nregions", [0, 2, 9, 0xFFFF_FFFF])
def test_a_region_count_that_does_not_match_the_payload_is_refused(nregions):
    payload = nregions.to_bytes(4, "little") + bytes(4 + 32)
    with pytest.raises(m.Refusal, match=f"nregions is {nregions}"):
        m.decode_payload(m.Header(Request.SET_MEM_TABLE, 1, len(payload)), payload)


@pytest.mark.parametrize(
    ("flags", "size_bytes", "sentence"),
    [
        (0, 8, "version 0"),
        (2, 8, "version 2"),
        (3, 8, "version 3"),
        (1 | 4, 8, "reply bit"),
        (1, 4, "payload of 4 bytes"),
        (1, 12, "payload of 12 bytes"),
        (1, 4096, "payload of 4096 bytes"),
        (1, 0xFFFF_FFFF, "payload of 4294967295 bytes"),
    ],
)
def test_a_header_that_breaks_framing_names_the_request_and_the_fault(flags, size_bytes, sentence):
    data = wire.Header.build({"request": Request.SET_FEATURES, "flags": flags, "size_bytes": size_bytes})
    with pytest.raises(m.Violation, match=rf"SET_FEATURES: .*{sentence}"):
        m.decode_header(data)


def test_an_unknown_request_may_be_as_long_as_the_longest_known_one():
    known = m.decode_header(wire.Header.build({"request": 200, "flags": 1, "size_bytes": 268}))
    assert known.size_bytes == m.UNKNOWN_PAYLOAD_MAX_BYTES == 268
    with pytest.raises(m.Violation, match="request 0xc8"):
        m.decode_header(wire.Header.build({"request": 200, "flags": 1, "size_bytes": 269}))


def test_bits_are_named_for_the_log_and_unknown_ones_numbered():
    assert wire.bit_names(1 | 1 << 40, wire.ProtocolFeature) == "MQ, bit 40"
    assert wire.bit_names(0, wire.ProtocolFeature) == "none"
