"""The control socket: every kind of answer, and that bad input costs nobody else anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from ocssd_daemon.control import schema, server

STATS = schema.Stats(ftl={"waf": 1.5}, media={}, physics={}, reactor={}, transports={})


def refuse(params: object) -> msgspec.Struct:
    raise server.Refused("the flash is read-only")


def handlers(stats: Any = lambda params: STATS) -> dict[str, server.Handler]:
    return {"info": refuse, "stats": stats}


def ask(line: bytes, **table: Any) -> Any:
    reply = server.answer(line, handlers(**table))
    return json.loads(reply) if reply else None


def test_a_call_gets_its_result_and_its_id() -> None:
    reply = ask(b'{"jsonrpc":"2.0","id":7,"method":"stats"}')
    assert reply == {"jsonrpc": "2.0", "id": 7, "result": json.loads(msgspec.json.encode(STATS))}


@pytest.mark.parametrize("number", ['"text"', "null", "0", "-3"])
def test_the_id_comes_back_as_it_was(number: str) -> None:
    reply = ask(b'{"jsonrpc":"2.0","id":%s,"method":"stats"}' % number.encode())
    assert reply["id"] == json.loads(number)


def test_a_notification_gets_no_answer() -> None:
    assert ask(b'{"jsonrpc":"2.0","method":"stats"}') is None


@pytest.mark.parametrize(
    ("line", "code", "reply_id"),
    [
        (b"not json", schema.PARSE_ERROR, None),
        (b"\xff\xfe", schema.PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0","id":1', schema.PARSE_ERROR, None),
        (b"[" * 10000, schema.PARSE_ERROR, None),
        (b"[]", schema.INVALID_REQUEST, None),
        (b"17", schema.INVALID_REQUEST, None),
        (b'{"id":5,"method":"stats"}', schema.INVALID_REQUEST, 5),
        (b'{"jsonrpc":"1.0","id":5,"method":"stats"}', schema.INVALID_REQUEST, 5),
        (b'{"jsonrpc":"2.0","id":{},"method":"stats"}', schema.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":5,"method":3}', schema.INVALID_REQUEST, 5),
        (b'{"jsonrpc":"2.0","id":5,"method":"format"}', schema.METHOD_NOT_FOUND, 5),
        (b'{"jsonrpc":"2.0","id":5,"method":"stats","params":{"x":1}}', schema.INVALID_PARAMS, 5),
        (b'{"jsonrpc":"2.0","id":5,"method":"stats","params":3}', schema.INVALID_REQUEST, 5),
        (b'{"jsonrpc":"2.0","id":5,"method":"info"}', schema.REFUSED, 5),
    ],
)
def test_what_is_wrong_is_answered_with_its_code(line: bytes, code: int, reply_id: object) -> None:
    reply = ask(line)
    assert (reply["error"]["code"], reply["id"]) == (code, reply_id)


def test_a_bug_in_a_handler_is_ours_and_does_not_end_the_server(caplog: pytest.LogCaptureFixture) -> None:
    reply = ask(b'{"jsonrpc":"2.0","id":1,"method":"stats"}', stats=lambda params: 1 / 0)
    assert reply["error"]["code"] == schema.INTERNAL_ERROR
    assert "control.bug method=stats" in caplog.text


@asynccontextmanager
async def connected() -> Iterator[tuple[trio.Nursery, trio.testing.MemorySendStream, Any]]:  # type: ignore[misc]
    client, served = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server._converse, served, handlers())
        yield client
        nursery.cancel_scope.cancel()


CALL = b'{"jsonrpc":"2.0","id":1,"method":"stats"}\n'


async def replies(stream: trio.abc.ReceiveStream, count: int) -> list[Any]:
    data = b""
    with trio.fail_after(5):
        while data.count(b"\n") < count:
            data += await stream.receive_some()
    return [json.loads(line) for line in data.splitlines()]


async def test_requests_may_come_byte_by_byte() -> None:
    async with connected() as client:
        for byte in CALL:
            await client.send_all(bytes([byte]))
        assert [r["id"] for r in await replies(client, 1)] == [1]


async def test_several_requests_may_come_at_once_with_blank_lines_between() -> None:
    async with connected() as client:
        await client.send_all(CALL + b"\n\n" + CALL)
        assert len(await replies(client, 2)) == 2


async def test_a_bad_request_does_not_end_the_conversation() -> None:
    async with connected() as client:
        await client.send_all(b"nonsense\n" + CALL)
        assert ["error" in r for r in await replies(client, 2)] == [True, False]


async def test_a_line_without_end_is_refused_and_the_connection_closed() -> None:
    async with connected() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"x" * (schema.LINE_BYTES_MAX + 1))
            reply = (await replies(client, 1))[0]
        assert reply["error"] == {"code": schema.INVALID_REQUEST, "message": "the request is too long"}
