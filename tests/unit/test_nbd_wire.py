"""The NBD structs against bytes written by hand from the spec."""

from __future__ import annotations

import pytest
from construct import ConstructError

from ocssd_daemon.protocol.nbd import wire


def test_compact_request_has_the_bytes_of_the_spec() -> None:
    raw = bytes.fromhex(
        "25609513"  # NBD_REQUEST_MAGIC
        "0001"  # flags: FUA
        "0001"  # type: WRITE
        "1122334455667788"  # cookie
        "0000000000001000"  # offset
        "00000200"  # length
    )
    request = wire.CompactRequest.parse(raw)
    assert (request.flags, request.type, request.cookie) == (
        wire.CommandFlag.FUA, wire.Command.WRITE, 0x1122334455667788,
    )
    assert (request.offset_bytes, request.length_bytes) == (0x1000, 0x200)
    assert wire.CompactRequest.build(request) == raw


def test_extended_request_has_a_64_bit_length() -> None:
    raw = bytes.fromhex("21e41c71" "0020" "0007" "0000000000000001" "0000000000000000" "0000000100000000")
    request = wire.ExtendedRequest.parse(raw)
    assert request.length_bytes == 1 << 32
    assert request.flags == wire.CommandFlag.PAYLOAD_LEN
    assert len(raw) == wire.ExtendedRequest.sizeof() == 32


def test_reply_headers_have_the_sizes_of_the_spec() -> None:
    assert wire.SimpleReply.sizeof() == 16
    assert wire.StructuredReply.sizeof() == 20
    assert wire.ExtendedReply.sizeof() == 32
    assert wire.OptionReplyHeader.sizeof() == 20


def test_option_error_values_have_bit_31_set() -> None:
    errors = [reply for reply in wire.OptionReply if reply.name.startswith("ERR_")]
    assert len(errors) == 10
    assert all(reply & wire.REP_ERROR_BIT for reply in errors)


def test_info_request_with_a_count_that_lies_is_malformed() -> None:
    good = b"\0\0\0\1a" b"\0\1" b"\0\3"
    assert list(wire.InfoRequest.parse(good).infos) == [3]
    for bad in (good[:-1], good + b"\0", b"\0\0\0\x05a\0\0", b"\0\0\0\1a\0\2\0\3"):
        with pytest.raises(ConstructError):
            wire.InfoRequest.parse(bad)


def test_name_of_an_unknown_number_is_the_number() -> None:
    assert wire.name_of(wire.Option, 7) == "GO"
    assert wire.name_of(wire.Option, 99) == "Option(99)"
