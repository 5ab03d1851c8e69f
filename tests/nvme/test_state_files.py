"""Fault files of the reference emulator as a host of the raw namespace sees them, and its bad-block table."""

from __future__ import annotations

import numpy as np
import pytest
from ocssd_daemon._fast import Media

from ocssd_daemon._physics import Faults, attach_faults
from ocssd_daemon.nand import faults
from ocssd_daemon.nand.store import open_ram
from ocssd_daemon.nvme.namespaces import raw_namespace
from ocssd_daemon.nvme.state_files import StateFileError, apply_bad_blocks
from tests.kit.nvme_target import SMALL
from tests.nvme.test_rules20 import CLOSED, FREE, OFFLINE, chunk_log, fill, reset, sectors


@pytest.fixture
def write(tmp_path):
    def go(text):
        path = tmp_path / "file"
        path.write_text(text)
        return str(path)
    return go


def give_rules(target, rules):
    made = Faults(target.media.geometry, seed=1)
    for rule in rules:
        made.add(rule)
    with target.reactor.paused():
        attach_faults(target.media, made)


def test_a_write_fault_strikes_at_its_sector(start, write):
    """Four sectors, fault at the third: status 2F1h, bits 2 and 3, write pointer 2, and the next reset takes it
    offline.
    """
    target, host = start()
    give_rules(target, faults.load_write_failures(write("grp=0 pu=0 chk=0 sec=2 writefail_prob=100\n")))
    done = host.vector_write([0, 1, 2, 3], sectors(4))
    assert (done.status, done.result) == (0x2F1, 0xC)
    found = chunk_log(host)[0]
    assert (int(found["state"]), int(found["wp"])) == (CLOSED, 2)
    assert host.vector_read([0, 1])[1] == sectors(4)[:8192]
    assert host.vector_write([0, 1, 2, 3], sectors(4)).status == 0x4280
    assert int(chunk_log(host)[0]["wp"]) == 2
    assert reset(host, 0).status == 0x42C1
    assert int(chunk_log(host)[0]["state"]) == OFFLINE


def test_a_write_fault_in_a_chunk_that_is_open_keeps_what_was_written_before(start, write):
    target, host = start()
    assert host.vector_write([0, 1, 2, 3], sectors(4)).status == 0
    give_rules(target, faults.load_write_failures(write("grp=0 pu=0 chk=0 sec=4 writefail_prob=100\n")))
    assert host.vector_write([4, 5, 6, 7], sectors(4)).result == 0xF
    found = chunk_log(host)[0]
    assert (int(found["state"]), int(found["wp"])) == (CLOSED, 4)
    assert host.vector_read([0, 1, 2, 3])[1] == sectors(4)


def test_a_reset_fault_takes_its_chunk_offline_and_no_other(start, write):
    target, host = start()
    for chunk in (0, 1):
        fill(host, chunk << 6)
    give_rules(target, faults.load_reset_failures(write("grp=0 pu=0 chk=1 resetfail_prob=100")))
    assert (reset(host, 0).status, reset(host, 1 << 6).status) == (0, 0x42C1)
    assert [int(state) for state in chunk_log(host)["state"][:2]] == [FREE, OFFLINE]


def test_a_bad_block_file_marks_blocks_and_may_be_missing(tmp_path):
    media = Media(open_ram(SMALL))
    namespace = raw_namespace("ocssd12", 1, media, planes=2)
    apply_bad_blocks(str(tmp_path / "none"), namespace)
    assert not media.chunks["flags"].any()
    path = tmp_path / "bb"
    path.write_bytes(bytes([0, 1] + [0] * 30))
    apply_bad_blocks(str(path), namespace)
    assert np.flatnonzero(media.chunks["flags"]).tolist() == [1]
    path.write_bytes(bytes(31))
    with pytest.raises(StateFileError, match="31 bytes"):
        apply_bad_blocks(str(path), namespace)
