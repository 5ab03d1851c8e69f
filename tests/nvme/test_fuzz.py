"""Commands whose every field is drawn from what is good, at an edge, or garbage: each is answered once."""

from __future__ import annotations

import logging
import random
import struct

import pytest

from ocssd_daemon.nvme.admin import ADMIN
from ocssd_daemon.protocol.nvme.commands import AdminOpcode, sqe
from tests.kit.nvme_host import CC, CSTS, PAGE
from tests.nvme.test_docs import io_opcodes

EDGES_64 = [0, 1, 63, 64, 0x1FFF, 1 << 10, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 2,
            (1 << 64) - 1]
EDGES_32 = [0, 1, 2, 7, 63, 64, 0xFF, 0x100, 0xFFFF, 0x1_0000, 1 << 26, 1 << 30, 1 << 31, 0xFFFF_FFFE, 0xFFFF_FFFF]
NAMESPACES = [1, 1, 2, 2, 3, 3, 0, 4, 0xFFFF_FFFE, 0xFFFF_FFFF]
DATA, LISTS, QUEUES, END = 8 << 20, 4 << 20, 32 << 20, 64 << 20
# An event request has no answer until there is an event; a queue that goes takes its answers along.
UNANSWERED = {AdminOpcode.ASYNC_EVENT, AdminOpcode.DELETE_SQ, AdminOpcode.DELETE_CQ, AdminOpcode.DOORBELL_BUFFER}


def address(chance):
    return chance.choice([DATA + PAGE * chance.randrange(1024), DATA + 4 * chance.randrange(4096), LISTS, END - PAGE,
                          END - 8, END, chance.choice(EDGES_64), chance.randrange(1 << 64)])


def dwords(chance):
    """CDW10–15; the first two often an address list, as vector commands have it."""
    first = chance.choice([struct.pack("<Q", LISTS + 512 * chance.randrange(4)),
                           struct.pack("<Q", chance.choice(EDGES_64)),
                           struct.pack("<II", chance.choice(EDGES_32), chance.choice(EDGES_32)), chance.randbytes(8)])
    count = struct.pack("<HH", chance.choice([0, 3, 7, 63, 64, 0xFFFF]),
                        chance.choice([0, 1, 2, 0x2000, 0x4000, 0xFFFF]))
    return first + chance.choice([count, chance.randbytes(4)]) + chance.randbytes(4) \
        + struct.pack("<Q", chance.choice([LISTS + 512, chance.choice(EDGES_64)]))


def command(chance, opcodes, cid):
    flags = chance.choice([0] * 8 + [1, 2, 3, 0x40, 0x80, 0xC0])
    return sqe(chance.choice(opcodes), cid, chance.choice(NAMESPACES), flags=flags, dwords=dwords(chance),
               mptr=chance.choice([0, 0, address(chance)]), prp1=address(chance), prp2=address(chance))


def scribble(chance, host):
    """Lists of addresses, PRPs, SGL descriptors and ranges, all in the same place."""
    words = [chance.choice([chance.randrange(4096), DATA + PAGE * chance.randrange(1024), chance.choice(EDGES_64)])
             for _ in range(256)]
    host.memory[LISTS:LISTS + 2048] = struct.pack("<256Q", *words)


def out_of_reach(host):
    """Its queues where no command writes: one that overwrites its own queue is answered there or not at all."""
    host.write32(CC, 0)
    host._free = QUEUES
    host.enable()
    host.create_queue()
    return host


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "messages"])
def test_every_io_command_is_answered_once(start, caplog, seed, shared):
    host = out_of_reach(start(("ocssd20", "ocssd12", "block"), shared=shared, planes=2)[1])
    chance, opcodes, queue = random.Random(seed), [*sorted(io_opcodes()), 0x7F], host.queues[1]
    for _ in range(40 if shared else 6):
        scribble(chance, host)
        queue.submit(*[command(chance, opcodes, cid) for cid in range(32)])
        assert sorted(done.cid for done in queue.wait(32)) == list(range(32))
    assert queue.nothing_more()
    assert goes_on(host, caplog)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "messages"])
def test_every_admin_command_is_answered_once(start, caplog, seed, shared):
    host = out_of_reach(start(("ocssd20", "ocssd12", "block"), shared=shared, planes=2)[1])
    chance, opcodes, queue = random.Random(seed), [*sorted(set(ADMIN) - UNANSWERED), 0x7F], host.queues[0]
    for _ in range(40 if shared else 6):
        scribble(chance, host)
        queue.submit(*[command(chance, opcodes, cid) for cid in range(16)])
        assert sorted(done.cid for done in queue.wait(16)) == list(range(16))
    assert queue.nothing_more()
    assert goes_on(host, caplog)


def goes_on(host, caplog):
    """After a reset everything works, and nothing was a bug."""
    assert host.read32(CSTS) & 3 == 1
    host.write32(CC, 0)
    host.enable()
    host.create_queue()
    return host.read_blocks(0, 1, nsid=3)[0].status in (0, 0x4281) \
        and [entry for entry in caplog.records if entry.levelno >= logging.ERROR] == []
