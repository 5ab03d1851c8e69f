"""The negotiation machine: bytes in, events and bytes out, whole or one byte at a time."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocssd_daemon.protocol.nbd import wire
from ocssd_daemon.protocol.nbd.handshake import (
    MAX_OPTION_BYTES,
    MAX_OPTIONS,
    MAX_SKIPPED_BYTES,
    Closed,
    Event,
    Export,
    ServerHandshake,
    StartTls,
    State,
    TlsMode,
    Transmission,
)
from ocssd_daemon.protocol.nbd.wire import Option, OptionReply, TransmissionFlag
from tests.kit.nbd_client import info_data, meta_data, option

FLAGS = struct.pack(">I", 3)
DISK = Export(
    "disk",
    1 << 30,
    TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD,
    "a disk",
    minimum_bytes=512,
    contexts={"base:allocation": 1, "x-ocssd:chunk-state": 2},
)
OTHER = Export("other", 1 << 20, TransmissionFlag(0), contexts={"base:allocation": 1})


class Talk:
    """A machine and what it has said."""

    def __init__(self, tls: TlsMode = TlsMode.OFF, flags: bytes = FLAGS) -> None:
        self.machine = ServerHandshake([DISK, OTHER], tls)
        assert self.machine.data_to_send() == b"NBDMAGICIHAVEOPT\0\3"
        self.events: list[Event] = self.machine.receive(flags)

    def say(self, data: bytes) -> list[tuple[int, bytes]]:
        """Send *data*; returns the option replies as (type, data)."""
        self.events += self.machine.receive(data)
        return replies(self.machine.data_to_send())

    def types(self, data: bytes) -> list[int]:
        return [kind for kind, _ in self.say(data)]


def replies(data: bytes) -> list[tuple[int, bytes]]:
    out = []
    while data:
        header = wire.OptionReplyHeader.parse(data)
        out.append((header.type, data[20 : 20 + header.length_bytes]))
        data = data[20 + header.length_bytes :]
    return out


def only_closed(talk: Talk) -> bool:
    return len(talk.events) == 1 and isinstance(talk.events[0], Closed) and talk.machine.state is State.CLOSED


def test_go_enters_transmission_with_what_was_negotiated() -> None:
    talk = Talk()
    talk.say(option(Option.STRUCTURED_REPLY))
    talk.say(option(Option.SET_META_CONTEXT, meta_data(b"", (b"x-ocssd:chunk-state", b"base:allocation"))))
    told = talk.say(option(Option.GO, info_data(b"disk", (1, 2, 3))) + b"first request")
    assert [kind for kind, _ in told] == [OptionReply.INFO] * 4 + [OptionReply.ACK]
    assert talk.events == [
        Transmission(
            export=DISK,
            flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF,
            structured=True,
            extended=False,
            context_ids=(1, 2),
            leftover=b"first request",
        )
    ]


def test_go_tells_size_flags_and_block_sizes_even_unasked() -> None:
    told = Talk().say(option(Option.GO, info_data(b"")))
    assert told == [
        (OptionReply.INFO, bytes.fromhex("0000" "0000000040000000" "0005")),  # EXPORT: 1 GiB, HAS_FLAGS | FLUSH
        (OptionReply.INFO, bytes.fromhex("0003" "00000200" "00001000" "02000000")),  # BLOCK_SIZE: 512, 4096, 32 MiB
        (OptionReply.ACK, b""),
    ]


def test_export_name_pads_with_124_zeroes_unless_the_client_declined() -> None:
    for flags, padding in ((b"\0\0\0\1", 124), (b"\0\0\0\3", 0)):
        talk = Talk(flags=flags)
        talk.events += talk.machine.receive(option(Option.EXPORT_NAME, b"disk"))
        answer = talk.machine.data_to_send()
        assert answer == bytes.fromhex("0000000040000000" "0005") + bytes(padding)
        assert isinstance(talk.events[0], Transmission)


@pytest.mark.parametrize("name", [b"nope", b"d" * 4096, b"d" * 4097, b"disk\0", b"\xff\xfe", b"../disk", b"%00"])
def test_export_name_of_no_export_closes(name: bytes) -> None:
    talk = Talk()
    assert talk.types(option(Option.EXPORT_NAME, name)) == []
    assert only_closed(talk)


def test_list_names_every_export() -> None:
    told = Talk().say(option(Option.LIST))
    assert told == [
        (OptionReply.SERVER, b"\0\0\0\4disk"),
        (OptionReply.SERVER, b"\0\0\0\5other"),
        (OptionReply.ACK, b""),
    ]


def test_abort_is_acknowledged_and_ends_the_session() -> None:
    talk = Talk()
    assert talk.types(option(Option.ABORT)) == [OptionReply.ACK]
    assert only_closed(talk)


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (Option.LIST, b"x", OptionReply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, b"x", OptionReply.ERR_INVALID),
        (Option.EXTENDED_HEADERS, b"x", OptionReply.ERR_INVALID),
        (Option.STARTTLS, b"", OptionReply.ERR_UNSUP),
        (Option.PEEK_EXPORT, b"", OptionReply.ERR_UNSUP),
        (77, b"anything", OptionReply.ERR_UNSUP),
        (Option.GO, b"", OptionReply.ERR_INVALID),
        (Option.GO, info_data(b"nope"), OptionReply.ERR_UNKNOWN),
        (Option.GO, info_data(b"n" * 4097), OptionReply.ERR_INVALID),
        (Option.INFO, info_data(b"", (3, 3)), OptionReply.ERR_INVALID),
        (Option.INFO, info_data(b"\xff"), OptionReply.ERR_INVALID),
        (Option.INFO, info_data(b"") + b"\0", OptionReply.ERR_INVALID),
        (Option.SET_META_CONTEXT, meta_data(b""), OptionReply.ERR_INVALID),  # before structured replies
        (Option.LIST_META_CONTEXT, meta_data(b""), OptionReply.ERR_INVALID),
    ],
)
def test_a_bad_option_gets_its_error_and_the_session_goes_on(number: int, data: bytes, reply: OptionReply) -> None:
    talk = Talk()
    assert talk.types(option(number, data)) == [reply]
    assert talk.types(option(Option.GO, info_data(b"")))[-1] == OptionReply.ACK


def test_an_option_that_is_too_long_to_keep_is_skipped_and_refused() -> None:
    talk = Talk()
    long = bytes(MAX_OPTION_BYTES + 1)
    assert talk.types(option(Option.GO, long)) == [OptionReply.ERR_TOO_BIG]
    assert talk.types(option(77, long)) == [OptionReply.ERR_UNSUP]
    assert talk.types(option(Option.LIST))[-1] == OptionReply.ACK


@pytest.mark.parametrize("length", [MAX_SKIPPED_BYTES + 1, 1 << 31, 0xFFFFFFFF])
def test_an_absurd_option_length_closes_before_any_of_it_is_read(length: int) -> None:
    talk = Talk()
    talk.say(option(Option.LIST, length=length))
    assert only_closed(talk)


@pytest.mark.parametrize("flags", [0x4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_close(flags: int) -> None:
    assert only_closed(Talk(flags=struct.pack(">I", flags)))


def test_a_client_without_fixed_newstyle_may_only_send_export_name() -> None:
    talk = Talk(flags=bytes(4))
    talk.say(option(Option.LIST))
    assert only_closed(talk)


def test_bad_option_magic_closes() -> None:
    talk = Talk()
    talk.say(option(Option.LIST, magic=b"IHAVEOPS"))
    assert only_closed(talk)


def test_a_loop_of_options_ends() -> None:
    talk = Talk()
    talk.say(option(Option.LIST) * (MAX_OPTIONS + 1))
    assert only_closed(talk)


def test_structured_twice_is_fine_but_not_after_extended_headers() -> None:
    talk = Talk()
    assert talk.types(option(Option.STRUCTURED_REPLY) * 2) == [OptionReply.ACK] * 2
    assert talk.types(option(Option.EXTENDED_HEADERS) * 2) == [OptionReply.ACK] * 2
    assert talk.types(option(Option.STRUCTURED_REPLY)) == [OptionReply.ERR_EXT_HEADER_REQD]


def test_export_name_after_extended_headers_closes() -> None:
    talk = Talk()
    talk.say(option(Option.EXTENDED_HEADERS))
    talk.say(option(Option.EXPORT_NAME, b"disk"))
    assert only_closed(talk)


def test_list_meta_context_knows_wildcards_and_set_does_not() -> None:
    talk = Talk()
    talk.say(option(Option.STRUCTURED_REPLY))
    cases = {
        (): [b"base:allocation", b"x-ocssd:chunk-state"],
        (b"base:",): [b"base:allocation"],
        (b"x-ocssd:", b"x-ocssd:chunk-state"): [b"x-ocssd:chunk-state"],
        (b"qemu:dirty-bitmap:b", b"nocolon", b""): [],
    }
    for queries, names in cases.items():
        told = talk.say(option(Option.LIST_META_CONTEXT, meta_data(b"", queries)))
        assert [data[4:] for kind, data in told if kind == OptionReply.META_CONTEXT] == names
    told = talk.say(option(Option.SET_META_CONTEXT, meta_data(b"", (b"base:",))))
    assert [kind for kind, _ in told] == [OptionReply.ACK]


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (meta_data(b"nope", (b"base:allocation",)), OptionReply.ERR_UNKNOWN),
        (meta_data(b"", (b"q" * 4097,)), OptionReply.ERR_INVALID),
        (meta_data(b"", (b"base:allocation",))[:-1], OptionReply.ERR_INVALID),
        (b"\0\0\0\0" + b"\0\x0f\x42\x40", OptionReply.ERR_INVALID),  # 1e6 queries announced, none sent
    ],
)
def test_a_failed_set_meta_context_forgets_the_one_before(data: bytes, reply: OptionReply) -> None:
    talk = Talk()
    talk.say(option(Option.STRUCTURED_REPLY))
    talk.say(option(Option.SET_META_CONTEXT, meta_data(b"", (b"base:allocation",))))
    assert talk.types(option(Option.SET_META_CONTEXT, data)) == [reply]
    talk.say(option(Option.GO, info_data(b"")))
    assert talk.events[0].context_ids == ()  # type: ignore[union-attr]


def test_contexts_of_another_export_do_not_count() -> None:
    talk = Talk()
    talk.say(option(Option.STRUCTURED_REPLY))
    talk.say(option(Option.SET_META_CONTEXT, meta_data(b"disk", (b"base:allocation",))))
    talk.say(option(Option.GO, info_data(b"other")))
    assert talk.events[0].context_ids == ()  # type: ignore[union-attr]


def test_the_default_name_and_the_device_name_are_one_export() -> None:
    talk = Talk()
    talk.say(option(Option.EXTENDED_HEADERS))
    talk.say(option(Option.SET_META_CONTEXT, meta_data(b"", (b"base:allocation",))))
    talk.say(option(Option.GO, info_data(b"disk")))
    event = talk.events[0]
    assert isinstance(event, Transmission)
    assert event.context_ids == (1,)
    assert event.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


# --- TLS ---


@pytest.mark.parametrize("number", [Option.LIST, Option.GO, Option.INFO, Option.STRUCTURED_REPLY, 77])
def test_required_tls_hides_everything_until_it_is_on(number: int) -> None:
    talk = Talk(TlsMode.REQUIRE)
    assert talk.types(option(number, info_data(b""))) == [OptionReply.ERR_TLS_REQD]
    assert talk.types(option(Option.STARTTLS)) == [OptionReply.ACK]
    assert talk.events == [StartTls()]
    talk.machine.tls_started()
    assert talk.types(option(Option.LIST))[-1] == OptionReply.ACK


def test_export_name_in_clear_closes_where_tls_is_required() -> None:
    talk = Talk(TlsMode.REQUIRE)
    talk.say(option(Option.EXPORT_NAME, b"disk"))
    assert only_closed(talk)


def test_starttls_forgets_what_was_negotiated_in_clear() -> None:
    talk = Talk(TlsMode.ALLOW)
    talk.say(option(Option.EXTENDED_HEADERS))
    talk.say(option(Option.SET_META_CONTEXT, meta_data(b"", (b"base:allocation",))))
    talk.say(option(Option.STARTTLS))
    talk.machine.tls_started()
    assert talk.types(option(Option.SET_META_CONTEXT, meta_data(b""))) == [OptionReply.ERR_INVALID]
    talk.say(option(Option.GO, info_data(b"")))
    event = talk.events[-1]
    assert isinstance(event, Transmission)
    assert (event.structured, event.extended, event.context_ids) == (False, False, ())


def test_starttls_twice_is_invalid() -> None:
    talk = Talk(TlsMode.ALLOW)
    talk.say(option(Option.STARTTLS))
    talk.machine.tls_started()
    assert talk.types(option(Option.STARTTLS)) == [OptionReply.ERR_INVALID]


def test_clear_text_behind_starttls_is_never_executed() -> None:
    talk = Talk(TlsMode.ALLOW)
    assert talk.types(option(Option.STARTTLS) + option(Option.LIST)) == []
    assert only_closed(talk)


def test_clear_text_that_arrives_before_the_tls_handshake_is_dropped() -> None:
    talk = Talk(TlsMode.ALLOW)
    talk.say(option(Option.STARTTLS))
    assert talk.types(option(Option.LIST)) == []
    talk.machine.tls_started()
    assert talk.types(b"") == []


# --- properties ---

options = st.builds(
    option,
    st.sampled_from([*Option, 77]),
    st.one_of(
        st.just(b""),
        st.binary(max_size=40),
        st.builds(info_data, st.sampled_from([b"", b"disk", b"other", b"x"]), st.tuples(st.integers(0, 4))),
        st.builds(meta_data, st.sampled_from([b"", b"disk"]), st.tuples(st.sampled_from([b"base:", b"x-ocssd:"]))),
    ),
)


@given(st.lists(options, max_size=8), st.sampled_from(TlsMode))
def test_bytes_one_at_a_time_give_the_same_events_and_replies(sent: list[bytes], tls: TlsMode) -> None:
    """STARTTLS is left out: text behind it is judged by when it arrives."""
    stream = FLAGS + b"".join(one for one in sent if one[8:12] != b"\0\0\0\5")
    whole, bytewise = ServerHandshake([DISK, OTHER], tls), ServerHandshake([DISK, OTHER], tls)
    events = whole.receive(stream)
    singly = [event for at in range(len(stream)) for event in bytewise.receive(stream[at : at + 1])]
    assert bytewise.data_to_send() == whole.data_to_send()
    if events and isinstance(events[0], Transmission):  # what follows is not the machine's
        assert len(singly) == 1
        assert (singly[0].export, singly[0].flags) == (events[0].export, events[0].flags)  # type: ignore[union-attr]
    else:
        assert singly == events


@given(st.binary(max_size=300), st.sampled_from(TlsMode))
def test_any_garbage_is_answered_or_ends_the_session(garbage: bytes, tls: TlsMode) -> None:
    machine = ServerHandshake([DISK, OTHER], tls)
    for event in machine.receive(FLAGS + garbage):
        assert isinstance(event, Closed | Transmission | StartTls)
    machine.data_to_send()
