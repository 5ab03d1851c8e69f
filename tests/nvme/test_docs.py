"""The table of what the controller does, in docs/nvme.md, is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ocssd_daemon._fast import Reactor
from ocssd_daemon._nvme import GuestMemory, NvmeQueues

from ocssd_daemon.nvme.admin import ADMIN
from ocssd_daemon.nvme.features import FEATURES
from ocssd_daemon.nvme.identify import CNS
from ocssd_daemon.nvme.logs import LOGS

PAGE = Path(__file__).parents[2] / "docs" / "nvme.md"


def io_opcodes() -> set[int]:
    reactor = Reactor(0)
    queues = NvmeQueues(reactor, GuestMemory(reactor), bytearray(4096), 1)
    try:
        return set(queues.io_opcodes)
    finally:
        queues.close()


@pytest.mark.parametrize(("row", "there"), [
    ("admin commands", lambda: set(ADMIN)), ("I/O commands", io_opcodes), ("Identify", lambda: set(CNS)),
    ("logs", lambda: set(LOGS)), ("features", lambda: set(FEATURES)),
])
def test_the_table_is_what_the_code_has(row, there):
    (cell,) = re.findall(rf"^\| {row} \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert {int(number, 16) for number in re.findall(r"\b[0-9A-F]{2}\b", cell)} == there()
