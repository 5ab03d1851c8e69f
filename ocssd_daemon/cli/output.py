"""Owns how a command answers: text or JSON, a progress bar, and one line with an exit code for what cannot be done.

Output that cannot be written (a full disk) is one line and exit code 1 too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import msgspec

output_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output."
)


# Refusals.


class Refusal(click.ClickException):
    """It cannot be done; one line on stderr says why."""

    def show(self, file: Any = None) -> None:
        click.echo(f"ocssd: {self.message}", err=True)


class WrongSettings(Refusal):
    """A setting or argument that is wrong the next time too."""

    exit_code = 2


class OneLineErrors(click.Command):
    """A command whose output may go to a full disk. (click itself sees to a reader that has left.)"""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra)
        except OSError as error:
            _give_up(sys.stdout.fileno())
            name = self.name or "ocssd"
            click.echo(f"{name}: {error.filename or 'standard output'}: {error.strerror}", err=True)
            sys.exit(1)


def _give_up(fd: int) -> None:
    """Let what is still buffered go nowhere: the interpreter would try it again, and complain, at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


class OneLineErrorsGroup(OneLineErrors, click.Group):
    """The same for a command with commands of its own."""


# Results.


def show(result: dict[str, Any], output: str, text: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Print *result*: as JSON as it is, as text by *text*, by default as aligned (dotted name, value) lines."""
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2))
    else:
        (text or _show_rows)(result)


def _show_rows(result: dict[str, Any]) -> None:
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


# Progress.


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float], None]]:
    """A function to call with the share done: a bar when a person looks at stderr, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda share: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)
