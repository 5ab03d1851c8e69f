"""What a hostile vfio-user client may send, by the numbers of the matrix (VF-…), where it takes a controller to see it.

Framing is in tests/unit/test_vfio_user_session.py; what QEMU itself does is in test_vfio_user.py.
"""

from __future__ import annotations

import array
import errno
import os
import random
import socket
import struct

import pytest

from ocssd_daemon.transport import vfio_memory, vfio_user
from tests.kit.nvme_host import ACQ, AQA, ASQ, CC, CC_ENABLE, CSTS, PAGE, NvmeHost
from tests.kit.nvme_target import attached, serving
from tests.kit.vfio_user_client import (
    BAR0,
    BAR4,
    CONFIG,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    ERROR,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    HEADER,
    INTX,
    MSIX,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    RESET,
    SET_IRQS,
    WRITE_MULTI,
    VfioError,
    VfioUserClient,
)
from tests.nvme.test_block import blocks
from tests.nvme.test_vfio_user import map_payload, open_descriptors, refused

GOOD = {
    DMA_UNMAP: struct.pack("<IIQQ", 24, 2, 0, 0), GET_INFO: struct.pack("<IIII", 16, 0, 0, 0),
    GET_REGION_INFO: struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0), GET_IRQ_INFO: struct.pack("<IIII", 16, 0, MSIX, 0),
    REGION_READ: struct.pack("<QII", 0, CONFIG, 4), REGION_WRITE: struct.pack("<QIII", 0x14, BAR0, 4, 0), RESET: b"",
    WRITE_MULTI: struct.pack("<QQIIQ", 1, 0x14, BAR0, 4, 0),
}


def works(target):
    """Does the next client get a disk?"""
    with attached(target) as host:
        host.create_queue()
        return host.read_blocks(0, 1)[0].status == 0


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["socket", "directory", "eventfd"])
def test_vf_09_memory_must_be_a_file(target, client, tmp_path, kind):
    made = {"socket": lambda: socket.socket(socket.AF_UNIX).detach(), "eventfd": lambda: os.eventfd(0),
            "directory": lambda: os.open(tmp_path, os.O_RDONLY)}[kind]()
    assert refused(client, DMA_MAP, map_payload(), (made,)) == errno.EINVAL
    os.close(made)
    client.map_memory()


def test_vf_09_a_file_that_cannot_be_written_is_not_mapped_for_writing(client):
    readable = os.open(f"/proc/self/fd/{client.memory_fd}", os.O_RDONLY)
    assert refused(client, DMA_MAP, map_payload(flags=3), (readable,)) == errno.EINVAL
    client.call(DMA_MAP, map_payload(flags=1), fds=(readable,))
    os.close(readable)


def test_vf_09_there_are_as_many_mappings_as_promised(client, monkeypatch):
    monkeypatch.setattr(vfio_memory, "MAX_DMA_MAPS", 3)
    for number in range(3):
        client.map_memory(number * PAGE, PAGE)
    assert refused(client, DMA_MAP, map_payload(address=3 * PAGE), (client.memory_fd,)) == errno.ENOSPC
    client.unmap_memory(0, PAGE)
    client.map_memory(3 * PAGE, PAGE)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, (1 << 64) - PAGE])
def test_vf_09_a_range_without_a_file_that_no_memory_can_hold_is_refused(target, client, size):
    before = len(os.listdir("/proc/self/fd"))
    assert refused(client, DMA_MAP, map_payload(size=size)) == errno.EINVAL
    assert len(os.listdir("/proc/self/fd")) == before
    client.map_memory()


# ---- information -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "argsz"), [(9, 32), (0xFFFF_FFFF, 32), (0, 31), (0, 0)])
def test_vf_12_region_information_checks_index_and_room(client, index, argsz):
    assert refused(client, GET_REGION_INFO, struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)) == errno.EINVAL


def test_vf_12_more_room_than_there_can_be_is_no_more_data(client):
    assert client.region_info(BAR0, 0xFFFF_FFFF)[0] == 32


# ---- interrupts --------------------------------------------------------------------------------------------------


def test_vf_14_more_descriptors_than_interrupts(client):
    fds = tuple(os.eventfd(0) for _ in range(2))
    assert refused(client, SET_IRQS, struct.pack("<IIIII", 20, 0x24, MSIX, 0, 1), fds) == errno.EINVAL
    for fd in fds:
        os.close(fd)


def test_vf_14_a_descriptor_that_takes_no_signal_costs_its_client_the_interrupt_only(target):
    with attached(target) as host:
        queue = host.create_queue()
        for number in range(2):
            reader, writer = os.pipe()
            broken = writer if number else reader       # one that cannot be written, one whose other end is gone
            os.close(writer if broken == reader else reader)
            host.client.set_irqs(0x24, MSIX, 1, 1, fds=(broken,))
            os.close(broken)
            queue.submit(host.entry(0x02, address=0x10000, count=4096, dwords=blocks(0, 1)))
            while (done := queue.poll()) is None:
                host.read32(CSTS)
            assert done.status == 0
            host.doorbell(1, 1, queue.head)


# ---- regions -----------------------------------------------------------------------------------------------------


def test_vf_15_pending_bits_are_read_only_and_the_table_is_not(client):
    size = client.region_info(BAR4)[4]
    table = 9 * 16
    client.write(BAR4, 0, b"\xff" * table)
    client.write(BAR4, PAGE, b"\xff" * (size - PAGE))
    assert client.read(BAR4, 0, table) == b"\xff" * table
    assert client.read(BAR4, PAGE, size - PAGE) == bytes(size - PAGE)


def test_vf_15_read_only_bits_of_every_capability_stay(client):
    before = client.read(CONFIG, 0, 4096)
    client.write(CONFIG, 0x40, b"\xff" * (0x68 - 0x40))          # up to Device Control, where the reset bit is
    client.write(CONFIG, 0x6A, b"\xff" * (4096 - 0x6A))
    after = client.read(CONFIG, 0, 4096)
    changed = {at for at in range(4096) if after[at] != before[at]}
    assert changed <= {0x44, 0x53, 0x70, 0x71}                  # power state, MSI-X control, link control
    assert after[0x44] == before[0x44] | 3


def test_vf_15_more_than_the_largest_transfer_ends_the_connection(target):
    with VfioUserClient(target.path) as client:
        client.negotiate()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            client.call(REGION_WRITE, struct.pack("<QII", 0, CONFIG, 2 << 20) + bytes(2 << 20))
    assert works(target)


# ---- DMA messages ------------------------------------------------------------------------------------------------



@pytest.fixture
def private(target):
    """A client without shared memory, its queue at work."""
    with attached(target, shared=False) as host:
        host.create_queue()
        yield host


def next_dma_read(host):
    """Answer everything up to the fetch of an I/O command; ``(id, address, count)`` of that."""
    while True:
        number, command, _, _, payload = host.client.receive()
        address, count = struct.unpack_from("<QQ", payload)
        if command == DMA_READ and address == host.queues[1].sq:
            return number, address, count
        host.client._serve_dma(number, command, payload)


def dead(host):
    """Wait for the controller to have given up; the client answers no DMA message any more."""
    while not host.read32(CSTS) & 2:
        pass
    return True


@pytest.mark.parametrize("case", ["error", "short", "long", "another place", "never"])
def test_vf_18_a_queue_that_cannot_be_read_is_a_fatal_state_and_a_reset_mends_it(target, private, monkeypatch, case):
    if case == "never":
        monkeypatch.setattr(vfio_user, "DMA_REPLY_S", 0.2)
    private.doorbell(1, 0, 1)
    number, address, count = next_dma_read(private)
    replies = {
        "error": HEADER.pack(number, DMA_READ, 16, REPLY | ERROR, errno.EFAULT),
        "short": HEADER.pack(number, DMA_READ, 32, REPLY, 0) + struct.pack("<QQ", address, count),
        "long": HEADER.pack(number, DMA_READ, 32 + 65, REPLY, 0) + struct.pack("<QQ", address, 65) + bytes(65),
        "another place": HEADER.pack(number, DMA_READ, 32 + count, REPLY, 0) + struct.pack("<QQ", 0, count)
                         + bytes(count),
        "never": b"",
    }
    private.client.sock.sendall(replies[case])
    assert dead(private)
    monkeypatch.undo()
    private.write32(CC, 0)
    private.enable()
    private.create_queue()
    assert private.read_blocks(0, 1)[0].status == 0


def test_vf_18_an_answer_to_nothing_ends_the_connection(target):
    with attached(target, shared=False) as host:
        host.client.sock.sendall(HEADER.pack(999, DMA_READ, 32, REPLY, 0) + bytes(16))
        with pytest.raises((ConnectionError, BrokenPipeError)):
            host.read32(CSTS)
    assert works(target)


def test_vf_18_commands_may_come_between_a_dma_message_and_its_answer(private):
    private.queues[1].submit(private.entry(0x02, address=0x100000, count=4096, dwords=blocks(0, 1)))
    number, address, count = next_dma_read(private)
    for _ in range(10):
        assert private.read32(CSTS) & 3 == 1
    private.client._serve_dma(number, DMA_READ, struct.pack("<QQ", address, count))
    assert private.queues[1].wait()[0].status == 0


# ---- doorbells and queues ----------------------------------------------------------------------------------------


def test_vf_19_a_mapped_page_full_of_garbage_harms_nobody_else(tmp_path):
    import mmap
    chance = random.Random(3)
    with serving(str(tmp_path / "s"), ("block",), mapped_doorbells=True) as running:
        with attached(running) as host:
            host.client.region_info(0, 64)
            with mmap.mmap(host.client.received_fds[0], 2 * PAGE) as page:
                host.create_queue()
                for _ in range(200):
                    page[PAGE:] = chance.randbytes(PAGE)
                    host.read32(CSTS)
            os.close(host.client.received_fds[0])
        with attached(running) as host:
            host.client.region_info(0, 64)
            page = mmap.mmap(host.client.received_fds[0], 2 * PAGE)
            assert page[PAGE:] == bytes(PAGE)                   # a new page: nothing of the last client is left
            page.close()


def test_vf_20_a_prp_list_whose_last_entry_is_itself_ends(target):
    with attached(target) as host:
        host.create_queue()
        at = host.allocate(PAGE)
        host.memory[at:at + PAGE] = struct.pack("<512Q", *[0x100000] * 511, at)
        last = at + PAGE - 8                                    # a list of one entry, which says that it goes on here
        host.memory[last:last + 8] = struct.pack("<Q", last)
        entry = host.entry(0x02, address=0x100000, dwords=blocks(0, 8))
        host.queues[1].submit(entry[:32] + struct.pack("<Q", last) + entry[40:])
        assert host.queues[1].wait()[0].status in (0x4013, 0x4004)
        assert host.read_blocks(0, 1)[0].status == 0


def test_vf_20_data_in_the_controllers_own_registers_is_a_transfer_error(target):
    with attached(target) as host:
        host.create_queue()
        host.client.write(CONFIG, 0x10, (0xFE00_0004).to_bytes(8, "little"))
        assert host.io(0x02, address=0xFE00_0000, count=4096, dwords=blocks(0, 1)).status == 0x4004
        assert host.read32(CSTS) & 3 == 1


@pytest.mark.parametrize("cc", [CC_ENABLE | 1 << 4, CC_ENABLE | 7 << 4, CC_ENABLE | 1 << 11, CC_ENABLE | 0xF << 7])
def test_vf_20_reserved_values_of_cc_are_a_fatal_state(client, cc):
    client.map_memory()
    host = NvmeHost(client)
    for register, value in ((AQA, 0x1F001F), (ASQ, PAGE), (ACQ, 2 * PAGE), (CC, cc)):
        host.write32(register, value)
    assert host.read32(CSTS) & 3 == 2
    host.write32(CC, 0)
    host.enable()


# ---- descriptors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", GOOD)
def test_vf_21_descriptors_on_a_message_that_takes_none_are_refused_and_closed(target, command):
    before = open_descriptors(target)
    with VfioUserClient(target.path) as client:
        client.negotiate()
        client.map_memory()
        fds = tuple(os.eventfd(0) for _ in range(3))
        assert refused(client, command, GOOD[command], fds) == errno.EINVAL
        client.call(command, GOOD[command])
        for fd in fds:
            os.close(fd)
    assert open_descriptors(target) == before


def test_vf_21_more_descriptors_than_fit_end_the_connection_and_are_closed(target):
    before = open_descriptors(target)
    with VfioUserClient(target.path) as client:
        client.negotiate()
        fd = os.eventfd(0)
        raw = HEADER.pack(9, RESET, 16, 0, 0)
        client.sock.sendmsg([raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * 253))])
        with pytest.raises((ConnectionError, BrokenPipeError, VfioError)):
            client.wait_reply(9)
        os.close(fd)
    assert open_descriptors(target) == before
    assert works(target)


def test_vf_17_a_function_reset_during_io_leaves_a_controller_that_can_be_enabled(target):
    with attached(target) as host:
        queue = host.create_queue()
        for _ in range(3):
            queue.submit(*[host.entry(0x02, address=0x100000, count=4096, dwords=blocks(0, 1)) for _ in range(20)])
            host.client.write(CONFIG, 0x68, (1 << 15 | 0x2810).to_bytes(2, "little"))   # Initiate Function Level Reset
            assert host.read32(CSTS) == 0
            assert int.from_bytes(host.client.read(CONFIG, 0x68, 2), "little") >> 15 == 0
            host.client.set_irqs(0x21, INTX, 0, 0)
            host.enable()
            queue = host.create_queue()
        assert host.read_blocks(0, 1)[0].status == 0
