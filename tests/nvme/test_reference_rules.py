"""Every rule, and every bug, that was observed of the earlier emulator has a test. ``RULES`` says which; those that no
other file has are below it. Where that emulator and the specification disagree, the specification's answer is expected.
"""

from __future__ import annotations

import importlib
import struct

import msgspec
import pytest

from tests.kit.nvme_target import SMALL
from tests.nvme.test_block import blocks
from tests.nvme.test_ownership import shared
from tests.nvme.test_rules12 import erase, page
from tests.nvme.test_rules12 import write as write_12
from tests.nvme.test_rules20 import (
    CHUNK,
    CLOSED,
    FREE,
    OFFLINE,
    chunk_log,
    copy,
    dsm,
    fill,
    oobs,
    reset,
    run,
    sectors,
    set_dulbe,
    write,
)

T20, T12, BLOCK, STATE, HERE = "test_rules20", "test_rules12", "test_block", "test_state_files", "test_reference_rules"
RULES = [
    # writes, vector and scalar
    ("more than 64 addresses: invalid field", T20, "a_write_that_breaks_a_rule_is_refused_as_a_whole"),
    ("… and nothing is freed twice: the controller goes on", HERE, "after_each_refused_command_the_next_one_works"),
    ("more than MDTS: invalid field", T20, "transfers_beyond_mdts_and_pract_are_invalid_fields"),
    ("more than MDTS, as a vector", HERE, "a_vector_beyond_mdts_is_an_invalid_field"),
    ("PRACT without protection: invalid field", HERE, "pract_is_an_invalid_field_of_vector_commands_too"),
    ("address outside: write fault", T20, "a_write_that_breaks_a_rule_is_refused_as_a_whole"),
    ("chunk offline or closed: write fault", T20, "a_write_to_a_closed_or_offline_chunk_is_a_write_fault"),
    ("past the end: write fault", T20, "a_write_past_the_end_of_a_chunk_is_a_write_fault_for_vector_and_scalar"),
    ("a random chunk may be written when free", T20, "a_random_chunk_may_be_written_anywhere_also_after_a_reset"),
    ("no multiple of ws_min: invalid field", T20, "scalar_writes_obey_the_same_rules"),
    ("not at the write pointer: out of order", T20, "scalar_writes_obey_the_same_rules"),
    ("not consecutive in a chunk: out of order", T20, "a_write_that_breaks_a_rule_is_refused_as_a_whole"),
    ("host memory that is not there: transfer error", HERE, "memory_that_is_not_there_is_a_transfer_error"),
    ("several writes of one chunk may be queued", T20, "four_writes_to_one_chunk_behind_one_doorbell_all_succeed"),
    ("a vector over a chunk's end fills both", T20, "a_vector_that_runs_over_a_chunk_end_fills_both_chunks"),
    ("open at the first write, closed when full", T20, "a_vector_that_runs_over_a_chunk_end_fills_both_chunks"),
    ("a plain disk checks its range", BLOCK, "bad_fields_are_refused"),
    ("no more chunks open than maxoc", T20, "no_more_chunks_may_be_open_than_maxoc_and_maxocpu_say"),
    # reads
    ("closed and below the write pointer is readable", HERE, "a_chunk_that_was_closed_early_reads_up_to_its_end"),
    ("mw_cunits before the write pointer are not", T20,
     "the_last_mw_cunits_sectors_of_an_open_chunk_are_not_readable_until_it_closes"),
    ("the rest is predefined data", T20, "what_is_not_written_reads_as_predefined_data_without_dulbe"),
    ("ones with DLFEAT 2", T20, "predefined_data_are_ones_with_dlfeat_2"),
    ("287h with DULBE", T20, "dulbe_makes_unwritten_sectors_an_error_that_names_them"),
    ("unwritten sectors are not LBA 0's data", T20, "what_is_not_written_reads_as_predefined_data_without_dulbe"),
    ("sectors i and i + 32 are two", T20, "a_read_of_64_sectors_returns_each_sector_in_its_own_place"),
    ("a good sector behind a bad one", T20, "a_readable_sector_behind_an_unreadable_one_is_returned"),
    ("scalar: written sectors behind unwritten ones", HERE, "a_scalar_read_returns_each_sector_by_itself"),
    ("offline data cannot be read", T20, "the_data_of_an_offline_chunk_cannot_be_read"),
    ("no OOB without MPTR", T20, "a_write_without_mptr_leaves_the_oob_alone_and_a_read_without_mptr_returns_data_only"),
    # resets
    ("address outside: invalid reset", T20, "a_reset_of_an_offline_chunk_or_of_none_is_refused"),
    ("any sector of the chunk; the neighbour stays", HERE, "a_reset_by_any_sector_takes_that_chunk_and_no_other"),
    ("more than 64 addresses", HERE, "a_reset_has_at_most_64_addresses"),
    ("DSM: not the first sector, not the length", T20, "dsm_refuses_what_is_no_reset"),
    ("DSM: 65536 sectors and more", T20, "dsm_resets_chunks_of_65536_sectors"),
    ("DSM: open, offline", HERE, "dsm_has_the_statuses_of_a_reset"),
    ("DSM: a failure in the middle, once", HERE, "a_dsm_with_a_failure_in_the_middle_completes_once"),
    ("free: only with MCCAP bit 1", T20, "a_free_chunk_is_reset_only_with_multi_reset"),
    ("open: only with early reset", T20, "an_open_chunk_is_reset_only_with_early_reset"),
    ("offline: 2C0h", T20, "a_reset_of_an_offline_chunk_or_of_none_is_refused"),
    ("a failing one: offline", T20, "an_armed_reset_fault_takes_the_chunk_offline_for_good"),
    ("… also after a restart", HERE, "a_chunk_that_failed_is_offline_after_a_restart"),
    ("wear does not wrap", T20, "wear_does_not_wrap_and_a_worn_out_chunk_goes_offline"),
    ("a failure in the middle completes once", T20,
     "a_reset_list_with_a_failure_in_the_middle_completes_once_and_names_it"),
    ("DSM without the AD bit does nothing", T20, "dsm_without_the_deallocate_bit_does_nothing"),
    # faults
    ("a write fault marks from its sector on", STATE, "a_write_fault_strikes_at_its_sector"),
    ("… and never underflows the write pointer", STATE, "a_write_fault_strikes_at_its_sector"),
    ("a reset fault", STATE, "a_reset_fault_takes_its_chunk_offline_and_no_other"),
    # logs
    ("chunk log: beyond the end, any offset", T20,
     "the_chunk_log_is_read_from_any_64_bit_offset_and_not_beyond_its_end"),
    ("chunk log and geometry: namespace numbers", T20,
     "a_namespace_number_that_does_not_exist_is_refused_by_geometry_and_chunk_log"),
    ("notifications exist", T20, "wear_outside_the_threshold_is_notified_by_event_and_log"),
    # OCSSD 1.2
    ("1.2: more than 64, less than a page", T12, "less_than_a_page_and_more_than_64_addresses_are_refused"),
    ("1.2: an address outside never wraps", T12, "an_address_outside_is_refused_and_never_wraps_onto_another_lun"),
    ("1.2: all ones is no address", HERE, "in_12_all_ones_is_no_address"),
    ("1.2: a written page is written once, in order", T12, "pages_of_a_block_are_written_in_order_and_once"),
    ("1.2: a refused write leaves nothing behind", HERE, "in_12_a_refused_write_leaves_no_sector_and_no_oob"),
    ("1.2: empty page, with its sectors", T12, "a_read_of_an_erased_page_fails_as_empty_page_and_names_the_sectors"),
    ("1.2: plane modes that the flash does not have", HERE,
     "in_12_a_plane_mode_of_more_planes_than_there_are_is_refused"),
    ("1.2: a bad block is not erased", T12, "a_block_that_the_host_marks_bad_shows_in_its_lun_and_is_not_erased"),
    ("1.2: an erased block may be erased", T12, "an_erased_block_may_be_erased_again"),
    ("1.2: a failed program", T12, "a_program_that_fails_is_a_failed_write_and_an_erase_that_fails_a_grown_bad_block"),
    ("1.2: an erase takes all planes of its mode", T12, "an_erase_with_a_plane_mode_erases_every_plane"),
    ("1.2: a partition scan", T12, "scalar_reads_serve_a_partition_scan"),
    # the device
    ("CC is kept while disabled", "test_admin", "cc_is_kept_while_the_controller_is_disabled"),
]


@pytest.mark.parametrize(("rule", "module", "name"), RULES, ids=[rule for rule, *_ in RULES])
def test_a_rule_has_its_test(rule: str, module: str, name: str) -> None:
    assert callable(getattr(importlib.import_module(f"tests.nvme.{module}"), f"test_{name}", None)), rule


# ---- OCSSD 2.0 ---------------------------------------------------------------------------------------------------


def test_after_each_refused_command_the_next_one_works(start):
    _, host = start()
    for refused in (run(0, 65), run(1 << 40, 4), run(4, 4), run(0, 3), [0, 0, 0, 0]):
        assert host.vector_write(refused, sectors(len(refused))).status != 0
        assert host.queues[1].nothing_more()
    assert write(host, 0, 4).status == 0


def test_a_vector_beyond_mdts_is_an_invalid_field(start):
    from ocssd_daemon.nvme.config import ControllerConfig
    _, host = start(config=ControllerConfig(queue_pairs=8, entries=256, mdts=2))
    assert write(host, 0, 8).status == 0x4002
    assert host.vector_read(run(0, 8))[0].status == 0x4002
    assert write(host, 0, 4).status == 0


def test_pract_is_an_invalid_field_of_vector_commands_too(start):
    _, host = start()
    for opcode in (0x91, 0x92, 0x90, 0x93):
        assert host.vector(opcode, run(0, 4), address=host.put(sectors(4)), count=4 * 4096,
                           control=0x2000).status == 0x4002, hex(opcode)


@pytest.mark.parametrize(("what", "fields"), [
    ("data", {"address": 1 << 40, "count": 4 * 4096}), ("list", {}), ("OOB", {"mptr": 1 << 40}),
])
def test_memory_that_is_not_there_is_a_transfer_error(start, what, fields):
    _, host = start()
    at = host.put(sectors(4))
    listed = 1 << 40 if what == "list" else host.lba_list(run(0, 4))
    given = {"address": at, "count": 4 * 4096, **fields}
    if what == "data":                          # built by hand: the kit would place a list for it
        from ocssd_daemon.protocol.nvme.commands import sqe
        host.queues[1].submit(sqe(0x91, 9, 1, prp1=1 << 40, prp2=1 << 41, dwords=struct.pack("<QHH", listed, 3, 0)))
        done = host.queues[1].wait()[0]
    else:
        done = host.io(0x91, dwords=struct.pack("<QHH", listed, 3, 0), **given)
    assert done.status == 0x4004
    assert int(chunk_log(host)["state"][0]) == FREE


def test_a_chunk_that_was_closed_early_reads_up_to_its_end(start):
    target, host = start(geometry=msgspec.structs.replace(SMALL, mw_cunits=8))
    assert write(host, 0, 12).status == 0
    with target.reactor.paused():
        target.media.arm_fault(0, "write")
    assert host.vector_write(run(12, 4), sectors(4)).status == 0x2F1
    set_dulbe(host)
    done, data, _ = host.vector_read(run(0, 12))
    assert (done.status, data) == (0, sectors(12))
    assert host.vector_read([12])[0].status == 0x4287


def test_a_scalar_read_returns_each_sector_by_itself(start):
    """Chunk 0 half full, chunk 1 full: in one read the written sectors behind the unwritten ones come too."""
    _, host = start()
    assert write(host, 0, 60).status == 0
    fill(host, CHUNK)
    done, data = host.read_blocks(56, 12)
    whole = sectors(64)
    assert (done.status, data) == (0, whole[56 * 4096:60 * 4096] + bytes(4 * 4096) + whole[:4 * 4096])


def test_a_reset_by_any_sector_takes_that_chunk_and_no_other(start):
    _, host = start()
    for chunk in (0, 1):
        fill(host, chunk * CHUNK)
    assert reset(host, 63).status == 0
    assert [int(s) for s in chunk_log(host)["state"][:2]] == [FREE, CLOSED]
    assert host.vector_read(run(CHUNK, 4))[1] == sectors(4)


def test_a_reset_has_at_most_64_addresses(start):
    _, host = start(multi_reset=True)
    assert reset(host, *[0] * 65).status == 0x4002
    assert reset(host, *[0] * 64).status == 0


@pytest.mark.parametrize(("state", "options", "status"), [
    (4, {"early_reset": True}, 0), (4, {"early_reset": False}, 0x42C1), (1, {"multi_reset": True}, 0), (8, {}, 0x42C0),
])
def test_dsm_has_the_statuses_of_a_reset(start, state, options, status):
    target, host = start(**options)
    if state == 4:
        assert write(host, 0, 4).status == 0
    with target.reactor.paused():
        target.media.chunks["state"][0] = state
    assert dsm(host, (0, 64)).status == status


def test_a_dsm_with_a_failure_in_the_middle_completes_once(start):
    """Ranges before it are done, those behind it are not."""
    _, host = start()
    for chunk in (0, 2):
        fill(host, chunk * CHUNK)
    assert dsm(host, (0, 64), (CHUNK, 64), (2 * CHUNK, 64)).status == 0x42C1
    assert host.queues[1].nothing_more()
    assert [int(s) for s in chunk_log(host)["state"][:3]] == [FREE, FREE, CLOSED]


def test_a_chunk_that_failed_is_offline_after_a_restart(tmp_path):
    device = shared(tmp_path / "image")
    chunk = 2 * device.geometry.chunks
    device.media.arm_fault(chunk, "reset")
    device.media.chunks["state"][chunk] = CLOSED
    assert device.media.reset(chunk) == 0x2C1
    device.close()
    again = shared(tmp_path / "image")
    assert int(again.media.chunks["state"][chunk]) == OFFLINE
    again.close()


def test_a_copy_onto_itself_or_over_64_addresses_is_refused(start):
    _, host = start()
    assert write(host, 0, 8).status == 0
    assert copy(host, run(0, 4), run(0, 4)).status == 0x42F2
    assert copy(host, run(0, 65), run(CHUNK, 65)).status == 0x4002


# ---- OCSSD 1.2 ---------------------------------------------------------------------------------------------------


def test_in_12_all_ones_is_no_address(start):
    _, host = start(("ocssd12",), planes=2)
    ones = [0xFFFF_FFFF_FFFF_FFFF] * 4
    assert host.vector_write(ones, sectors(4)).status == 0x4080
    assert host.vector(0x90, ones[:1]).status == 0x4080
    assert host.vector_read(ones)[0].status == 0x42FF


def test_in_12_a_refused_write_leaves_no_sector_and_no_oob(start):
    """The emulator had marked and stored the first sectors of a command that it refused for a later one."""
    _, host = start(("ocssd12",), planes=2)
    assert write_12(host, page(0, planes=(1,))).status == 0
    both = page(0)                              # plane 0 is free, plane 1 written
    assert host.vector_write(both, sectors(8, seed=7), oobs(8)).status == 0x4002
    assert host.vector_read(page(0, planes=(0,)))[0].status == 0x42FF
    assert host.vector_read(page(0, planes=(1,)))[1] == sectors(4)


@pytest.mark.parametrize(("planes", "mode", "status"), [(1, 0, 0), (1, 1, 0x4002), (2, 1, 0), (2, 2, 0x4002),
                                                        (4, 2, 0), (4, 3, 0x4002)])
def test_in_12_a_plane_mode_of_more_planes_than_there_are_is_refused(start, planes, mode, status):
    _, host = start(("ocssd12",), planes=planes)
    assert erase(host, 0, mode=mode).status == status


def test_in_12_a_scalar_write_obeys_the_pages_too(start):
    _, host = start(("ocssd12",), planes=1)
    assert host.write_blocks(0, sectors(4)).status == 0
    assert host.write_blocks(0, sectors(4)).status == 0x4002
    assert host.io(0x0C, dwords=blocks(0, 4)).status == 0
