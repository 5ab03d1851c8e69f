"""The table of hostile NBD clients: what a case is, and how one is registered.

A case is a function of a running server; it is named by the row of the malformed-input matrix that it plays. The
runner in ``test_nbd_hostile.py`` adds what holds for all: others are served on, no descriptor and no task leaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.kit.nbd_server import NbdServer

Run = Callable[[NbdServer], None]


@dataclass(frozen=True)
class Case:
    """One hostile client: the row of the matrix, what it does, and the settings of the server that it meets."""

    row: str
    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    leaves_server: bool = True  # False: the case stops the server, so nobody can be asked afterwards
    erases: bool = False  # the case is allowed to write everywhere

    @property
    def id(self) -> str:
        return f"{self.row} {self.run.__name__}"


CASES: list[Case] = []


def case(row: str, *, leaves_server: bool = True, erases: bool = False, **settings: Any) -> Callable[[Run], Run]:
    """Register the decorated function as a case of *row*."""

    def register(run: Run) -> Run:
        CASES.append(Case(row, run, settings, leaves_server, erases))
        return run

    return register
