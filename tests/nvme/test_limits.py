"""What the controller promises in numbers: queues and entries, a vector's 64 bits, interrupts that are held back."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator

import pytest

from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.protocol.nvme.commands import sqe
from tests.kit.nvme_host import CC, CC_ENABLE, CSTS, PAGE
from tests.kit.vfio_user_client import BAR4, CONFIG, INTX, MSIX
from tests.nvme.test_block import blocks
from tests.nvme.test_long_commands import Still, still
from tests.nvme.test_media_trouble import give_rules
from tests.nvme.test_rules20 import CHUNK, fill, reset, run, set_dulbe, write

__all__ = ["still"]

INTMS, INTMC = 0x0C, 0x10
ALL_64 = (1 << 64) - 1


def below(count):
    return (1 << count) - 1


# ---- queues ------------------------------------------------------------------------------------------------------


def test_64_queue_pairs_of_1024_entries_are_served(start):
    _, host = start(("block",), config=ControllerConfig())
    cap = int.from_bytes(host.client.read(0, 0, 8), "little")
    assert cap & 0xFFFF == 1023
    asked = host.admin(0x09, dwords=struct.pack("<II", 7, 0x003F_003F))
    assert (asked.status, asked.result) == (0x400C, 0)          # the fixture has made a queue already
    queues = [host.create_queue(qid, 1024) for qid in range(2, 65)]
    flush = host.entry(0x00)
    for queue in queues:
        queue.submit(*[flush] * 3)
    assert {done.status for queue in queues for done in queue.wait(3)} == {0}
    last = queues[-1]
    last.submit(*[flush] * 1023)                                # as many as a queue of 1024 entries holds
    assert {done.status for done in last.wait(1023)} == {0}


# ---- the failure bitmap in DW0 and DW1 ---------------------------------------------------------------------------


def test_a_read_names_unwritten_sectors_beyond_the_32nd(start):
    _, host = start()
    assert write(host, 0, 36).status == 0
    set_dulbe(host)
    done = host.vector_read(run(0, 64))[0]
    assert (done.status, done.result) == (0x4287, ALL_64 ^ below(36))


@pytest.mark.parametrize("sector", [0, 31, 32, 33, 63])
def test_a_read_names_the_one_sector_that_failed(start, sector):
    target, host = start()
    fill(host, 0)
    give_rules(target, f"on=read sector={sector} do=fail")
    done = host.vector_read(run(0, 64))[0]
    assert (done.status & 0x7FF, done.result) == (0x281, 1 << sector)


def test_a_write_names_the_sectors_from_the_failed_one_on(start):
    target, host = start()
    give_rules(target, "on=write sector=40 do=fail")
    done = write(host, 0, 64)
    assert (done.status & 0x7FF, done.result) == (0x2F1, ALL_64 ^ below(40))


def test_a_reset_names_the_chunk_that_failed(start):
    _, host = start(multi_reset=True)
    target_chunks = [chunk * CHUNK for chunk in range(8)] * 5    # 40 addresses
    target_chunks[37] = 1 << 40
    done = reset(host, *target_chunks)
    assert (done.status, done.result) == (0x42C1, 1 << 37)


# ---- interrupts --------------------------------------------------------------------------------------------------


@pytest.fixture
def signalled(still: Still) -> Iterator[int]:
    """The eventfd of vector 1, on which the completion queue of *still* is made again."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    still.queues.set_msix(True)
    still.queues.set_vector(1, fd)
    still.interrupting()
    yield fd
    os.close(fd)


def flush(still: Still, count: int) -> None:
    """Run *count* commands, each in a turn of its own."""
    for _ in range(count):
        still.submit(sqe(0x00, 1, 1))
        still.queues.signal(1)


def interrupts(fd: int) -> int:
    """Since the last call."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_without_coalescing_each_turn_interrupts(still: Still, signalled: int) -> None:
    flush(still, 3)
    assert interrupts(signalled) == 3


def test_completions_up_to_the_threshold_share_an_interrupt(still: Still, signalled: int) -> None:
    still.queues.set_coalescing(3, 3600 * 10**9)
    flush(still, 3)
    assert interrupts(signalled) == 0
    flush(still, 1)
    assert interrupts(signalled) == 1
    flush(still, 4)
    assert interrupts(signalled) == 1


def test_a_vector_may_be_left_out_of_coalescing(still: Still, signalled: int) -> None:
    still.queues.set_coalescing(3, 3600 * 10**9)
    still.queues.set_vector_coalescing(1, True)
    flush(still, 2)
    assert interrupts(signalled) == 2


def test_fewer_completions_interrupt_when_the_time_is_over(still: Still, signalled: int) -> None:
    still.queues.set_coalescing(3, 100_000)
    flush(still, 1)
    assert interrupts(signalled) == 0
    loop = still.reactor.start()
    assert select.select([signalled], [], [], 10)[0], "no interrupt at the end of the coalescing time"
    still.reactor.stop()
    loop.join(10)
    assert interrupts(signalled) == 1


def test_a_masked_pin_is_raised_when_it_is_unmasked(start):
    _, host = start(("block",))
    irq = os.eventfd(0, os.EFD_NONBLOCK)
    host.client.set_irqs(0x21, MSIX, 0, 0)
    host.client.set_irqs(0x24, INTX, 0, 1, fds=(irq,))
    host.write32(INTMS, ALL_64 & 0xFFFF_FFFF)
    assert host.read32(INTMC) == 0xFFFF_FFFF
    queue = host.queues[1]
    queue.submit(host.entry(0x02, address=0x10000, count=4096, dwords=blocks(0, 1)))
    while (done := queue.poll()) is None:
        host.read32(CSTS)
    assert (done.status, interrupts(irq)) == (0, 0)
    host.write32(INTMC, 0xFFFF_FFFF)
    assert host.read32(INTMS) == 0
    assert interrupts(irq) == 1
    os.close(irq)


# ---- what PCI and the registers say ------------------------------------------------------------------------------


def test_capabilities_say_what_the_device_has(start):
    _, host = start(("block",))
    config = host.client.read(CONFIG, 0, 256)
    found, at = {}, config[0x34]
    while at:
        found[config[at]], at = at, config[at + 1]
    msix, express, power = found[0x11], found[0x10], found[0x01]
    assert int.from_bytes(config[msix + 2:msix + 4], "little") & 0x7FF == host.client.irq_info(MSIX)[3] - 1
    table, pending = (int.from_bytes(config[msix + at:msix + at + 4], "little") for at in (4, 8))
    assert (table & 7, pending & 7) == (BAR4, BAR4)
    assert (table & ~7) + 9 * 16 <= (pending & ~7) < host.client.region_info(BAR4)[4]
    assert config[express + 2] >> 4 == 0                        # a PCI Express endpoint
    assert int.from_bytes(config[express + 4:express + 8], "little") >> 28 & 1      # function level reset
    assert config[power + 2] & 7 == 3                           # power management 1.2
    assert config[power + 4] & 3 == 0                           # D0


@pytest.mark.parametrize("notice", [1, 2])
def test_a_shutdown_writes_what_the_cache_holds(start, notice):
    target, host = start(("block",))
    assert host.write_blocks(0, b"x" * PAGE).status == 0
    with target.reactor.paused():
        assert target.media.stats()["sectors_written"] == 0
    host.write32(CC, CC_ENABLE | notice << 14)
    assert host.read32(CSTS) >> 2 & 3 == 2
    with target.reactor.paused():
        assert target.media.stats()["sectors_written"] > 0
    host.write32(CC, 0)
    assert host.read32(CSTS) == 0
    host.enable()
    host.create_queue()
    assert host.read_blocks(0, 1)[1] == b"x" * PAGE
