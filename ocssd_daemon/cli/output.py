"""Owns what happens when our output cannot be written: one line and exit code 1, as for every other failure."""

from __future__ import annotations

import os
import sys
from typing import Any

import click


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
