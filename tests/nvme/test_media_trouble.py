"""Fault rules and wear as a host of OCSSD 2.0 sees them: statuses, media feedback, the chunk notification log.

Geometry as in test_rules20: LBA = group << 10 | pu << 9 | chunk << 6 | sector.
"""

from __future__ import annotations

import struct
import time

import pytest

from ocssd_daemon._physics import Faults, Timing, Wear, attach_faults, attach_timing, attach_wear
from ocssd_daemon.nand import faults
from ocssd_daemon.nand.latency import Latency
from ocssd_daemon.nand.wear import Model
from tests.kit.nvme_target import SMALL
from tests.nvme.test_long_commands import LARGE
from tests.nvme.test_rules20 import CHUNK, fill, run, sectors

STATUS = 0x7FF  # without the DNR and More bits
FEEDBACK = 0xCA


def give_rules(target, *texts):
    rules = Faults(target.media.geometry, seed=1)
    for text in texts:
        rules.add(faults.parse(text))
    with target.reactor.paused():
        attach_faults(target.media, rules)


def give_wear(target, mean, **numbers):
    """Flash whose reads have *mean* raw bit errors on average; ECC corrects 100."""
    model = Model(ecc_bits=100, rber=mean / (8 * 4096), **numbers)
    with target.reactor.paused():
        attach_wear(target.media, Wear(target.media.geometry, model, seed=1))


def notices(host):
    at = host.allocate(4096)
    assert host.admin(0x02, 1, data=at, dwords=struct.pack("<IIQ", FEEDBACK + 6 | 1023 << 16, 0, 0)).status == 0
    entries = [struct.unpack_from("<QQIHB", host.get(at + 64 * i, 64)) for i in range(4)]
    return [(lba, state) for count, lba, _, state, _ in entries if count]


def test_a_read_that_a_rule_fails_is_unrecovered_and_named_in_the_bitmap(start):
    target, host = start()
    fill(host, 0)
    give_rules(target, "on=read sector=2 do=fail")
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status & STATUS, done.result) == (0x281, 0b0100)
    assert data[:8192] == sectors(2)


def test_what_a_write_had_left_of_a_chunk_that_failed_is_named_in_the_bitmap_too(start):
    """A random chunk takes sectors in any order: two runs of one command, of which the first one closes the chunk."""
    target, host = start()
    with target.reactor.paused():
        target.media.chunks["type"][0] = 2
    assert host.vector_write(run(8, 4), sectors(4, seed=3)).status == 0
    give_rules(target, "on=write sector=3 do=fail times=1")
    done = host.vector_write(run(0, 4) + run(8, 4), sectors(8))
    assert (done.status & STATUS, done.result) == (0x2F1, 0b1111_1000)
    assert host.vector_read(run(8, 4))[1] == sectors(4, seed=3), "what was refused was written"


def test_a_write_that_a_rule_fails_closes_the_chunk_early(start):
    target, host = start()
    give_rules(target, "on=write chunk=1 do=fail")
    assert host.vector_write(run(CHUNK, 4), sectors(4)).status & STATUS == 0x2F1
    assert host.vector_write(run(0, 4), sectors(4)).status == 0


def set_feedback(host, bits):
    assert host.admin(0x09, 1, dwords=struct.pack("<II", FEEDBACK, bits)).status == 0


def test_high_ecc_effort_is_a_status_only_with_media_feedback(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=80, retries=0)
    assert host.vector_read(run(0, 4))[0].status == 0
    set_feedback(host, 1)
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status & STATUS, data) == (0x2D0, sectors(4))


def test_with_bit_1_of_media_feedback_only_very_high_effort_is_told(start):
    target, host = start()
    fill(host, 0)
    set_feedback(host, 2)
    give_wear(target, mean=80, retries=0)
    assert host.vector_read(run(0, 4))[0].status == 0
    give_wear(target, mean=140)        # more than ECC corrects: retries
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status & STATUS, data) == (0x2D0, sectors(4))


def test_a_chunk_is_notified_once_of_each_degree_of_errors(start):
    target, host = start()
    fill(host, 0)
    fill(host, CHUNK)
    give_wear(target, mean=80, retries=0)
    for _ in range(3):
        host.vector_read(run(0, 4))
        host.vector_read(run(CHUNK, 4))
    assert notices(host) == [(0, 1 << 1), (CHUNK, 1 << 1)]
    give_wear(target, mean=140)
    for _ in range(3):
        host.vector_read(run(CHUNK, 4))
    assert notices(host) == [(0, 1 << 1), (CHUNK, 1 << 1), (CHUNK, 1 << 2)]


DISTURB = {"mean": 40, "retries": 0, "disturb": 1e-4, "refresh": True}  # a read adds 3 errors to each sector


def test_a_device_that_refreshes_rewrites_a_chunk_that_reads_have_disturbed_and_notifies_that(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, **DISTURB)
    before = target.media.chunks[0].copy()
    for _ in range(5):
        done, data, _ = host.vector_read(run(0, 4))
        assert (done.status, data) == (0, sectors(4))
    found = notices(host)
    assert found[:2] == [(0, 1 << 1), (0, 1 << 4)]
    after = target.media.chunks[0]
    assert after["pe_cycles"] == before["pe_cycles"] + sum(state == 1 << 4 for _, state in found)
    assert after["reads"] < 20
    assert (after["state"], after["wp"]) == (before["state"], before["wp"])


def test_a_chunk_that_wear_alone_makes_hard_to_read_is_not_rewritten_for_nothing(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=80, retries=0, refresh=True)
    cycles = int(target.media.chunks["pe_cycles"][0])
    for _ in range(5):
        host.vector_read(run(0, 4))
    assert notices(host) == [(0, 1 << 1)]
    assert int(target.media.chunks["pe_cycles"][0]) == cycles


@pytest.mark.parametrize(("wear", "states"), [
    ({"mean": 80, "retries": 0}, [1 << 1]),                     # errors: hard to read
    ({"mean": 500, "retries": 0}, [1 << 3]),                    # errors: lost
    (DISTURB, [1 << 1, 1 << 4]),                                # and refreshed
])
def test_each_kind_of_notice_raises_an_event(start, wear, states):
    target, host = start()
    fill(host, 0)
    host.queues[0].submit(host.entry(0x0C, 0))
    give_wear(target, **wear)
    for _ in range(4):
        host.vector_read(run(0, 4))
    event = host.queues[0].wait(1)[0]
    assert event.result & 0xFF_FF_07 == 0xD0_00_07              # vendor specific, log D0h
    assert [state for _, state in notices(host)][:2] == states


def test_in_1_2_high_effort_is_the_warning_that_lightnvm_knows(start):
    target, host = start(("ocssd12",))
    assert host.vector_write(run(0, 4), sectors(4)).status == 0
    give_wear(target, mean=80, retries=0)
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status & STATUS, data) == (0x700, sectors(4))
    give_wear(target, mean=500, retries=0)
    assert host.vector_read(run(0, 4))[0].status & STATUS == 0x281


def test_what_ecc_and_retries_cannot_recover_is_an_error_and_notified(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=500, retries=2, retry_gain=0.9)
    assert host.vector_read(run(0, 4))[0].status & STATUS == 0x281
    assert notices(host) == [(0, 1 << 3)]


def test_corrupt_flips_bits_of_the_stored_sector_and_the_status_is_good(start):
    target, host = start()
    fill(host, 0)
    give_rules(target, "on=read sector=1 do=corrupt:5 once")
    done, data, _ = host.vector_read(run(0, 4))
    assert done.status == 0
    wrong = [i for i in range(4) if data[4096 * i:4096 * (i + 1)] != sectors(4)[4096 * i:4096 * (i + 1)]]
    assert wrong == [1]
    assert host.vector_read(run(0, 4))[1] == data


def test_a_torn_write_loses_the_second_half_of_its_last_sector(start):
    target, host = start()
    give_rules(target, "on=write do=torn once")
    assert host.vector_write(run(0, 4), sectors(4)).status == 0
    data = host.vector_read(run(0, 4))[1]
    assert data == sectors(4)[:-2048] + bytes(2048)


def test_a_read_that_takes_its_chunk_offline(start):
    target, host = start()
    fill(host, 0)
    give_rules(target, "on=read sector=2 do=offline once")
    assert host.vector_read(run(0, 4))[0].status & STATUS == 0x281
    assert int(target.media.chunks["state"][0]) == 8
    assert host.vector_read(run(0, 4))[1] == bytes(4 * 4096)       # nothing of an offline chunk is readable
    assert notices(host) == []


def test_what_a_rule_breaks_is_notified_when_the_flash_keeps_notices(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=0)
    give_rules(target, "on=read sector=2 do=fail")
    host.vector_read(run(0, 4))
    assert notices(host) == [(0, 1 << 3)]


def test_a_vector_copy_of_what_cannot_be_read_is_refused_and_writes_nothing(start):
    target, host = start()
    fill(host, 0)
    give_rules(target, "on=read sector=2 do=fail")
    done = host.vector(0x93, run(0, 4), destination=host.lba_list(run(CHUNK, 4)))
    assert done.status & STATUS == 0x281
    assert int(target.media.chunks["state"][1]) == 1


def test_a_hanging_unit_answers_late_and_the_others_at_once(start):
    target, host = start()
    fill(host, 0)
    with target.reactor.paused():
        timing = Timing(SMALL, Latency(page_sectors=1, planes=1, buffer_sectors=1 << 16))
        attach_timing(target.media, timing)
    give_rules(target, "on=read pu=0 group=0 do=hang:1s")
    began = time.monotonic()
    host.vector_read([1 << 9])
    assert time.monotonic() - began < 1
    host.vector_read([0])
    assert time.monotonic() - began >= 1


def test_verify_finds_what_cannot_be_recovered_on_a_disk_and_on_flash(start):
    target, host = start(("block", "ocssd20"), geometry=LARGE)
    for slba in (5000, 200):                    # 5000 lies in a later piece than the first; 200 pushes it to the flash
        assert host.write_blocks(slba, sectors(64)).status == 0
    verify = struct.pack("<QH", 300, 8191)
    assert host.io(0x0C, dwords=verify).status == 0
    give_rules(target, "on=read do=fail")
    assert host.io(0x0C, dwords=struct.pack("<QH", 5000, 0)).status & STATUS == 0x281
    assert host.io(0x0C, dwords=struct.pack("<QH", 1000, 99)).status == 0       # nothing is written there
    assert host.io(0x0C, dwords=verify).status & STATUS == 0x281
    written = int(target.media.chunks["wp"].argmax())                           # the raw view of the same flash
    assert host.io(0x0C, 2, dwords=struct.pack("<QH", written << 10, 0)).status & STATUS == 0x281
