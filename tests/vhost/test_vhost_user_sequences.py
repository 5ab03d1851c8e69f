"""QEMU's sequences over real rings: what is written before a stop, a reset or a reconnect is there after it."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from ocssd_daemon.device import Device
from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user.wire import BackendRequest, Feature, ProtocolFeature, Request
from ocssd_daemon.transport.vhost_user import VhostUserServer, rings_of
from tests.kit.blk_driver import IN, lay_out
from tests.kit.guest_memory import USER_OFFSET, GuestMemory
from tests.kit.vhost_disk import completed, read, run, write
from tests.kit.vhost_frontend import FRESH_PACKED_BASE, Frontend
from tests.kit.vhost_rings import dispatching, small_device
from tests.kit.vhost_server import serving
from tests.kit.virtqueue import Packed, Split

EVERYTHING = (1 << 23) - 1
DATA = bytes(range(256)) * 16  # 4 KiB
PAGE = 4096
RING_RESET = 1 << 40


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with small_device() as device:
        yield device


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vhost.sock"


@pytest.fixture
async def server(device, path) -> AsyncIterator[VhostUserServer]:
    async with dispatching(device), serving(path, rings_of(device)) as server:
        yield server


@pytest.fixture(params=[Split, Packed], ids=["split", "packed"])
async def frontend(server, path, request) -> AsyncIterator[Frontend]:
    with Frontend(num_rings=2, layout=request.param) as frontend:
        await frontend.connect(str(path))
        await frontend.reset()
        await frontend.start()
        yield frontend


async def test_both_rings_reach_the_same_disk(frontend):
    await write(frontend, 0, DATA, ring=0)
    assert await read(frontend, 0, len(DATA), ring=1) == DATA


@pytest.mark.parametrize("status_first", [False, True], ids=["QEMU 11", "QEMU 7.2"])
async def test_a_stopped_ring_goes_on_where_it_stood(frontend, status_first):
    for round_ in range(3):
        await write(frontend, 8 * round_, DATA)
        await frontend.stop(status_first=status_first)
        await frontend.start()
    assert await read(frontend, 0, 3 * len(DATA)) == 3 * DATA


@pytest.mark.parametrize("layout", [Split, Packed])
async def test_one_ring_is_reset_and_starts_anew_elsewhere_while_the_other_runs_on(server, path, layout):
    """VIRTIO_F_RING_RESET: the driver resets one virtqueue (virtio 1.3, 2.6.1), QEMU stops that ring alone."""
    with Frontend(num_rings=2, layout=layout) as frontend:
        await frontend.connect(path)
        await frontend.start()
        assert frontend.features & RING_RESET
        await write(frontend, 0, DATA, ring=0)
        await write(frontend, 8, DATA, ring=1)
        await frontend.do(Request.SET_VRING_ENABLE, m.VringState(0, 0))
        await frontend.ask(Request.GET_VRING_BASE, m.VringState(0, 0))
        await write(frontend, 16, DATA, ring=1)
        old = frontend.rings[0]
        frontend.rings[0] = layout(frontend.memory, 32, event_idx=True)  # of another size, too
        frontend.bases[0] = 0 if layout is Split else FRESH_PACKED_BASE
        await frontend.start_ring(0)
        await frontend.do(Request.SET_VRING_ENABLE, m.VringState(0, 1))
        assert await read(frontend, 0, 3 * len(DATA), ring=0) == 3 * DATA
        assert await read(frontend, 0, 3 * len(DATA), ring=1) == 3 * DATA
        assert old.completed() == []


async def test_after_a_reset_the_memory_is_still_known(server, path):
    with Frontend(num_rings=2) as frontend:
        await frontend.connect(str(path))
        for _ in range(3):
            await frontend.start()
            await write(frontend, 0, DATA)
            await frontend.stop()
            await frontend.reset()
            frontend.fresh_rings()


async def test_a_front_end_that_reconnects_goes_on_with_its_rings(frontend, path):
    await write(frontend, 0, DATA)
    await frontend.reconnect(str(path))
    assert await read(frontend, 0, len(DATA)) == DATA


async def test_what_was_submitted_while_nobody_listened_is_served_after_the_reconnect(frontend, server, path):
    frontend.disconnect()
    queue = frontend.rings[0]
    request = lay_out(frontend.memory, IN, 0, in_size=512)
    head = queue.submit(request.chain)
    queue.kick()
    await frontend.reconnect(str(path))
    assert await completed(queue) == [head]


async def test_a_ring_serves_nothing_before_it_is_enabled_and_remembers_the_kick(frontend):
    await frontend.do(Request.SET_VRING_ENABLE, m.VringState(0, 0))
    queue = frontend.rings[0]
    queue.submit(lay_out(frontend.memory, IN, 0, in_size=512).chain)
    queue.kick()
    assert await frontend.ask_number(Request.GET_FEATURES)
    assert queue.completed() == []
    await frontend.do(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    assert len(await completed(queue)) == 1


@pytest.mark.parametrize(
    "leave_out",
    [0, ProtocolFeature.GPA_ADDRESSES, ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.REPLY_ACK, EVERYTHING],
    ids=["nothing", "GPA_ADDRESSES", "CONFIGURE_MEM_SLOTS", "REPLY_ACK", "everything"],
)
async def test_io_works_whatever_an_older_front_end_leaves_out(server, path, leave_out):
    want = EVERYTHING & ~int(leave_out) | ProtocolFeature.CONFIG
    with Frontend(num_rings=2) as frontend:
        await frontend.connect(str(path), want)
        await frontend.start()
        await write(frontend, 0, DATA)
        assert await read(frontend, 0, len(DATA)) == DATA


async def test_memory_added_while_rings_run_can_be_read_into(frontend):
    with Plugged(frontend, gpa=1 << 32) as plugged:
        await write(frontend, 0, DATA)
        region = m.MemRegion(plugged.region)
        await frontend.do(Request.ADD_MEM_REG, region, [plugged.memory.regions[0].fd])
        request = lay_out(plugged.memory, IN, 0, in_size=len(DATA))
        assert await run(frontend, request) == 0
        assert request.data == DATA
        await frontend.do(Request.REM_MEM_REG, region)
        request = lay_out(plugged.memory, IN, 0, in_size=len(DATA))
        assert await frontend.ask_number(Request.GET_STATUS) == 0xF
        assert await read(frontend, 0, len(DATA)) == DATA


async def test_a_memory_table_that_is_sent_again_with_more_in_it_does_not_disturb_running_rings(frontend):
    with Plugged(frontend, gpa=1 << 32) as plugged:
        table = m.MemTable((frontend.region(), plugged.region))
        await frontend.do(Request.SET_MEM_TABLE, table, [frontend.memory_fd, plugged.memory.regions[0].fd])
        await write(frontend, 0, DATA)
        request = lay_out(plugged.memory, IN, 0, in_size=len(DATA))
        assert await run(frontend, request) == 0
        assert request.data == DATA


class Plugged:
    """Guest memory beyond what the front end started with."""

    def __init__(self, frontend: Frontend, gpa: int) -> None:
        self.memory = GuestMemory((gpa, 1 << 20))
        self.region = m.Region(gpa, 1 << 20, 0 if frontend.by_gpa else gpa + USER_OFFSET, 0)

    def __enter__(self) -> Plugged:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.memory.close()


async def test_while_logging_every_page_written_to_the_guest_is_marked(frontend):
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        size_bytes = frontend.memory.regions[0].size // PAGE // 8
        os.ftruncate(log, size_bytes)
        await frontend.start_logging(log, size_bytes)
        request = lay_out(frontend.memory, IN, 0, in_size=4 * PAGE)
        assert await run(frontend, request) == 0
        dirty = pages_marked(log, size_bytes)
        first, last = request.data_at // PAGE, (request.data_at + 4 * PAGE - 1) // PAGE
        assert dirty >= {*range(first, last + 1), request.status_at // PAGE}
        assert frontend.used_page(0) in dirty
        await frontend.cancel_logging()
        os.pwrite(log, bytes(size_bytes), 0)
        await read(frontend, 0, PAGE)
        assert pages_marked(log, size_bytes) == set()
    finally:
        os.close(log)


def pages_marked(log: int, size_bytes: int) -> set[int]:
    bitmap = os.pread(log, size_bytes, 0)
    return {8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


async def test_a_broken_ring_is_told_by_its_descriptor_the_status_and_the_channel(frontend):
    assert await frontend.config()
    queue = frontend.rings[0]
    header, *_ = lay_out(frontend.memory, IN, 0, in_size=512).chain
    queue.submit([header])  # and nothing to write a status to
    queue.kick()
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(queue.err_fd)
    assert await frontend.next_announcement() == BackendRequest.CONFIG_CHANGE_MSG
    assert await frontend.ask_number(Request.GET_STATUS) & 0x40
    await write(frontend, 0, DATA, ring=1)


async def test_the_write_cache_mode_is_the_driver_s_to_set_and_survives_a_reset(frontend):
    await frontend.do(Request.SET_CONFIG, m.Config(32, 1, 0, b"\0"))
    await frontend.stop()
    await frontend.reset()
    assert (await frontend.config())[32] == 0


async def test_the_configuration_is_that_of_the_disk(frontend, device):
    config = await frontend.config(60)
    capacity_sectors, seg_max, block_bytes = struct.unpack_from("=Q4xI4xI", config)
    assert capacity_sectors * 512 == device.disk.size_bytes
    assert seg_max > 1
    assert block_bytes == device.disk.block_bytes
    assert struct.unpack_from("=H", config, 34)[0] == 2  # num_queues
    assert frontend.offered & Feature.MQ


async def test_counters_are_the_server_s_and_outlive_a_session(frontend, server, path):
    before = server.stats()
    await write(frontend, 0, DATA)
    await frontend.reconnect(str(path))
    await read(frontend, 0, len(DATA))
    after = server.stats()
    grown = {name: after[name] - before[name] for name in ("requests", "bytes_read", "bytes_written", "connections")}
    assert grown == {"requests": 2, "bytes_read": 4096, "bytes_written": 4096, "connections": 1}


async def test_without_bit_30_there_is_nothing_to_enable(server, path):
    with Frontend() as frontend:
        await frontend.connect(str(path))
        plain = frontend.offered & ~int(Feature.PROTOCOL_FEATURES | Feature.LOG_ALL | Feature.RING_PACKED)
        await frontend.do(Request.SET_FEATURES, m.U64(plain))
        await frontend.share_memory()
        await frontend.start_ring(0)
        await write(frontend, 0, DATA)
