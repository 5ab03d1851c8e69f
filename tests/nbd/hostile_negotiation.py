"""NB-01 to NB-21: clients that misbehave while they negotiate."""

from __future__ import annotations

import ssl
import struct

from tests.kit import nbd_client as nbd
from tests.kit.certs import Pair
from tests.kit.nbd_client import NbdClient, info_data, meta_data, option
from tests.kit.nbd_server import NbdServer
from tests.nbd.hostile import case


def goes_on(client: NbdClient) -> bool:
    """The session still works: a GO is answered."""
    return client.go() == nbd.REP_ACK


@case("NB-01", nbd__handshake_seconds=0.1)
def says_nothing_and_is_closed_by_the_timer(server: NbdServer) -> None:
    with server.client() as client:
        assert client.is_closed()


@case("NB-01", nbd__handshake_seconds=0.3)
def trickles_bytes_and_is_closed_by_the_same_timer(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.send(option(nbd.OPT_GO, b"\0\0", length=1000))
        assert client.is_closed()


@case("NB-02")
def sends_unknown_client_flags(server: NbdServer) -> None:
    for flags in (4, 0x80000003, 0xFFFFFFFF):
        with server.client() as client:
            client.greet(flags)
            assert client.is_closed()


@case("NB-03")
def sends_an_unknown_option_without_fixed_newstyle(server: NbdServer) -> None:
    with server.client() as client:
        client.greet(0)
        client.send(option(99))
        assert client.is_closed()


@case("NB-04")
def sends_a_bad_option_magic(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.send(option(nbd.OPT_LIST, magic=b"IHAVEOPS"))
        assert client.is_closed()


@case("NB-05")
def announces_an_option_of_gigabytes(server: NbdServer) -> None:
    for length in (1 << 31, 0xFFFFFFFF):
        with server.client() as client:
            client.greet()
            client.send(option(nbd.OPT_GO, length=length))
            assert client.is_closed()


@case("NB-06")
def sends_64_kib_of_an_unknown_option(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        for size in (1 << 16, (1 << 16) + 1, 1 << 20):
            assert client.ask(99, bytes(size)) == (nbd.ERR_UNSUP, [])
        assert goes_on(client)


@case("NB-07")
def asks_options_without_end(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.send(option(nbd.OPT_LIST) * 1100)
        assert client.is_closed()


@case("NB-08")
def asks_for_export_names_that_are_none(server: NbdServer) -> None:
    for name in (b"x", b"n" * 4096, b"n" * 4097, b"n" * 65536, b"ocssd\0", b"\xff\xfe", b"../ocssd", b"%00"):
        with server.client() as client:
            client.greet()
            client.send(option(nbd.OPT_EXPORT_NAME, name))
            assert client.is_closed()


@case("NB-08")
def asks_for_the_empty_export_name_which_is_the_default(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.send(option(nbd.OPT_EXPORT_NAME))
        size, flags = struct.unpack(">QH", client.take(10))
        assert size == server.device.disk.size_bytes
        assert not flags & (1 << 7)  # no DF without structured replies
        assert len(client.read(0, 512)) == 512


@case("NB-09")
def sends_go_with_lengths_that_lie(server: NbdServer) -> None:
    bad = {
        "name longer than the data": b"\0\0\0\x09ocssd\0\0",
        "fewer infos than announced": info_data(b"ocssd", (1,))[:-2],
        "half an info": info_data(b"ocssd", (1,))[:-1],
        "bytes behind the infos": info_data(b"ocssd", (1,)) + b"\0",
        "an info twice": info_data(b"ocssd", (3, 3)),
        "no data at all": b"",
        "name length of 4 GiB": b"\xff\xff\xff\xff",
    }
    with server.client() as client:
        client.greet()
        for what, data in bad.items():
            for number in (nbd.OPT_GO, nbd.OPT_INFO):
                assert client.ask(number, data)[0] == nbd.ERR_INVALID, what
        assert goes_on(client)


@case("NB-10")
def asks_info_of_one_export_and_goes_to_another(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        assert client.ask(nbd.OPT_INFO, info_data(b"ocssd"))[0] == nbd.REP_ACK
        assert client.go(b"other") == nbd.ERR_UNKNOWN
        assert goes_on(client)


@case("NB-11")
@case("NB-12")
def sends_data_with_options_that_take_none(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        for number in (nbd.OPT_LIST, nbd.OPT_STRUCTURED, nbd.OPT_EXTENDED, nbd.OPT_STARTTLS):
            assert client.ask(number, b"x")[0] == nbd.ERR_INVALID
        assert goes_on(client)


@case("NB-13")
def asks_for_structured_replies_twice_and_after_extended_headers(server: NbdServer) -> None:
    asked = (nbd.OPT_STRUCTURED, nbd.OPT_STRUCTURED, nbd.OPT_EXTENDED, nbd.OPT_STRUCTURED)
    with server.client() as client:
        client.greet()
        told = [client.ask(number)[0] for number in asked]
        assert told == [nbd.REP_ACK] * 3 + [nbd.ERR_EXT_HEADER_REQD]
        assert goes_on(client)


@case("NB-14")
def sets_contexts_before_structured_replies(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        for number in (nbd.OPT_SET_META, nbd.OPT_LIST_META):
            assert client.ask(number, meta_data(b"", (b"base:allocation",)))[0] == nbd.ERR_INVALID
        assert goes_on(client)


@case("NB-14")
def sets_contexts_with_queries_that_are_none(server: NbdServer) -> None:
    answers = {
        nbd.ERR_UNKNOWN: meta_data(b"other", (b"base:allocation",)),
        nbd.REP_ACK: meta_data(b"", (b"nocolon", b"", b"base:", b"foreign:thing")),
        nbd.ERR_TOO_BIG: meta_data(b"", (b"",) * 1_000_000),
        nbd.ERR_INVALID: meta_data(b"", (b"q" * 4097,)),
    }
    with server.client() as client:
        client.greet()
        client.ask(nbd.OPT_STRUCTURED)
        for kind, data in answers.items():
            assert client.ask(nbd.OPT_SET_META, data) == (kind, [])
        assert client.ask(nbd.OPT_SET_META, meta_data(b"")) == (nbd.REP_ACK, [])
        assert client.ask(nbd.OPT_SET_META, meta_data(b"", (b"base:x",))[:-1])[0] == nbd.ERR_INVALID
        assert client.ask(nbd.OPT_SET_META, b"\0\0\0\0\xff\xff\xff\xff")[0] == nbd.ERR_INVALID
        assert goes_on(client)


@case("NB-15")
def sets_contexts_for_an_export_that_it_does_not_use(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.ask(nbd.OPT_STRUCTURED)
        client.structured = True
        client.set_contexts(b"base:allocation")
        client.ask(nbd.OPT_SET_META, meta_data(b"other", (b"base:allocation",)))
        assert goes_on(client)
        assert client.call(nbd.BLOCK_STATUS, 0, 4096).error == nbd.EINVAL


# TLS: the runner makes the certificates and leaves their authorities at the server.


def starttls(client: NbdClient, server: NbdServer, pair: Pair | None = None) -> None:
    """STARTTLS, with the client's own certificate if it has one. Raises ssl.SSLError or OSError."""
    assert client.ask(nbd.OPT_STARTTLS)[0] == nbd.REP_ACK
    context = ssl.create_default_context(cafile=server.authority.certificate)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")


@case("NB-16", nbd__tls__mode="allow")
def asks_for_tls_twice(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        starttls(client, server)
        assert client.ask(nbd.OPT_STARTTLS)[0] == nbd.ERR_INVALID
        assert goes_on(client)
        assert len(client.read(0, 4096)) == 4096


@case("NB-16", nbd__tls__mode="allow")
def pipelines_clear_text_behind_starttls(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.send(option(nbd.OPT_STARTTLS) + option(nbd.OPT_GO, info_data(b"")))
        assert client.is_closed()
    assert server.stats()["connections"] == 1  # the bystander's: nobody else got into transmission


@case("NB-17", nbd__tls__mode="allow")
def negotiates_in_clear_and_then_starts_tls(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.ask(nbd.OPT_EXTENDED)
        client.set_contexts(b"base:allocation")
        starttls(client, server)
        assert goes_on(client)
        # Compact request, simple reply: nothing of what was agreed in clear is left.
        assert client.call(nbd.READ, 0, 512).chunks == []
        assert client.call(nbd.BLOCK_STATUS, 0, 4096).error == nbd.EINVAL


@case("NB-18", nbd__tls__mode="require")
def goes_on_in_clear_where_tls_is_required(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        for number in (nbd.OPT_LIST, nbd.OPT_STRUCTURED, nbd.OPT_GO, nbd.OPT_INFO, nbd.OPT_LIST_META, 99):
            assert client.ask(number) == (nbd.ERR_TLS_REQD, [])
        client.send(option(nbd.OPT_EXPORT_NAME))
        assert client.is_closed()


@case("NB-19", nbd__tls__mode="require", verify_clients=True)
def shows_a_client_certificate_that_is_not_good(server: NbdServer) -> None:
    bad = {
        "none": None,
        "of another authority": server.stranger.sign("client"),
        "expired": server.authority.sign("expired", expired=True),
    }
    for what, pair in bad.items():
        with server.client() as client:
            client.greet()
            assert not serves_over_tls(client, server, pair), what
    with server.client() as client:
        client.greet()
        assert serves_over_tls(client, server, server.authority.sign("client"))


def serves_over_tls(client: NbdClient, server: NbdServer, pair: Pair | None) -> bool:
    """In TLS 1.3 a client learns that its certificate was refused only when it reads."""
    try:
        starttls(client, server, pair)
        return goes_on(client)
    except (ssl.SSLError, nbd.Gone):
        return False


@case("NB-19", nbd__tls__mode="require", nbd__handshake_seconds=0.5)
def stalls_in_the_tls_handshake(server: NbdServer) -> None:
    for sent in (b"", b"\x16\x03\x01", b"not TLS at all, but enough bytes for a record header"):
        with server.client() as client:
            client.greet()
            client.ask(nbd.OPT_STARTTLS)
            client.send(sent)
            assert client.is_closed()


@case("NB-20")
def sends_the_withdrawn_peek_option(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        assert client.ask(nbd.OPT_PEEK)[0] == nbd.ERR_UNSUP
        assert goes_on(client)


@case("NB-21")
def sends_export_name_after_extended_headers(server: NbdServer) -> None:
    with server.client() as client:
        client.greet()
        client.ask(nbd.OPT_EXTENDED)
        client.send(option(nbd.OPT_EXPORT_NAME, b"ocssd"))
        assert client.is_closed()
