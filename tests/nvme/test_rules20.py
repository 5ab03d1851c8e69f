"""Each rule of OCSSD 2.0 at command level, and each thing that the reference emulator got wrong.

Geometry: 2 groups × 2 PUs × 8 chunks × 64 sectors of 4 KiB, 16 B OOB, ws_min 4, ws_opt 8. So an LBA is
group << 10 | pu << 9 | chunk << 6 | sector.
"""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest

from ocssd_daemon.nvme.raw20 import DESCRIPTOR
from tests.kit.nvme_target import SMALL

SECTOR, CHUNK, PU, GROUP = 1, 1 << 6, 1 << 9, 1 << 10
DULBE = 1 << 16
FREE, CLOSED, OPEN, OFFLINE = 1, 2, 4, 8


def sectors(count, seed=0):
    """Data whose every sector is different."""
    return b"".join((bytes([seed + i & 0xFF]) + b"sector%05d" % i).ljust(4096, b".") for i in range(count))


def oobs(count):
    return b"".join(b"%016d" % i for i in range(count))


def run(first, count):
    return list(range(first, first + count))


def write(host, first, count, **kw):
    return host.vector_write(run(first, count), sectors(count, **kw), oobs(count))


def fill(host, chunk):
    assert write(host, chunk, 64).status == 0


def reset(host, *addresses, mptr=0):
    return host.vector(0x90, list(addresses), mptr=mptr)


def chunk_log(host, nsid=1):
    at = host.allocate(32 * 32)
    done = host.admin(0x02, nsid, data=at, dwords=struct.pack("<IIQ", 0xCA | (32 * 8 - 1) << 16, 0, 0))
    assert done.status == 0
    return np.frombuffer(host.get(at, 32 * 32), DESCRIPTOR)


def set_dulbe(host, on=True):
    assert host.admin(0x09, 1, dwords=struct.pack("<II", 0x05, DULBE if on else 0)).status == 0


# ---- writing -----------------------------------------------------------------------------------------------------


def test_a_vector_write_reads_back_with_its_oob_and_moves_the_write_pointer(start):
    _, host = start()
    assert write(host, 3 * CHUNK, 8).status == 0
    done, data, oob = host.vector_read(run(3 * CHUNK, 8), oob_bytes=16)
    assert (done.status, data, oob) == (0, sectors(8), oobs(8))
    assert chunk_log(host)[3][["state", "wp"]].tolist() == (OPEN, 8)


def test_a_write_without_mptr_leaves_the_oob_alone_and_a_read_without_mptr_returns_data_only(start):
    _, host = start()
    assert host.vector_write(run(0, 4), sectors(4)).status == 0
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status, data) == (0, sectors(4))


def test_one_address_lies_in_the_command_itself(start):
    _, host = start(geometry=msgspec.structs.replace(SMALL, ws_min=1))
    assert host.vector_write([5 * CHUNK], sectors(1)).status == 0
    assert host.vector_read([5 * CHUNK])[1] == sectors(1)


@pytest.mark.parametrize(("case", "addresses", "status"), [
    ("65 addresses", run(0, 65), 0x4002),
    ("a group that is not there", run(2 * GROUP, 4), 0x4280),
    ("far outside", run(1 << 40, 4), 0x4280),
    ("ahead of the write pointer", run(4, 4), 0x42F2),
    ("fewer than ws_min", run(0, 3), 0x4002),
    ("no multiple of ws_min", run(0, 6), 0x4002),
    ("a gap inside the chunk", [0, 1, 2, 3, 8, 9, 10, 11], 0x42F2),
    ("backwards", [3, 2, 1, 0], 0x42F2),
    ("the same sectors twice", run(0, 4) + run(0, 4), 0x42F2),
    ("one good chunk and one bad address", run(0, 4) + run(CHUNK + 4, 4), 0x42F2),
])
def test_a_write_that_breaks_a_rule_is_refused_as_a_whole(start, case, addresses, status):
    _, host = start()
    done = host.vector_write(addresses, sectors(len(addresses)))
    assert done.status == status, case
    assert set(chunk_log(host)["state"]) == {FREE}


def test_a_write_past_the_end_of_a_chunk_is_a_write_fault_for_vector_and_scalar(start):
    _, host = start(geometry=msgspec.structs.replace(SMALL, chunks=6, sectors=56))
    assert write(host, 0, 52).status == 0
    assert write(host, 52, 8).status == 0x4280
    assert host.write_blocks(52, sectors(8)).status == 0x4280
    assert write(host, 52, 4).status == 0


def test_a_write_to_a_closed_or_offline_chunk_is_a_write_fault(start):
    target, host = start()
    fill(host, 0)
    assert write(host, 0, 4).status == 0x4280
    with target.reactor.paused():
        target.media.chunks["state"][1] = OFFLINE
    assert write(host, CHUNK, 4).status == 0x4280


def test_a_vector_over_several_chunks_advances_each_of_them(start):
    _, host = start()
    done = host.vector_write(run(0, 8) + run(PU, 8) + run(GROUP, 8), sectors(24))
    assert done.status == 0
    log = chunk_log(host)
    assert [int(log[i]["wp"]) for i in (0, 8, 16)] == [8, 8, 8]


def test_a_vector_that_runs_over_a_chunk_end_fills_both_chunks(start):
    """The reference advanced only the first chunk, beyond its end, and said success."""
    _, host = start()
    assert write(host, 0, 60).status == 0
    assert host.vector_write(run(60, 12), sectors(12)).status == 0
    log = chunk_log(host)
    assert log[0][["state", "wp"]].tolist() == (CLOSED, 64)
    assert log[1][["state", "wp"]].tolist() == (OPEN, 8)


def test_a_vector_may_visit_a_chunk_twice_if_the_second_visit_goes_on_where_the_first_ended(start):
    _, host = start()
    assert host.vector_write(run(0, 4) + run(CHUNK, 4) + run(4, 4), sectors(12)).status == 0
    assert [int(wp) for wp in chunk_log(host)["wp"][:2]] == [8, 4]


def test_four_writes_to_one_chunk_behind_one_doorbell_all_succeed(start):
    """The reference moved its write pointer only at completion and refused three of the four."""
    _, host = start()
    queue = host.queues[1]
    entries = []
    for i in range(4):
        data = host.put(sectors(4, seed=i))
        dwords = struct.pack("<QHH", host.lba_list(run(4 * i, 4)), 3, 0)
        entries.append(host.entry(0x91, address=data, count=4 * 4096, dwords=dwords))
    queue.submit(*entries)
    assert [done.status for done in queue.wait(4)] == [0, 0, 0, 0]
    assert int(chunk_log(host)[0]["wp"]) == 16


@pytest.mark.parametrize(("limits", "opened"), [({"maxoc": 2}, 2), ({"maxocpu": 1}, 1)])
def test_no_more_chunks_may_be_open_than_maxoc_and_maxocpu_say(start, limits, opened):
    _, host = start(geometry=msgspec.structs.replace(SMALL, **limits))
    statuses = [write(host, i * CHUNK, 4).status for i in range(4)]
    assert statuses == [0] * opened + [0x4280] * (4 - opened)


def test_scalar_writes_obey_the_same_rules(start):
    _, host = start()
    assert host.write_blocks(0, sectors(8)).status == 0
    assert host.write_blocks(0, sectors(8)).status == 0x42F2
    assert host.write_blocks(8, sectors(3)).status == 0x4002
    done, data = host.read_blocks(0, 8)
    assert (done.status, data) == (0, sectors(8))


def test_transfers_beyond_mdts_and_pract_are_invalid_fields(start):
    _, host = start()
    assert host.write_blocks(0, sectors(132)).status == 0x4002            # MDTS 7: 128 pages
    assert host.write_blocks(0, sectors(4), control=0x2000).status == 0x4002


def test_a_random_chunk_may_be_written_anywhere_also_after_a_reset(start):
    """In the reference a random chunk that was reset could never be written again."""
    target, host = start()
    with target.reactor.paused():
        target.media.chunks["type"][0] = 2
    assert write(host, 40, 4).status == 0
    assert host.vector_write([9, 17, 2, 3], sectors(4)).status == 0
    assert reset(host, 0).status == 0
    assert write(host, 20, 4).status == 0
    assert host.vector_read(run(20, 4))[1] == sectors(4)


# ---- reading -----------------------------------------------------------------------------------------------------


def test_what_is_not_written_reads_as_predefined_data_without_dulbe(start):
    """The reference returned LBA 0's content for every unwritten sector."""
    _, host = start()
    fill(host, 0)
    for addresses in (run(CHUNK, 4), run(2 * GROUP, 4), run(1 << 50, 4)):
        done, data, oob = host.vector_read(addresses, oob_bytes=16)
        assert (done.status, data, oob) == (0, bytes(4 * 4096), b"\xff" * 64)


def test_predefined_data_are_ones_with_dlfeat_2(start):
    _, host = start(dlfeat=2)
    assert host.vector_read(run(0, 4))[1] == b"\xff" * 4 * 4096
    assert host.read_blocks(0, 4)[1] == b"\xff" * 4 * 4096


def test_dulbe_makes_unwritten_sectors_an_error_that_names_them(start):
    _, host = start()
    assert write(host, 0, 4).status == 0
    set_dulbe(host)
    done, data, _ = host.vector_read(run(0, 6))
    assert (done.status, done.result) == (0x4287, 0b110000)
    assert data[:4 * 4096] == sectors(4)
    assert host.read_blocks(0, 6)[0].status == 0x4287
    set_dulbe(host, on=False)
    assert host.vector_read(run(0, 6))[0].status == 0


def test_the_last_mw_cunits_sectors_of_an_open_chunk_are_not_readable_until_it_closes(start):
    _, host = start(geometry=msgspec.structs.replace(SMALL, mw_cunits=24))
    set_dulbe(host)
    assert write(host, 0, 32).status == 0
    assert host.vector_read(run(0, 8))[0].status == 0
    assert host.vector_read([8])[0].status == 0x4287
    assert write(host, 32, 32).status == 0
    assert host.vector_read(run(0, 64))[0].status == 0


def test_a_read_of_64_sectors_returns_each_sector_in_its_own_place(start):
    """The reference's bitmap of unreadable sectors took i and i + 32 for the same."""
    _, host = start()
    assert write(host, 0, 40).status == 0
    done, data, _ = host.vector_read(run(0, 64))
    assert done.status == 0
    assert data == sectors(40) + bytes(24 * 4096)


def test_a_readable_sector_behind_an_unreadable_one_is_returned(start):
    _, host = start()
    assert write(host, 0, 4).status == 0
    _, data, _ = host.vector_read([CHUNK, 0, CHUNK + 1, 3])
    whole = sectors(4)
    assert data == bytes(4096) + whole[:4096] + bytes(4096) + whole[3 * 4096:]


def test_the_data_of_an_offline_chunk_cannot_be_read(start):
    target, host = start()
    fill(host, 0)
    with target.reactor.paused():
        target.media.chunks["state"][0] = OFFLINE
    assert host.vector_read(run(0, 4))[1] == bytes(4 * 4096)


def test_verify_and_compare_work_on_flash(start):
    _, host = start()
    assert write(host, 0, 4).status == 0
    dwords = struct.pack("<QH", 0, 3)
    assert host.io(0x0C, dwords=dwords).status == 0
    assert host.io(0x05, address=host.put(sectors(4)), count=4 * 4096, dwords=dwords).status == 0
    assert host.io(0x05, address=host.put(bytes(4 * 4096)), count=4 * 4096, dwords=dwords).status == 0x4285


# ---- reset -------------------------------------------------------------------------------------------------------


def test_a_reset_frees_a_closed_chunk_and_counts_its_wear(start):
    target, host = start()
    fill(host, 0)
    assert reset(host, 0).status == 0
    assert chunk_log(host)[0][["state", "wp"]].tolist() == (FREE, 0)
    assert int(target.media.chunks["pe_cycles"][0]) == 1


def test_a_reset_returns_the_new_descriptors_at_mptr(start):
    _, host = start()
    fill(host, 0)
    fill(host, CHUNK)
    at = host.allocate(64)
    assert reset(host, 0, CHUNK, mptr=at).status == 0
    found = np.frombuffer(host.get(at, 64), DESCRIPTOR)
    assert found[["state", "slba", "cnlb", "wp"]].tolist() == [(FREE, 0, 64, 0), (FREE, CHUNK, 64, 0)]


@pytest.mark.parametrize(("case", "options", "status"), [
    ("free", {}, 0x42C1),
    ("free, multi reset", {"multi_reset": True}, 0),
])
def test_a_free_chunk_is_reset_only_with_multi_reset(start, case, options, status):
    _, host = start(**options)
    assert reset(host, 0).status == status, case


@pytest.mark.parametrize(("early_reset", "status"), [(True, 0), (False, 0x42C1)])
def test_an_open_chunk_is_reset_only_with_early_reset(start, early_reset, status):
    _, host = start(early_reset=early_reset)
    assert write(host, 0, 4).status == 0
    assert reset(host, 0).status == status


def test_a_reset_of_an_offline_chunk_or_of_none_is_refused(start):
    target, host = start()
    with target.reactor.paused():
        target.media.chunks["state"][0] = OFFLINE
    assert reset(host, 0).status == 0x42C0
    assert reset(host, 2 * GROUP).status == 0x42C1


def test_a_reset_list_with_a_failure_in_the_middle_completes_once_and_names_it(start):
    """The reference completed the same command twice, which panics a guest kernel."""
    _, host = start()
    for chunk in (0, 2):
        fill(host, chunk * CHUNK)
    done = reset(host, 0, CHUNK, 2 * CHUNK)
    assert (done.status, done.result) == (0x42C1, 0b010)
    assert host.queues[1].nothing_more()
    assert set(chunk_log(host)["state"]) == {FREE}


def test_an_armed_reset_fault_takes_the_chunk_offline_for_good(start):
    target, host = start()
    fill(host, 0)
    with target.reactor.paused():
        target.media.arm_fault(0, "reset")
    assert reset(host, 0).status == 0x42C1
    found = chunk_log(host)[0]
    assert (int(found["state"]), int(found["wp"])) == (OFFLINE, 0xFFFF_FFFF_FFFF_FFFF)
    assert reset(host, 0).status == 0x42C0


def test_an_armed_write_fault_closes_the_chunk_early_and_names_the_sectors(start):
    target, host = start()
    with target.reactor.paused():
        target.media.arm_fault(0, "write")
    done = write(host, 0, 4)
    assert (done.status, done.result) == (0x2F1, 0xF)
    assert int(chunk_log(host)[0]["state"]) == CLOSED
    assert write(host, 0, 4).status == 0x4280                             # rejected, and nothing underflows
    assert int(chunk_log(host)[0]["wp"]) == 0


def test_wear_does_not_wrap_and_a_worn_out_chunk_goes_offline(start):
    target, host = start(multi_reset=True)
    with target.reactor.paused():
        target.media.chunks["pe_limit"][0] = 300
    for _ in range(299):
        assert reset(host, 0).status == 0
    assert int(chunk_log(host)[0]["wear_index"]) == 254
    assert reset(host, 0).status == 0x42C1
    assert int(chunk_log(host)[0]["state"]) == OFFLINE


# ---- DSM as reset ------------------------------------------------------------------------------------------------


def dsm(host, *ranges, attributes=4):
    data = b"".join(struct.pack("<IIQ", 0, count, slba) for slba, count in ranges)
    return host.io(0x09, address=host.put(data), count=len(data), dwords=struct.pack("<II", len(ranges) - 1,
                                                                                     attributes))


def test_dsm_deallocate_of_a_whole_chunk_is_a_reset(start):
    _, host = start()
    fill(host, 0)
    fill(host, CHUNK)
    assert dsm(host, (0, 64), (CHUNK, 64)).status == 0
    assert set(chunk_log(host)["state"]) == {FREE}


@pytest.mark.parametrize(("case", "range_", "status"), [
    ("not the first sector", (1, 64), 0x4002),
    ("not the chunk's length", (0, 63), 0x4080),
    ("a chunk that is not there", (2 * GROUP, 64), 0x42C1),
    ("a free chunk", (CHUNK, 64), 0x42C1),
])
def test_dsm_refuses_what_is_no_reset(start, case, range_, status):
    _, host = start()
    fill(host, 0)
    assert dsm(host, range_).status == status, case
    assert int(chunk_log(host)[0]["state"]) == CLOSED


def test_dsm_without_the_deallocate_bit_does_nothing(start):
    _, host = start()
    fill(host, 0)
    assert dsm(host, (0, 64), attributes=0).status == 0
    assert int(chunk_log(host)[0]["state"]) == CLOSED


def test_dsm_resets_chunks_of_65536_sectors(start):
    """The reference compared the length in 16 bits, so such a chunk could never be reset."""
    target, host = start(geometry=msgspec.structs.replace(SMALL, groups=1, pus=1, chunks=2, sectors=65536))
    with target.reactor.paused():
        target.media.chunks["state"][0] = CLOSED
        target.media.chunks["wp"][0] = 65536
    assert dsm(host, (0, 65536)).status == 0
    assert int(target.media.chunks["state"][0]) == FREE


# ---- copy --------------------------------------------------------------------------------------------------------


def copy(host, sources, targets):
    return host.vector(0x93, sources, destination=host.lba_list(targets))


def test_a_vector_copy_moves_data_and_oob_inside_the_device(start):
    _, host = start()
    assert write(host, 0, 8).status == 0
    assert copy(host, [7, 6, 1, 0], run(GROUP, 4)).status == 0
    _, data, oob = host.vector_read(run(GROUP, 4), oob_bytes=16)
    whole = sectors(8)
    assert data == b"".join(whole[i * 4096:(i + 1) * 4096] for i in (7, 6, 1, 0))
    assert oob == b"".join(b"%016d" % i for i in (7, 6, 1, 0))


def test_a_copy_obeys_the_write_rules_and_needs_readable_sources(start):
    _, host = start()
    assert write(host, 0, 8).status == 0
    assert copy(host, run(0, 4), run(CHUNK + 4, 4)).status == 0x42F2
    done = copy(host, [0, 1, 40, 2], run(CHUNK, 4))
    assert (done.status, done.result) == (0x4281, 0b100)
    assert int(chunk_log(host)[1]["state"]) == FREE


# ---- geometry and logs -------------------------------------------------------------------------------------------


def test_a_namespace_number_that_does_not_exist_is_refused_by_geometry_and_chunk_log(start):
    _, host = start()
    at = host.allocate(4096)
    for nsid in (0, 2, 0xFFFF_FFFF):
        assert host.admin(0xE2, nsid, data=at).status == 0x400B
        assert host.admin(0x02, nsid, data=at, dwords=struct.pack("<IIQ", 0xCA | 7 << 16, 0, 0)).status == 0x400B


def test_the_chunk_log_is_read_from_any_64_bit_offset_and_not_beyond_its_end(start):
    _, host = start()
    fill(host, 5 * CHUNK)
    at = host.allocate(4096)

    def read(offset, length):
        return host.admin(0x02, 1, data=at, dwords=struct.pack("<IIQ", 0xCA | (length // 4 - 1) << 16, 0, offset))
    assert read(5 * 32, 32).status == 0
    assert host.get(at, 1) == bytes([CLOSED])
    assert read(31 * 32, 64).status == 0x4002
    assert read(1 << 33, 32).status == 0x4002
    assert read(2, 32).status == 0x4002


def test_address_fields_are_as_wide_as_the_counts_need_and_empty_for_a_count_of_one(start):
    _, host = start(geometry=msgspec.structs.replace(SMALL, groups=1, pus=1, chunks=1))
    at = host.allocate(4096)
    assert host.admin(0xE2, 1, data=at).status == 0
    assert host.get(at + 8, 4) == bytes([0, 0, 0, 6])


def test_a_chunk_of_a_pu_that_the_host_ftl_owns_looks_offline_and_takes_no_command(start):
    _, host = start(foreign=np.array([0, 1, 0, 0], np.uint8))
    log = chunk_log(host)
    assert [int(state) for state in log["state"]] == [FREE] * 8 + [OFFLINE] * 8 + [FREE] * 16
    assert write(host, PU, 4).status == 0x4280
    assert reset(host, PU).status == 0x42C0
    assert write(host, GROUP, 4).status == 0


def test_wear_outside_the_threshold_is_notified_by_event_and_log(start):
    target, host = start(wear_threshold=10, multi_reset=True)
    with target.reactor.paused():
        target.media.chunks["pe_limit"][3] = 1000
        target.media.chunks["pe_cycles"][3] = 80
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    assert reset(host, 3 * CHUNK).status == 0
    assert admin.wait()[0].result == 7 | 0xD0 << 16                       # vendor event, information 0, log page D0h
    at = host.allocate(4096)
    assert host.admin(0x02, 1, data=at, dwords=struct.pack("<IIQ", 0xD0 | 1023 << 16, 0, 0)).status == 0
    count, lba, nsid, state, mask = struct.unpack_from("<QQIHB", host.get(at, 64))
    assert (count, lba, nsid, state, mask) == (1, 3 * CHUNK, 1, 1 << 8, 2)
