"""``ocssd``: the operator's client. Owns its arguments, how it finds a daemon, and how answers look.

Talks JSON-RPC over the control socket and imports no trio, no numpy and nothing of the daemon but the
schema, so that it starts at once. ``-o json`` is the interface for programs; text is for people and may
change.

Exit codes: 0 done, 1 the daemon refused or cannot be reached, 2 usage.
"""

from __future__ import annotations

import glob
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from ocssd_daemon import __version__
from ocssd_daemon.cli.check_geometry import check_geometry
from ocssd_daemon.cli.fault import fault
from ocssd_daemon.cli.images import create, import_image
from ocssd_daemon.cli.output import OneLineErrorsGroup
from ocssd_daemon.cli.simulate import simulate
from ocssd_daemon.cli.sweep import sweep
from ocssd_daemon.control import schema

ANSWER_S = 10.0


class CallError(click.ClickException):
    """The call has no result; one line says why."""

    def show(self, file: Any = None) -> None:
        click.echo(f"ocssd: {self.message}", err=True)


def call(path: str, method: str, params: dict[str, Any] | None = None) -> Any:
    """The result of *method*, asked of the daemon at *path*. Raises CallError."""
    request = {"jsonrpc": schema.VERSION, "id": 1, "method": method, "params": params or {}}
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(path)
            sock.sendall(msgspec.json.encode(request) + b"\n")
            line = sock.makefile("rb").readline()
    except OSError as error:
        raise CallError(f"{path}: {error.strerror or 'no answer'}") from None
    if not line:
        raise CallError(f"{path}: the daemon closed the connection")
    try:
        answer = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CallError(f"{path}: is no control socket of ocssd-daemon (those end in .ctl)") from None
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


# How answers look.


def _show(result: Any, output: str) -> None:
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
        return
    rows = list(rows_of(result))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def rows_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A tree as (dotted name, value) lines."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from rows_of(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value)) or "-"
        else:
            yield prefix + name, _cell(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Commands: one per method that takes no parameters; others get a function of their own.


@click.group("ocssd", cls=OneLineErrorsGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--control", envvar="OCSSD_CONTROL", metavar="PATH", help="Control socket; default: the only one.")
@click.version_option(__version__, prog_name="ocssd")
@click.pass_context
def main(context: click.Context, control: str | None) -> None:
    """Ask a running ocssd-daemon, or simulate one."""
    context.obj = control


def _plain_command(method: str) -> None:
    @main.command(method, help=schema.METHODS[method].effect)
    @click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output.")
    @click.pass_obj
    def command(control: str | None, output: str) -> None:
        _show(call(find(control), method), output)


for _method in ("info", "stats"):
    _plain_command(_method)


for _command in (check_geometry, create, fault, import_image, simulate, sweep):
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
