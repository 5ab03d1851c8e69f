"""Owns the value that every admin handler returns, and the exception-free ways to make one."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.nvme.status import Status


@dataclass(frozen=True)
class Answer:
    """How a command ends: a status, DW0 of the completion, and the bytes that go to the host before it."""

    status: int = Status.SUCCESS
    dw0: int = 0
    data: bytes = b""


OK = Answer()


def fail(status: int) -> Answer:
    return Answer(status)


def to_host(data: bytes) -> Answer:
    return Answer(data=data)
