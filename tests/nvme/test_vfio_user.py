"""vfio-user as QEMU speaks it, and everything that a hostile client may send (messages, regions, interrupts,
memory).
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct

import pytest

from tests.kit.nvme_host import PAGE, NvmeHost
from tests.kit.nvme_target import attached, serving
from tests.kit.vfio_user_client import (
    BAR0,
    BAR4,
    CONFIG,
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_IRQ_INFO,
    HEADER,
    INTX,
    MSIX,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    WRITE_MULTI,
    VfioError,
    VfioUserClient,
)
from tests.nvme.test_block import blocks
from tests.nvme.test_long_commands import LARGE


def refused(client, command, payload, fds=()):
    with pytest.raises(VfioError) as caught:
        client.call(command, payload, fds=fds)
    return caught.value.errno


# ---- what QEMU asks ----------------------------------------------------------------------------------------------


def test_the_device_is_pci_can_be_reset_and_has_enough_regions_and_interrupts(client):
    _, flags, regions, irqs = struct.unpack("<IIII", client.call(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
    assert (flags, regions >= 8, irqs >= 3) == (3, True, True)


def test_config_space_is_read_in_one_message_and_names_an_nvme_controller(client):
    config = client.read(CONFIG, 0, 4096)
    assert config[:4] == bytes.fromhex("1d1d 1f1f")
    assert config[9:12] == bytes.fromhex("02 08 01")            # class 010802, least significant byte first
    capabilities, at = [], config[0x34]
    while at:
        capabilities.append(config[at])
        at = config[at + 1]
    assert capabilities == [0x01, 0x11, 0x10]                   # power management, MSI-X, PCI Express


def test_bars_are_sized_by_writing_ones(client):
    for at, size in ((0x10, client.region_info(0)[4]), (0x20, client.region_info(4)[4])):
        client.write(CONFIG, at, b"\xff" * 4)
        found = int.from_bytes(client.read(CONFIG, at, 4), "little")
        assert -(found & ~0xF) & 0xFFFF_FFFF == size


def test_read_only_config_fields_stay(client):
    client.write(CONFIG, 0, bytes(64))
    assert client.read(CONFIG, 0, 4) == bytes.fromhex("1d1d 1f1f")


def test_region_and_interrupt_information(client):
    assert [client.region_info(i)[4] > 0 for i in range(9)] == [True, False, False, False, True, False, False, True,
                                                                False]
    assert client.irq_info(INTX)[1:] == (7, INTX, 1)
    assert client.irq_info(MSIX)[1:] == (1, MSIX, 9)            # EVENTFD only: QEMU then adds vector by vector
    assert client.irq_info(1)[3] == 0


def test_mappable_doorbells_come_with_a_sparse_capability_and_a_descriptor(tmp_path):
    with serving(str(tmp_path / "s"), ("block",), mapped_doorbells=True) as running, \
            VfioUserClient(running.path) as client:
        client.negotiate()
        argsz, flags, _, cap, _, _ = client.region_info(0)
        assert (flags & 0xC, cap) == (4, 0)                     # MMAP without CAPS when argsz leaves no room
        assert client.region_info(0, argsz)[1] & 0xC == 0xC
        assert len(client.received_fds) == 1


def test_mapped_doorbells_are_polled(tmp_path):
    import mmap
    with serving(str(tmp_path / "s"), ("block",), mapped_doorbells=True) as running, attached(running) as host:
        host.client.region_info(0, 64)
        page = mmap.mmap(host.client.received_fds[0], 2 * PAGE)
        queue = host.create_queue()
        queue.host = Mapped(host, page)
        for _ in range(50):
            queue.submit(host.entry(0x02, address=0x10000, count=4096, dwords=bytes(12)))
            assert queue.wait()[0].status == 0


def test_the_admin_doorbell_is_mapped_too_and_nobody_rings_for_it(tmp_path):
    """QEMU maps the whole page, so that a guest's first command arrives as a store."""
    import mmap
    with serving(str(tmp_path / "s"), ("block",), mapped_doorbells=True) as running, attached(running) as host:
        host.client.region_info(0, 64)
        page = mmap.mmap(host.client.received_fds[0], 2 * PAGE)
        host.queues[0].host = Mapped(host, page)
        assert [host.admin(0x06, data=0x10000, dwords=bytes([1])).status for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, (1 << 64) - PAGE])
def test_memory_that_no_file_can_hold_is_refused_and_leaves_no_descriptor(client, size):
    files = len(os.listdir("/proc/self/fd"))
    assert refused(client, DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0, size)) == errno.EINVAL
    assert len(os.listdir("/proc/self/fd")) == files
    assert client.region_info(BAR0)[4]


def test_commands_that_wait_when_a_range_without_descriptor_comes_are_not_forgotten(start):
    """60 MiB of writes are many turns of the reactor; behind the first of them it has to leave the queues to trio."""
    target, host = start(("block",), geometry=LARGE)
    queue, data = host.create_queue(2, 128), host.put(b"x" * (128 * PAGE))
    entries = [host.entry(0x01, address=data, count=128 * PAGE, dwords=blocks(128 * i, 128)) for i in range(120)]
    raw = b"".join(entries)
    host.memory[queue.sq:queue.sq + len(raw)] = raw
    doorbell = struct.pack("<QIII", 0x1000 + 2 * 8, BAR0, 4, len(entries))
    copied = map_payload(1 << 40)
    messages = ((REGION_WRITE, doorbell, NO_REPLY), (DMA_MAP, copied, 0))
    host.client.sock.sendall(b"".join(
        HEADER.pack(500 + i, command, 16 + len(payload), flags, 0) + payload
        for i, (command, payload, flags) in enumerate(messages)))
    host.client.wait_reply(501)
    assert target.server._live.queues.by_message
    assert [done.status for done in queue.wait(120)] == [0] * 120


def test_our_own_doorbells_announced_as_memory_do_not_make_transfers_messages(tmp_path):
    """QEMU sends a DMA_MAP without a descriptor for what it has mapped of BAR0."""
    with serving(str(tmp_path / "s"), ("block",), mapped_doorbells=True) as running, attached(running) as host:
        host.client.write(CONFIG, 0x10, (0xFE00_0004).to_bytes(8, "little"))
        host.client.call(DMA_MAP, map_payload(0xFE00_1000))
        queue = host.create_queue()
        queue.submit(host.entry(0x02, address=0x10000, count=4096, dwords=bytes(12)))
        assert queue.wait()[0].status == 0
        assert not running.server._live.queues.by_message
        assert not host.client.dma_messages


class Mapped:
    """A host whose doorbells are stores into a mapped page."""

    def __init__(self, host, page):
        self.host, self.page = host, page

    def __getattr__(self, name):
        return getattr(self.host, name)

    def doorbell(self, qid, which, value):
        at = PAGE + (2 * qid + which) * 4
        self.page[at:at + 4] = struct.pack("<I", value)


# ---- DMA map -----------------------------------------------------------------------------------------------------


def map_payload(address=0, size=PAGE, offset=0, flags=3, argsz=32):
    return struct.pack("<IIQQQ", argsz, flags, offset, address, size)


@pytest.mark.parametrize(("case", "payload", "code"), [
    ("size 0", map_payload(size=0), errno.EINVAL),
    ("not aligned", map_payload(address=8), errno.EINVAL),
    ("wraps", map_payload(address=(1 << 64) - PAGE, size=2 * PAGE), errno.EINVAL),
    ("beyond the file", map_payload(offset=1 << 40), errno.EINVAL),
    ("no access", map_payload(flags=0), errno.EINVAL),
    ("unknown flags", map_payload(flags=0x100), errno.EINVAL),
])
def test_mappings_that_cannot_be_are_refused(client, case, payload, code):
    assert refused(client, DMA_MAP, payload, (client.memory_fd,)) == code, case


def test_overlapping_mappings_are_refused_and_the_first_stays(client):
    client.map_memory(0, 4 * PAGE)
    assert refused(client, DMA_MAP, map_payload(address=3 * PAGE), (client.memory_fd,)) == errno.EEXIST
    client.unmap_memory(0, 4 * PAGE)


def test_a_descriptor_that_is_no_file_is_refused(client):
    reader, writer = os.pipe()
    assert refused(client, DMA_MAP, map_payload(), (reader,)) == errno.EINVAL
    os.close(reader)
    os.close(writer)


def test_unmapping_needs_whole_mappings(client):
    client.map_memory(0, 4 * PAGE)
    client.map_memory(4 * PAGE, 4 * PAGE, offset=4 * PAGE)
    for address, size in ((0, PAGE), (PAGE, PAGE), (64 * PAGE, PAGE)):
        assert refused(client, DMA_UNMAP, struct.pack("<IIQQ", 24, 0, address, size)) == errno.ENOENT
    client.unmap_memory(0, 8 * PAGE)
    client.map_memory(0, PAGE)
    assert refused(client, DMA_UNMAP, struct.pack("<IIQQ", 24, 2, PAGE, 0)) == errno.EINVAL
    client.call(DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))
    client.map_memory(0, PAGE)


def test_memory_that_goes_away_under_a_queue_stops_it_and_not_the_daemon(target):
    with attached(target) as host:
        queue = host.create_queue()
        host.client.unmap_memory()
        host.doorbell(1, 0, 1)
        while host.read32(0x1C) & 2 == 0:                       # CSTS.CFS, set by a report of the reactor
            pass
        queue.head = 0
    with attached(target) as host:
        host.create_queue()
        assert host.read_blocks(0, 1)[0].status == 0


def test_a_memory_file_that_shrinks_costs_its_client_the_data_only(target):
    with attached(target) as host:
        host.create_queue()
        os.ftruncate(host.client.memory_fd, 1 << 20)
        host.doorbell(1, 0, 1)
        host.read32(0x1C)
    with attached(target) as host:
        host.create_queue()
        assert host.read_blocks(0, 1)[0].status == 0


# ---- interrupts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "fields", "data", "fds"), [
    ("index", (0x24, 7, 0, 1), b"", 1),
    ("start", (0x24, MSIX, 9, 1), b"", 1),
    ("count", (0x24, MSIX, 0, 10), b"", 0),
    ("start + count wraps", (0x24, MSIX, 1, 0xFFFF_FFFF), b"", 0),
    ("two kinds of data", (0x25, MSIX, 0, 1), b"", 1),
    ("no kind of data", (0x20, MSIX, 0, 1), b"", 0),
    ("two actions", (0x34, MSIX, 0, 1), b"", 1),
    ("bool of a wrong length", (0x22, MSIX, 0, 2), b"\1", 0),
    ("fewer descriptors than vectors", (0x24, MSIX, 0, 3), b"", 2),
    ("descriptors without need", (0x21, MSIX, 0, 0), b"", 1),
])
def test_interrupt_settings_that_cannot_be_are_refused(client, case, fields, data, fds):
    opened = tuple(os.eventfd(0) for _ in range(fds))
    payload = struct.pack("<IIIII", 20 + len(data), *fields) + data
    assert refused(client, SET_IRQS, payload, opened) == errno.EINVAL, case
    for fd in opened:
        os.close(fd)


def test_get_irq_info_checks_its_index(client):
    assert refused(client, GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 5, 0)) == errno.EINVAL


# ---- regions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("region", "offset", "count"), [
    (9, 0, 4), (0xFFFF_FFFF, 0, 4), (1, 0, 4), (BAR0, 1 << 20, 4), (BAR0, (1 << 64) - 2, 4), (BAR0, 0, 0),
    (CONFIG, 4095, 2), (CONFIG, 0, 4097), (BAR4, 1 << 30, 4), (BAR0, 0, 0xFFFF_FFFF),
])
def test_reads_outside_a_region_are_refused(client, region, offset, count):
    assert refused(client, REGION_READ, struct.pack("<QII", offset, region, count)) == errno.EINVAL


@pytest.mark.parametrize(("offset", "data"), [(0x14, b"abc"), (0x14, b"a"), (0x15, b"abcd"), (0x1000, bytes(16)),
                                              (0x1001, bytes(4))])
def test_register_writes_of_an_odd_size_or_place_are_refused(client, offset, data):
    assert refused(client, REGION_WRITE, struct.pack("<QII", offset, BAR0, len(data)) + data) == errno.EINVAL


def test_a_write_whose_count_lies_is_refused(client):
    assert refused(client, REGION_WRITE, struct.pack("<QII", 0x14, BAR0, 8) + b"abcd") == errno.EINVAL


def test_several_register_writes_in_one_message(client):
    entries = b"".join(struct.pack("<QII", at, BAR0, 4) + struct.pack("<Q", value) for at, value in ((0x24, 0x70007),
                                                                                                     (0x14, 0x460000)))
    assert client.call(WRITE_MULTI, struct.pack("<Q", 2) + entries) == struct.pack("<Q", 2)
    assert client.read(BAR0, 0x24, 4) == struct.pack("<I", 0x70007)


@pytest.mark.parametrize("payload", [
    struct.pack("<Q", 0), struct.pack("<Q", 1), struct.pack("<Q", 1 << 63), struct.pack("<Q", 201) + bytes(24),
    struct.pack("<QQII", 1, 0x24, BAR0, 9) + bytes(8),
])
def test_bad_write_multi_messages_are_refused(client, payload):
    assert refused(client, WRITE_MULTI, payload) == errno.EINVAL


# ---- life --------------------------------------------------------------------------------------------------------


def test_a_device_reset_disables_the_controller_also_with_commands_waiting(target):
    with attached(target) as host:
        queue = host.create_queue()
        queue.submit(*[host.entry(0x02, address=0x10000, count=4096, dwords=bytes(12)) for _ in range(20)])
        host.client.call(RESET)
        host.client.call(RESET)
        assert host.read32(0x1C) == 0
        host.enable()
        host.create_queue()
        assert host.read_blocks(0, 1)[0].status == 0


def test_the_next_client_gets_the_device_when_the_first_has_left(target):
    for number in range(3):
        with attached(target) as host:
            host.create_queue()
            assert host.write_blocks(number, bytes([number + 1]) * 4096).status == 0
    with attached(target) as host:
        host.create_queue()
        assert host.read_blocks(0, 3)[1] == b"\1" * 4096 + b"\2" * 4096 + b"\3" * 4096


def test_a_second_client_is_turned_away_while_the_first_works(target):
    with attached(target) as host:
        host.create_queue()
        with socket.socket(socket.AF_UNIX) as second:
            second.settimeout(5)
            second.connect(target.path)
            assert second.recv(1) == b""
        assert host.read_blocks(0, 1)[0].status == 0


def open_descriptors(target):
    """Of this process, server included, while one client that has just negotiated is there."""
    with VfioUserClient(target.path) as client:
        client.negotiate()
        gc.collect()                                            # what earlier tests left to be collected
        return len(os.listdir("/proc/self/fd"))


def test_clients_that_die_at_any_point_leave_no_descriptor_behind(target):
    before = open_descriptors(target)
    for cut in range(6):
        _half_a_client(target.path, cut)
    assert open_descriptors(target) == before


def _half_a_client(path, cut):
    """Do the first *cut* steps of a session, then hang up."""
    with VfioUserClient(path) as client:
        host = NvmeHost(client)
        steps = [client.negotiate, client.map_memory, host.enable, host.create_queue,
                 lambda: host.queues[1].submit(host.entry(0x02, address=PAGE, count=4096, dwords=bytes(12)))]
        for step in steps[:cut]:
            step()
        host.close()


@pytest.mark.parametrize("raw", [
    b"", b"\0" * 16, b"\xff" * 16, b"\0" * 15, struct.pack("<HHIII", 1, 1, 20, 0, 0) + bytes(4),
    struct.pack("<HHIII", 1, 4, 32, 0, 0) + bytes(16), struct.pack("<HHIII", 1, 1, 0xFFFF_FFFF, 0, 0),
])
def test_garbage_ends_its_connection_and_nothing_else(target, raw):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(target.path)
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(4096):
            pass
    with attached(target) as host:
        host.create_queue()
        assert host.read_blocks(0, 1)[0].status == 0
