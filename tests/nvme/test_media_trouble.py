"""Fault rules and wear as a host of OCSSD 2.0 sees them: statuses, media feedback, the chunk notification log.

Geometry as in test_rules20: LBA = group << 10 | pu << 9 | chunk << 6 | sector.
"""

from __future__ import annotations

import struct

from ocssd_daemon._physics import Faults, Wear, attach_faults, attach_wear
from ocssd_daemon.nand import faults
from ocssd_daemon.nand.wear import Model
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


def test_a_write_that_a_rule_fails_closes_the_chunk_early(start):
    target, host = start()
    give_rules(target, "on=write chunk=1 do=fail")
    assert host.vector_write(run(CHUNK, 4), sectors(4)).status & STATUS == 0x2F1
    assert host.vector_write(run(0, 4), sectors(4)).status == 0


def test_high_ecc_effort_is_a_status_only_with_media_feedback(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=99)
    assert host.vector_read(run(0, 4))[0].status == 0
    assert host.admin(0x09, 1, dwords=struct.pack("<II", FEEDBACK, 1)).status == 0
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status & STATUS, data) == (0x2D0, sectors(4))


def test_chunks_that_are_hard_to_read_are_notified_once(start):
    target, host = start()
    fill(host, 0)
    fill(host, CHUNK)
    give_wear(target, mean=99)
    for _ in range(3):
        host.vector_read(run(0, 4))
        host.vector_read(run(CHUNK, 4))
    assert notices(host) == [(0, 1 << 2), (CHUNK, 1 << 2)]


def test_what_ecc_and_retries_cannot_recover_is_an_error_and_notified(start):
    target, host = start()
    fill(host, 0)
    give_wear(target, mean=500, retries=2, retry_gain=0.9)
    assert host.vector_read(run(0, 4))[0].status & STATUS == 0x281
    assert notices(host) == [(0, 1 << 3)]


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
