"""Each rule of OCSSD 1.2 at command level.

Flash: 2 groups × 2 PUs × 8 chunks × 64 sectors, ws_min 4, seen as 2 channels × 2 LUNs × 2 planes × 4 blocks × 16 pages
of 4 sectors. So a PPA is channel << 10 | LUN << 9 | block << 7 | page << 3 | plane << 2 | sector.
"""

from __future__ import annotations

import struct

import pytest

from ocssd_daemon.nand.aging import mark_bad
from tests.nvme.test_rules20 import oobs, sectors

PLANE, PAGE, BLOCK, LUN, CHANNEL = 1 << 2, 1 << 3, 1 << 7, 1 << 9, 1 << 10
DUAL = 1


def page(number, block=0, planes=(0, 1)):
    """The PPAs of one page in *planes*."""
    return [block * BLOCK + number * PAGE + plane * PLANE + sector for plane in planes for sector in range(4)]


@pytest.fixture
def host(start):
    return start(("ocssd12",), planes=2)[1]


def write(host, ppas, seed=0):
    return host.vector_write(ppas, sectors(len(ppas), seed), oobs(len(ppas)))


def erase(host, *ppas, mode=0):
    return host.vector(0x90, list(ppas), control=mode)


def table(host, ppa):
    at = host.allocate(4096)
    done = host.admin(0xF2, 1, data=at, dwords=struct.pack("<Q", ppa))
    return done.status, host.get(at, 64 + 8)


def mark(host, ppas, value):
    dwords = struct.pack("<QHB", host.lba_list(ppas), len(ppas) - 1, value)
    return host.admin(0xF1, 1, dwords=dwords).status


def test_identify_describes_planes_pages_and_the_address_format(host):
    at = host.allocate(4096)
    assert host.admin(0xE2, 1, data=at).status == 0
    assert host.get(at, 4) == bytes([1, 0, 1, 0])                       # version 1.2, one group
    # channel, LUN, plane, block, page, sector: offset and length
    assert host.get(at + 12, 12) == bytes([10, 1, 9, 1, 2, 1, 7, 2, 3, 4, 0, 2])
    group = host.get(at + 256, 54)
    assert (group[4], group[5], group[6]) == (2, 2, 2)
    assert struct.unpack_from("<HHHHH", group, 8) == (4, 16, 16384, 4096, 16)
    assert struct.unpack_from("<I", group, 44) == (0x020202,)


def test_pages_are_written_and_read_with_their_oob(host):
    assert write(host, page(0)).status == 0
    done, data, oob = host.vector_read(page(0), oob_bytes=16)
    assert (done.status, data, oob) == (0, sectors(8), oobs(8))


def test_planes_of_a_block_are_written_independently(host):
    assert write(host, page(0, planes=(1,))).status == 0
    assert write(host, page(1, planes=(1,))).status == 0
    assert write(host, page(0, planes=(0,))).status == 0


def test_pages_of_a_block_are_written_in_order_and_once(host):
    """The reference accepted page 5 and then page 2."""
    assert write(host, page(5)).status == 0x4002
    assert write(host, page(0)).status == 0
    assert write(host, page(0)).status == 0x4002


def test_less_than_a_page_and_more_than_64_addresses_are_refused(host):
    assert write(host, page(0)[:3]).status == 0x4002
    assert write(host, page(0) * 9).status == 0x4002


def test_an_address_outside_is_refused_and_never_wraps_onto_another_lun(start):
    import msgspec

    from tests.kit.nvme_target import SMALL
    _, host = start(("ocssd12",), planes=2, geometry=msgspec.structs.replace(SMALL, chunks=6))
    assert write(host, page(0, block=3)).status == 0x4080                # blocks 0–2 exist, the field has two bits
    assert write(host, [ppa + (1 << 20) for ppa in page(0)]).status == 0x4080


def test_a_read_of_an_erased_page_fails_as_empty_page_and_names_the_sectors(host):
    assert write(host, page(0, planes=(0,))).status == 0
    done, data, _ = host.vector_read(page(0))
    assert (done.status, done.result) == (0x42FF, 0xF0)
    assert data[:4 * 4096] == sectors(4)


def test_an_erase_with_a_plane_mode_erases_every_plane(host):
    assert write(host, page(0)).status == 0
    assert erase(host, 0, mode=DUAL).status == 0
    assert host.vector_read(page(0))[0].result == 0xFF
    assert write(host, page(0)).status == 0


def test_an_erase_in_single_plane_mode_erases_one_plane(host):
    assert write(host, page(0)).status == 0
    assert erase(host, PLANE).status == 0
    assert host.vector_read(page(0))[0].result == 0xF0


def test_an_erased_block_may_be_erased_again(host):
    assert erase(host, 0, mode=DUAL).status == 0
    assert erase(host, 0, PLANE, mode=DUAL).status == 0


@pytest.mark.parametrize(("slba", "count", "status"), [
    (0, 512, 0), (2048 - 2, 2, 0), (2048 - 1, 2, 0x4002), ((1 << 64) - 1, 2, 0x4002), (0, 0, 0x4002),
    (0, 0xFFFF_FFFF, 0x4002),
])
def test_the_devices_map_is_read_and_has_nothing_in_it_because_the_host_keeps_it(host, slba, count, status):
    at = host.put(b"\xa5" * 4096)
    assert host.admin(0xEA, 1, data=at, dwords=struct.pack("<QI", slba, count)).status == status
    read = 0 if status else count * 8
    assert host.get(at, 4096) == b"\xff" * read + b"\xa5" * (4096 - read)


def test_a_20_namespace_has_no_map_to_read(start):
    _, host = start(("ocssd20",))
    assert host.admin(0xEA, 1, data=host.allocate(4096), dwords=struct.pack("<QI", 0, 1)).status == 0x4001


def test_the_bad_block_table_has_a_byte_per_block_and_plane(host):
    status, raw = table(host, LUN)
    assert status == 0
    assert raw[:6] == b"BBLT\x01\x00"
    assert struct.unpack_from("<I", raw, 12) == (8,)
    assert raw[64:] == bytes(8)


def test_a_block_that_the_host_marks_bad_shows_in_its_lun_and_is_not_erased(host):
    assert mark(host, [LUN + 2 * BLOCK, LUN + 2 * BLOCK + PLANE], 2) == 0
    assert table(host, LUN)[1][64:] == bytes([0, 0, 0, 0, 2, 2, 0, 0])
    assert struct.unpack_from("<I", table(host, LUN)[1], 20) == (2,)     # grown bad blocks
    assert table(host, 0)[1][64:] == bytes(8)
    assert erase(host, LUN + 2 * BLOCK, mode=DUAL).status == 0x4002
    assert mark(host, [LUN + 2 * BLOCK], 0) == 0
    assert erase(host, LUN + 2 * BLOCK).status == 0


def test_factory_bad_blocks_and_grown_ones_are_told_apart(start):
    target, host = start(("ocssd12",), planes=2)
    with target.reactor.paused():
        mark_bad(target.media.chunks, [2])
        target.media.chunks["state"][5] = 8
    status, raw = table(host, 0)
    assert (status, raw[64:]) == (0, bytes([0, 0, 1, 0, 0, 2, 0, 0]))
    assert struct.unpack_from("<II", raw, 16) == (1, 1)                  # bad from the factory, grown


def test_marks_that_do_not_exist_and_luns_that_do_not_exist_are_refused(host):
    assert mark(host, [0], 7) == 0x4002
    assert mark(host, [1 << 20], 1) == 0x4002
    assert table(host, 1 << 20)[0] == 0x4002


def test_a_program_that_fails_is_a_failed_write_and_an_erase_that_fails_a_grown_bad_block(start):
    target, host = start(("ocssd12",), planes=2)
    with target.reactor.paused():
        target.media.arm_fault(0, "write")
    done = write(host, page(0))
    assert (done.status, done.result) == (0x40FF, 0x0F)
    assert erase(host, 0).status == 0x40FF                               # after a failed program the erase fails too
    assert table(host, 0)[1][64:66] == bytes([2, 0])


def test_scalar_reads_serve_a_partition_scan(host):
    """Linux reads the first blocks of the namespace; in the reference that used freed memory."""
    done, data = host.read_blocks(0, 8)
    assert (done.status, data) == (0, bytes(8 * 4096))


def test_a_20_command_and_log_do_not_exist_in_12(host):
    at = host.allocate(4096)
    assert host.vector(0x93, page(0)[:4], destination=0).status == 0x4001
    assert host.admin(0x02, 1, data=at, dwords=struct.pack("<IIQ", 0xCA | 7 << 16, 0, 0)).status == 0x4109
