"""Owns the server's end of the control socket: read a line, check it, call its handler, write the answer.

A handler is a plain function from parameters to result; it may take the reactor's lock, which the reactor
gives up within a millisecond, so no method waits behind traffic. A refused request is answered, never
logged as an error of ours; only a line that is too long ends the connection, since its end cannot be found.

Spec: JSON-RPC 2.0. Access is the socket file's permissions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio
from msgspec import UNSET

from ocssd_daemon.control import schema
from ocssd_daemon.log import kv

log = logging.getLogger(__name__)

Handler = Callable[[Any], msgspec.Struct]

_encode = msgspec.json.Encoder().encode


class Refused(Exception):
    """A handler's way to say that the device does not do this now; the text goes to the caller."""


async def serve_control(
    listeners: Sequence[trio.abc.Listener[Any]],
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on all connections of *listeners* until cancelled. *handlers* has one for each method."""

    async def connection(stream: trio.abc.Stream) -> None:
        try:
            await _converse(stream, handlers)
        except trio.BrokenResourceError:
            log.debug(kv("control.gone"))

    task_status.started()
    await trio.serve_listeners(connection, list(listeners))


async def _converse(stream: trio.abc.Stream, handlers: Mapping[str, Handler]) -> None:
    pending = bytearray()
    async for data in stream:
        pending += data
        *lines, rest = pending.split(b"\n")
        for line in lines:
            reply = answer(bytes(line), handlers) if line.strip() else b""
            if reply:
                await stream.send_all(reply + b"\n")
        pending = rest
        if len(pending) > schema.LINE_BYTES_MAX:
            await stream.send_all(_failure(None, schema.INVALID_REQUEST, "the request is too long") + b"\n")
            return


def answer(line: bytes, handlers: Mapping[str, Handler]) -> bytes:
    """The reply to one request, without its newline; empty for a notification."""
    try:
        tree = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _failure(None, schema.PARSE_ERROR, str(error))
    try:
        request = msgspec.convert(tree, schema.Request)
    except msgspec.ValidationError as error:
        return _failure(_id_of(tree), schema.INVALID_REQUEST, str(error))
    reply = _call(request, handlers)
    return b"" if request.id is UNSET else reply


def _call(request: schema.Request, handlers: Mapping[str, Handler]) -> bytes:
    method = schema.METHODS.get(request.method)
    if method is None:
        known = ", ".join(schema.METHODS)
        return _failure(request.id, schema.METHOD_NOT_FOUND, f"no method {request.method}; there are {known}")
    try:
        params = msgspec.convert(request.params, method.params)
    except msgspec.ValidationError as error:
        return _failure(request.id, schema.INVALID_PARAMS, str(error))
    try:
        return _encode(schema.Success(id=_reply_id(request.id), result=handlers[request.method](params)))
    except Refused as refusal:
        return _failure(request.id, schema.REFUSED, str(refusal))
    except Exception:
        log.exception(kv("control.bug", method=request.method))
        return _failure(request.id, schema.INTERNAL_ERROR, "a bug in the daemon; its log has the details")


def _failure(request_id: Any, code: int, message: str) -> bytes:
    return _encode(schema.Failure(id=_reply_id(request_id), error=schema.Error(code, message)))


def _reply_id(request_id: Any) -> schema.Id:
    return None if request_id is UNSET else request_id


def _id_of(tree: Any) -> schema.Id:
    """The id of what is no sound request, so that its sender can match the error."""
    found = tree.get("id") if isinstance(tree, dict) else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None
