"""Owns how a command finds a running daemon and asks it: JSON-RPC over the control socket.

Imports no trio, no numpy and nothing of the daemon but the schema, so that commands start at once.
"""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from ocssd_daemon.cli.output import Refusal
from ocssd_daemon.control import schema

ANSWER_S = 10.0
NO_CONTROL_SOCKET = "is no control socket of ocssd-daemon (those end in .ctl)"


class CallError(Refusal):
    """The call has no result; one line says why."""


def call(path: str, method: str, params: dict[str, Any] | None = None) -> Any:
    """The result of *method*, asked of the daemon at *path*. Raises CallError."""
    request = {"jsonrpc": schema.VERSION, "id": 1, "method": method, "params": params or {}}
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(path)
            sock.sendall(msgspec.json.encode(request) + b"\n")
            line = sock.makefile("rb").readline()
    except ConnectionResetError:
        raise CallError(f"{path}: {NO_CONTROL_SOCKET}") from None
    except OSError as error:
        raise CallError(f"{path}: {error.strerror or 'no answer'}") from None
    if not line:
        raise CallError(f"{path}: the daemon closed the connection")
    try:
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CallError(f"{path}: {NO_CONTROL_SOCKET}") from None
    if "error" in answer:
        raise CallError(answer["error"]["message"])
    return answer["result"]


# Finding the daemon.


def control_paths() -> list[str]:
    """Control sockets that answer, in the places where daemons put them."""
    return [path for path in dict.fromkeys(_candidates()) if _is_live(path)]


def _candidates() -> Iterator[str]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = ["run", "/run", "/run/ocssd", "/run/ocssd/*"]
    if runtime:
        places += [runtime, f"{runtime}/ocssd", f"{runtime}/ocssd/*"]
    for place in places:
        yield from sorted(glob.glob(f"{place}/*.ctl"))


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def find(named: str | None) -> str:
    """The control socket to use. Raises CallError when it is not clear which."""
    if named:
        return named
    found = control_paths()
    if len(found) == 1:
        return found[0]
    if found:
        raise CallError(f"several daemons run, name one with --control: {', '.join(found)}")
    raise CallError("no daemon found; name its control socket with --control PATH or in $OCSSD_CONTROL")
