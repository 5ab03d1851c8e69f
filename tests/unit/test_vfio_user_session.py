"""The vfio-user session against literal messages: framing, negotiation, refusals, DMA replies."""

import errno
import struct

import pytest

from ocssd_daemon.protocol.vfio_user.session import DmaReply, ProtocolError, Rejected, Request, Session
from ocssd_daemon.protocol.vfio_user.wire import Command

# id 1, command 1 VERSION, size 0x2c, flags 0, errno 0; major 0, minor 0; JSON with its NUL
VERSION = bytes.fromhex("0100 0100 28000000 00000000 00000000" "0000 0000") + b'{"capabilities":{}}\0'


def feed(session, raw, fds=()):
    """Hand *raw* over in the pieces that the session asks for; returns the events."""
    events, held = [], list(fds)
    while raw:
        piece, raw = raw[:session.wanted()], raw[session.wanted():]
        event = session.receive(piece, held)
        held = []
        if event is not None:
            events.append(event)
    return events


def message(command, payload=b"", *, message_id=7, flags=0, size=None):
    return struct.pack("<HHIII", message_id, command, size if size is not None else 16 + len(payload),
                       flags, 0) + payload


def ready():
    session = Session()
    (request,) = feed(session, VERSION)
    session.accept_version(request)
    return session


def test_version_is_answered_with_version_zero_and_capabilities():
    session = Session()
    (request,) = feed(session, VERSION)
    reply = session.accept_version(request)
    assert reply[:4] == bytes.fromhex("0100 0100")              # same id, same command
    assert reply[8:12] == bytes.fromhex("01000000")             # flags: reply
    assert reply[16:20] == bytes(4)                             # version 0.0
    assert b'"max_msg_fds": 16' in reply
    assert reply.endswith(b"\0")


@pytest.mark.parametrize("payload", [
    struct.pack("<HH", 1, 0),                                   # major 1
    struct.pack("<HH", 0, 0) + b"{}",                           # no NUL
    struct.pack("<HH", 0, 0) + b"{\0",                          # not JSON
    struct.pack("<HH", 0, 0) + b"[" * 5000 + b"\0",             # nesting
    struct.pack("<HH", 0, 0) + b'{"capabilities":{"a":1,"a":2}}\0',
    struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_msg_fds":-1}}\0',
    struct.pack("<HH", 0, 0) + b'{"capabilities":{"max_data_xfer_size":1.5}}\0',
])
def test_a_version_that_does_not_fit_ends_the_connection_with_einval(payload):
    session = Session()
    (request,) = feed(session, message(1, payload))
    with pytest.raises(ProtocolError) as caught:
        session.accept_version(request)
    assert struct.unpack("<I", caught.value.reply[12:16])[0] == errno.EINVAL


def test_a_version_of_a_mebibyte_ends_the_connection_at_its_header():
    session = Session()
    raw = message(1, struct.pack("<HH", 0, 0) + b'{"capabilities":{"x":"' + b"x" * (1 << 20) + b'"}}\0')
    with pytest.raises(ProtocolError):
        session.receive(raw[:16])


def test_anything_before_version_ends_the_connection():
    with pytest.raises(ProtocolError):
        feed(Session(), message(Command.DEVICE_RESET))


@pytest.mark.parametrize("size", [0, 15, 0xFFFF_FFFF])
def test_a_size_that_makes_no_frame_ends_the_connection(size):
    with pytest.raises(ProtocolError):
        feed(ready(), message(Command.DEVICE_RESET, size=size))


@pytest.mark.parametrize(("command", "payload", "flags", "code"), [
    (6, b"", 0, errno.ENOTSUP),                                 # GET_REGION_IO_FDS
    (14, b"", 0, errno.ENOTSUP),
    *((command, bytes(16), 0, errno.ENOTSUP) for command in (16, 17, 18, 99, 0xFFFF)),     # feature, migration, unknown
    (Command.DMA_MAP, bytes(31), 0, errno.EINVAL),              # one byte short
    (Command.DEVICE_RESET, b"x", 0, errno.EINVAL),
    *((Command.DEVICE_RESET, b"", kind, errno.EINVAL) for kind in range(2, 16)),           # message types
])
def test_a_message_with_a_known_frame_and_wrong_content_is_answered_and_the_stream_goes_on(
        command, payload, flags, code):
    session = ready()
    (event,) = feed(session, message(command, payload, flags=flags))
    assert isinstance(event, Rejected)
    assert struct.unpack("<I", event.reply[12:16])[0] == code
    (event,) = feed(session, message(Command.DEVICE_RESET))
    assert isinstance(event, Request)


def test_a_request_for_data_without_a_reply_is_dropped_silently():
    (event,) = feed(ready(), message(Command.DEVICE_GET_INFO, bytes(16), flags=0x10))
    assert isinstance(event, Rejected)
    assert event.reply == b""


def test_descriptors_on_a_message_that_takes_none_are_refused_and_handed_back():
    (event,) = feed(ready(), message(Command.DEVICE_RESET), fds=[40, 41])
    assert isinstance(event, Rejected)
    assert event.fds == [40, 41]


def test_a_dma_read_is_matched_by_its_identifier():
    session = ready()
    number, raw = session.dma_read(0x1000, 8)
    assert raw[16:32] == struct.pack("<QQ", 0x1000, 8)
    (event,) = feed(session, message(11, struct.pack("<QQ", 0x1000, 8) + b"abcdefgh", message_id=number,
                                     flags=1))
    assert event == DmaReply(number, 0, b"abcdefgh")


@pytest.mark.parametrize("payload", [
    struct.pack("<QQ", 0x1000, 8) + b"abc",                     # short data
    struct.pack("<QQ", 0x1000, 9) + b"abcdefgh",                # more than asked
    struct.pack("<QQ", 0x2000, 8) + b"abcdefgh",                # another address
])
def test_a_dma_reply_that_does_not_fit_is_an_error_of_that_transfer(payload):
    session = ready()
    number, _ = session.dma_read(0x1000, 8)
    (event,) = feed(session, message(11, payload, message_id=number, flags=1))
    assert event.error == errno.EPROTO


def test_a_reply_to_nothing_ends_the_connection():
    with pytest.raises(ProtocolError):
        feed(ready(), message(11, bytes(16), message_id=9, flags=1))
