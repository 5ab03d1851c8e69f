"""Controllers of each kind on a socket, with a host attached; small flash in RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.nvme_host import NvmeHost
from tests.kit.nvme_target import Target, attached, serving
from tests.kit.vfio_user_client import VfioUserClient

StartTarget = Callable[..., tuple[Target, NvmeHost]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartTarget]:
    """``start(kinds, geometry, **options)`` → (target, host with one I/O queue pair)."""
    with ExitStack() as stack:
        def go(kinds: tuple[str, ...] = ("ocssd20",), *, shared: bool = True, **options: Any) -> tuple[Target,
                                                                                                       NvmeHost]:
            target = stack.enter_context(serving(str(tmp_path / "socket"), kinds, **options))
            host = stack.enter_context(attached(target, shared=shared))
            host.create_queue()
            return target, host
        yield go


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """A controller with a block namespace that nobody talks to yet."""
    with serving(str(tmp_path / "s"), ("block",)) as running:
        yield running


@pytest.fixture
def client(target: Target) -> Iterator[VfioUserClient]:
    """A vfio-user client of ``target`` that has negotiated, and no more."""
    with VfioUserClient(target.path) as connected:
        connected.negotiate()
        yield connected
