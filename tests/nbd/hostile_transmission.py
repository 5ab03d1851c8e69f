"""NB-22 to NB-42: clients that misbehave with requests."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest

from tests.kit import nbd_client as nbd
from tests.kit.nbd_client import NbdClient
from tests.kit.nbd_server import NbdServer, open_descriptors
from tests.nbd.hostile import case

MIB = 1 << 20
MODES: list[dict[str, bool]] = [{}, {"structured": True}, {"extended": True}]
ALLOCATION = (b"base:allocation",)


def alive(client: NbdClient) -> bool:
    """The session still works, and its stream is in step."""
    return len(client.read(0, 512)) == 512


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@case("NB-22")
def sends_a_bad_request_magic(server: NbdServer) -> None:
    for mode in MODES:
        wrong = nbd.COMPACT if mode.get("extended") else nbd.EXTENDED
        for magic in (wrong, 0xDEADBEEF, 0x67446698):
            with server.connect(**mode) as client:
                client.send(client.request(nbd.READ, 0, 512, magic=magic) + bytes(8))
                assert client.is_closed()


@case("NB-23")
def sends_unknown_commands(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            for kind in (8, 9, 255, 65535):
                assert client.call(kind, 0, 512).error == nbd.EINVAL
            assert alive(client)


BAD_FLAGS = [
    (nbd.READ, nbd.REQ_ONE),
    (nbd.READ, nbd.NO_HOLE),
    (nbd.READ, 1 << 6),
    (nbd.READ, 0x8000),
    (nbd.TRIM, nbd.NO_HOLE),
    (nbd.TRIM, nbd.FAST_ZERO),
    (nbd.WRITE_ZEROES, nbd.DF),
    (nbd.CACHE, nbd.DF),
    (nbd.BLOCK_STATUS, nbd.DF),
]


@case("NB-24")
def sends_flags_that_the_command_does_not_have(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode, contexts=ALLOCATION if mode else ()) as client:
            for kind, flags in BAD_FLAGS:
                assert client.call(kind, 0, 512, flags).error == nbd.EINVAL, (kind, flags)
            assert client.call(nbd.FLUSH, 0, 0, nbd.DF).error == nbd.EINVAL
            assert alive(client)
    with server.connect() as client:
        assert client.call(nbd.READ, 0, 512, nbd.DF).error == nbd.EINVAL  # no structured replies
        assert client.call(nbd.WRITE, 0, 512, nbd.PAYLOAD_LEN, bytes(512)).error == nbd.EINVAL
        assert alive(client)


@case("NB-24", read_only=True)
def asks_for_fua_where_it_was_not_offered(server: NbdServer) -> None:
    with server.connect() as client:
        assert not client.flags & (1 << 3)
        assert client.call(nbd.READ, 0, 512, nbd.FUA).error == nbd.EINVAL
        assert alive(client)


@case("NB-25")
def reaches_beyond_the_end(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            end = client.size_bytes
            for offset, length in [(end, 512), (end - 512, 1024), (1 << 63, 512), ((1 << 64) - 512, 1024), (0, 0)]:
                for kind in (nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE):
                    assert client.call(kind, offset, length).error == nbd.EINVAL, (kind, offset, length)
                assert client.write(offset, bytes(length)) == nbd.EINVAL
            assert alive(client)


@case("NB-26")
def reads_more_than_the_maximum(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            assert client.call(nbd.READ, 0, 32 * MIB + 512).error == nbd.EINVAL
            assert len(client.read(0, 32 * MIB)) == 32 * MIB


@case("NB-27")
def announces_a_write_of_gigabytes(server: NbdServer) -> None:
    before = resident_bytes()
    for mode in MODES:
        flags = nbd.PAYLOAD_LEN if mode.get("extended") else 0
        for length in [(1 << 31) - 1, 0xFFFFFFFF, *([1 << 63] if flags else [])]:
            with server.connect(**mode) as client:
                assert client.call(nbd.WRITE, 0, length, flags).error == nbd.EINVAL
                assert client.is_closed()
    assert resident_bytes() - before < 16 * MIB


@case("NB-28", nbd__max_payload_bytes=MIB)
def writes_more_than_the_maximum_but_not_absurdly_much(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            for length in (MIB + 512, 8 * MIB, 32 * MIB):
                assert client.write(0, bytes(length)) == nbd.EINVAL
            assert client.write(0, bytes(MIB)) == 0
            assert alive(client)


@case("NB-29", read_only=True)
def writes_to_a_read_only_export(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            assert client.flags & 2
            for length in (512, MIB):
                assert client.write(0, b"x" * length) == nbd.EPERM
            assert client.call(nbd.TRIM, 0, 512).error == nbd.EPERM
            assert client.call(nbd.WRITE_ZEROES, 0, 512).error == nbd.EPERM
            assert client.read(0, 512) == bytes(512)


@case("NB-30")
def sends_what_is_not_aligned_to_the_minimum(server: NbdServer) -> None:
    with server.connect(extended=True, contexts=ALLOCATION) as client:
        for offset, length in [(1, 512), (0, 511), (256, 256)]:
            for kind in (nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE, nbd.BLOCK_STATUS):
                assert client.call(kind, offset, length).error == nbd.EINVAL
            assert client.write(offset, bytes(length)) == nbd.EINVAL
        assert alive(client)


@case("NB-31")
def uses_one_cookie_for_many_requests(server: NbdServer) -> None:
    with server.connect(structured=True) as client:
        client.send(client.request(nbd.READ, 0, 512, cookie=7) * 200)
        assert [client.reply().cookie for _ in range(200)] == [7] * 200


@case("NB-32")
def pipelines_reads_and_never_reads_the_replies(server: NbdServer) -> None:
    before = resident_bytes()
    with server.connect() as client:
        request = client.request(nbd.READ, 0, 256 * 1024)
        client.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):  # back-pressure: the server stops reading, our sends block
            client.sock.sendall(request * 100_000)
        with server.connect() as other:
            assert alive(other)
    assert resident_bytes() - before < 16 * MIB


@case("NB-32")
def pipelines_and_reads_the_replies_late(server: NbdServer) -> None:
    count = 50_000
    with server.connect() as client:
        requests = client.request(nbd.READ, 0, 512, cookie=1) * count
        sender = threading.Thread(target=client.send, args=(requests,))
        sender.start()
        assert all(client.take(16 + 512)[:4] == b"\x67\x44\x66\x98" for _ in range(count))
        sender.join()
        assert alive(client)


@case("NB-33")
def leaves_in_the_middle(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as probe:
            write = probe.request(nbd.WRITE, 0, 8192, nbd.PAYLOAD_LEN if mode.get("extended") else 0)
            read = probe.request(nbd.READ, 0, 16 * MIB)
        for part in (write[:1], write[:-1], write, write + bytes(8191), read, read + write + bytes(100)):
            with server.connect(**mode) as client:
                client.send(part)
        with server.connect(**mode) as client:
            client.send(read)
            client.take(1000)  # in the middle of the reply


@case("NB-34")
def disconnects_with_requests_in_flight(server: NbdServer) -> None:
    with server.connect() as client:
        requests = [client.request(nbd.READ, 0, 65536) for _ in range(100)]
        client.send(b"".join(requests) + client.request(nbd.DISC) + requests[0])
        assert all(client.reply().error == 0 for _ in range(100))
        assert client.is_closed()


@case("NB-35")
def asks_block_status_that_was_not_negotiated(server: NbdServer) -> None:
    for mode in MODES:
        with server.connect(**mode) as client:
            assert client.call(nbd.BLOCK_STATUS, 0, 4096).error == nbd.EINVAL
            assert alive(client)


@case("NB-35")
def asks_block_status_of_nothing_and_of_too_much(server: NbdServer) -> None:
    for mode in MODES[1:]:
        with server.connect(**mode, contexts=ALLOCATION) as client:
            for offset, length in [(0, 0), (0, 0xFFFFFE00), (client.size_bytes, 512)]:
                assert client.call(nbd.BLOCK_STATUS, offset, length).error == nbd.EINVAL
            rest = client.size_bytes - 8192  # without the bystander's mark
            assert client.status(0, rest, nbd.REQ_ONE) == {1: [(rest, 3)]}


@case("NB-35")
def asks_block_status_of_thousands_of_holes(server: NbdServer) -> None:
    for mode in MODES[1:]:
        with server.connect(**mode, contexts=ALLOCATION) as client:
            for i in range(3000):
                assert client.write(8192 * i, bytes(4096)) == 0
            told = client.status(0, client.size_bytes)[1]
            assert told == [(4096, 0), (4096, 3)] * 1024  # short, as the spec allows; the client asks on
            assert client.status(8192 * 1024, 8192)[1] == [(4096, 0), (4096, 3)]


def block_status_payload(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


@case("NB-36")
def uses_payload_lengths_where_they_do_not_belong(server: NbdServer) -> None:
    with server.connect(extended=True, contexts=ALLOCATION) as client:
        for kind in (nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES, nbd.FLUSH, nbd.CACHE, 9):
            assert client.call(kind, 0, 512, nbd.PAYLOAD_LEN, bytes(512)).error == nbd.EINVAL  # drained
        assert client.call(nbd.READ, 0, MIB, nbd.PAYLOAD_LEN, bytes(MIB)).error == nbd.EINVAL
        assert alive(client)
    with server.connect(extended=True) as client:
        assert client.call(nbd.READ, 0, 1 << 63, nbd.PAYLOAD_LEN).error == nbd.EINVAL
        assert client.is_closed()


@case("NB-36")
def writes_without_a_payload_length_as_qemu_does(server: NbdServer) -> None:
    with server.connect(extended=True) as client:
        assert client.call(nbd.WRITE, 0, 512, 0, b"x" * 512).error == 0
        assert client.read(0, 512) == b"x" * 512


BAD_STATUS_PAYLOADS = [
    bytes(4),
    bytes(8),
    block_status_payload(4096, 1) + b"\0",
    block_status_payload(4096, 1, 1),  # an id twice
    block_status_payload(4096, 2),  # not negotiated
    block_status_payload(4096, 0xFFFFFFFF),
    block_status_payload(4096, *[1] * 1000),
    block_status_payload(0, 1),
    block_status_payload(1 << 63, 1),
    bytes(MIB),
]


@case("NB-36")
def sends_block_status_payloads_that_are_wrong(server: NbdServer) -> None:
    with server.connect(extended=True, contexts=ALLOCATION) as client:
        assert client.flags & (1 << 12)
        for payload in BAD_STATUS_PAYLOADS:
            told = client.call(nbd.BLOCK_STATUS, 0, len(payload), nbd.PAYLOAD_LEN, payload)
            assert told.error == nbd.EINVAL, payload[:40]
        good = block_status_payload(8192, 1)
        told = client.call(nbd.BLOCK_STATUS, 4096, len(good), nbd.PAYLOAD_LEN, good)
        assert told.extents == {1: [(8192, 3)]}


@case("NB-37", erases=True)
def trims_and_zeroes_all_and_more(server: NbdServer) -> None:
    with server.connect(extended=True) as client:
        for kind in (nbd.TRIM, nbd.WRITE_ZEROES):
            assert client.call(kind, 0, 1 << 63).error == nbd.EINVAL
            assert client.call(kind, 0, client.size_bytes).error == 0
        assert alive(client)


@case("NB-37", erases=True, preset="default")
def leaves_while_the_whole_device_is_zeroed(server: NbdServer) -> None:
    tasks = server.task_count()
    with server.connect(extended=True) as client:
        client.send(client.request(nbd.WRITE_ZEROES, 0, client.size_bytes, nbd.NO_HOLE))
        with server.connect() as other:
            assert alive(other)  # served in between
    server.wait(lambda: server.tasks_now() <= tasks, "its connection is closed")
    written = server.device.ftl.stats()["user_sectors_written"]
    assert 0 < written < server.device.disk.size_bytes // 4096  # cancelled, not finished


@case("NB-38")
def asks_for_fast_zeroes_where_zeroing_is_slow(server: NbdServer) -> None:
    with server.connect() as client:
        assert client.call(nbd.WRITE_ZEROES, 0, MIB, nbd.FAST_ZERO | nbd.NO_HOLE).error == nbd.ENOTSUP
        assert client.call(nbd.WRITE_ZEROES, 0, MIB, nbd.FAST_ZERO).error == 0
        assert client.call(nbd.WRITE_ZEROES, 0, MIB, nbd.NO_HOLE).error == 0


@case("NB-39")
def writes_and_flushes_while_the_flash_fails(server: NbdServer) -> None:
    """Chunks whose programs fail go offline; when no spare is left, writes fail and go on failing, reads do not."""
    device = server.device
    with server.connect() as client:
        assert client.write(0, b"kept" * 1024, nbd.FUA) == 0
        with device.reactor.paused():
            for chunk in range(device.geometry.total_chunks):
                device.media.arm_fault(chunk, "write")
        errors = [client.write(4096 * (1 + i % 1000), bytes(4096)) for i in range(20_000)]
        assert errors[-1] == nbd.EIO
        assert client.write(0, bytes(4096), nbd.FUA) == nbd.EIO  # sticky
        assert client.read(0, 4096) == b"kept" * 1024
    assert server.stats()["errors"] > 0


@case("NB-40", leaves_server=False)
def is_there_when_the_server_stops(server: NbdServer) -> None:
    silent, haggling = server.client(), server.client()
    idle, busy, half = (server.connect() for _ in range(3))
    haggling.greet()
    haggling.ask(nbd.OPT_LIST)
    half.send(half.request(nbd.WRITE, 0, 4096) + bytes(100))
    busy.send(busy.request(nbd.READ, 0, MIB) * 20)
    server.stop()
    for client in (silent, haggling, idle, busy, half):
        assert client.is_closed()
        client.sock.close()


@case("NB-41", nbd__max_connections=2)
def is_one_too_many(server: NbdServer) -> None:
    tasks = server.task_count()
    with server.connect(), server.client() as third:  # the bystander is the other one
        third.greet()
        third.send(nbd.option(nbd.OPT_GO, nbd.info_data(b"")))
        assert third.option_reply() == (nbd.OPT_GO, nbd.ERR_POLICY, b"too many connections")
        assert third.ask(nbd.OPT_ABORT)[0] == nbd.REP_ACK
    server.wait(lambda: server.tasks_now() == tasks, "both have left")
    with server.connect() as client:
        assert alive(client)


@case("NB-42", host="127.0.0.1")
def resets_and_half_closes(server: NbdServer) -> None:
    before = open_descriptors()
    for i in range(60):
        client = NbdClient.tcp("127.0.0.1", server.port)
        if i % 3:
            client.negotiate()
            client.send(client.request(nbd.READ, 0, MIB) * (i % 5))
        if i % 2:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
        else:
            client.sock.shutdown(socket.SHUT_WR)
        client.sock.close()
    server.wait(lambda: open_descriptors() <= before, "descriptors are closed")


@case("NB-42")
def half_closes_and_still_gets_its_replies(server: NbdServer) -> None:
    with server.connect() as client:
        client.send(client.request(nbd.READ, 0, MIB) * 8)
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(8):
            assert len(client.take(16 + MIB)) == 16 + MIB
        assert client.is_closed()
