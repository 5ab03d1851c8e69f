"""Owns what travels over the control socket: envelopes, methods, their parameters and results.

JSON-RPC 2.0, one JSON text a line, both ways; no batches. These structs are the source: the server decodes
by them, the client encodes by them, the documentation shows their JSON Schema. Adding a method is one entry
in METHODS and one handler in ``server``. Imports msgspec alone, since the client's start-up time depends on
it.

Units are in the names; times are seconds or nanoseconds of the daemon's monotonic clock.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

LINE_BYTES_MAX = 1 << 20  # a request longer than this is not read to its end
VERSION: Literal["2.0"] = "2.0"

# JSON-RPC 2.0 §5.1; the last is of the range that it leaves to servers.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
REFUSED = -32000  # the method exists and its parameters are sound, but the device says no

Id = int | str | None


class Request(msgspec.Struct, frozen=True):
    """A call; without ``id`` it is a notification and gets no answer."""

    jsonrpc: Literal["2.0"]
    method: str
    params: dict[str, Any] = {}
    id: Id | UnsetType = UNSET


class Error(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why there is no result."""

    code: int
    message: str
    data: Any = None


class Success(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a call that worked."""

    jsonrpc: Literal["2.0"] = VERSION
    id: Id
    result: Any


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a call that did not."""

    jsonrpc: Literal["2.0"] = VERSION
    id: Id
    error: Error


class NoParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A method without parameters."""


class Info(msgspec.Struct, frozen=True):
    """What is running: facts that do not change while it runs."""

    version: str
    pid: int
    uptime_s: float
    geometry: dict[str, int]
    settings: dict[str, Any]
    disk: dict[str, Any]
    addresses: Annotated[list[str], Meta(description="where it listens, as URIs")]


class Stats(msgspec.Struct, frozen=True):
    """Counters since the start (the flash's own: since the image was made)."""

    ftl: Annotated[dict[str, Any], Meta(description="user, moved and programmed sectors, waf, lines, stalls")]
    media: Annotated[dict[str, Any], Meta(description="operations on the flash and their failures")]
    physics: Annotated[dict[str, Any], Meta(description="latency model, wear, hits of fault rules")]
    reactor: Annotated[dict[str, Any], Meta(description="the loop: turns, sleeps, lateness of completions")]
    transports: Annotated[dict[str, dict[str, Any]], Meta(description="requests, errors, bytes of each")]


class Method(NamedTuple):
    """One thing that can be asked."""

    params: type[msgspec.Struct]
    result: type[msgspec.Struct]
    effect: str


class FaultAdd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule to add."""

    rule: Annotated[str, Meta(description="such as: on=write chunk=5 do=fail p=0.01")]


class FaultId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rule by its number."""

    id: Annotated[int, Meta(description="the rule's number", ge=1, le=2**31 - 1)]


class FaultImport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of faults, read by the daemon."""

    kind: Annotated[Literal["resetfail", "writefail", "chunkstate", "bbtable", "rules"], Meta(description="its format")]
    path: Annotated[str, Meta(description="the file, as the daemon sees it")]


class FaultRules(msgspec.Struct, frozen=True):
    """All rules in the order in which they are asked: id, rule, seen, hits."""

    rules: Annotated[list[dict[str, Any]], Meta(description="id, rule, seen (times it was asked), hits")]


METHODS: dict[str, Method] = {
    "info": Method(NoParams, Info, "What is running: version, geometry, disk, addresses."),
    "stats": Method(NoParams, Stats, "Counters of the FTL, the flash, the reactor and each transport."),
    "fault.list": Method(NoParams, FaultRules, "Fault rules and how often they struck."),
    "fault.add": Method(FaultAdd, FaultRules, "Add a fault rule."),
    "fault.remove": Method(FaultId, FaultRules, "Take a fault rule out."),
    "fault.import": Method(FaultImport, FaultRules, "Take fault rules, or chunks to fail, from a file."),
}
