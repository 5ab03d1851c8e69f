"""Fault and chunk state files of the reference emulator, both dialects; each arms what it says, or is refused by
line.
"""

from __future__ import annotations

import numpy as np
import pytest
from ocssd_daemon._fast import Media

from ocssd_daemon.nand.store import open_ram
from ocssd_daemon.nvme.namespaces import raw_namespace
from ocssd_daemon.nvme.state_files import StateFileError, apply_bad_blocks, apply_chunk_states, read_faults
from tests.kit.nvme_target import SMALL
from tests.nvme.test_rules20 import CLOSED, FREE, OFFLINE, chunk_log, fill, reset, sectors


@pytest.fixture
def write(tmp_path):
    def go(text):
        path = tmp_path / "file"
        path.write_text(text)
        return str(path)
    return go


def test_a_write_fault_strikes_at_its_sector(start, write):
    """Four sectors, fault at the third: status 2F1h, bits 2 and 3, write pointer 2, and the next reset takes it
    offline.
    """
    faults = read_faults(write("grp=0 pu=0 chk=0 sec=2 writefail_prob=100\n"), SMALL, sectors=True)
    _, host = start(write_faults=faults)
    done = host.vector_write([0, 1, 2, 3], sectors(4))
    assert (done.status, done.result) == (0x2F1, 0xC)
    found = chunk_log(host)[0]
    assert (int(found["state"]), int(found["wp"])) == (CLOSED, 2)
    assert host.vector_read([0, 1])[1] == sectors(4)[:8192]
    assert host.vector_write([0, 1, 2, 3], sectors(4)).status == 0x4280
    assert int(chunk_log(host)[0]["wp"]) == 2
    assert reset(host, 0).status == 0x42C1
    assert int(chunk_log(host)[0]["state"]) == OFFLINE


def test_a_reset_fault_takes_its_chunk_offline_and_no_other(start, write):
    faults = read_faults(write("grp=0 pu=0 chk=1 resetfail_prob=100"), SMALL, sectors=False)
    _, host = start(reset_faults=faults)
    for chunk in (0, 1):
        fill(host, chunk << 6)
    assert (reset(host, 0).status, reset(host, 1 << 6).status) == (0, 0x42C1)
    assert [int(state) for state in chunk_log(host)["state"][:2]] == [FREE, OFFLINE]


def test_wildcards_comments_and_both_dialects_are_read(write):
    text = "# all of PU 1\ngroup=0 punit=1 chunk=* sectr=0x3 prob=50   # half\n\n"
    found = read_faults(write(text), SMALL, sectors=True)
    assert found["chunk"].tolist() == list(range(8, 16))
    assert set(found["sector"]) == {3}
    assert set(found["chance"]) == {32768}


def test_chunk_states_are_set_and_counted(write):
    media = Media(open_ram(SMALL))
    lines = ["grp=0 pu=0 chk=0 wi=300 wp=8 state=OPEN type=W_SEQ",
             "grp=1 pu=1 chk=7 wi=0 wp=0 state=OFFLINE type=W_RAN"]
    apply_chunk_states(write("\n".join(lines)), media)
    assert media.chunks[["state", "wp", "wear_index"]][0].tolist() == (4, 8, 44)
    assert int(media.chunks["wp"][31]) == 0xFFFF_FFFF
    assert media.stats()["chunks_open"] == 1


@pytest.mark.parametrize(("text", "says"), [
    ("grp=0 pu=0 chk=0 wp=65 state=CLOSED", "wp=65"), ("grp=0 pu=0 chk=0 wp=64 state=OPEN", "wp=64"),
    ("grp=9 pu=0 chk=0 state=FREE", "file:1: group=9"), ("\npu=0 chk=0 state=FREE", "file:2: group= is missing"),
    ("grp=0 pu=0 chk=0 state=BROKEN", "state=BROKEN"), ("nonsense", "must be key=value"),
    ("grp=x pu=0 chk=0 state=FREE", "must be a number"), ("grp=0 pu=0 chk=0 state=FREE colour=red", "colour"),
])
def test_a_chunk_state_file_that_is_wrong_is_refused_with_its_line(write, text, says):
    with pytest.raises(StateFileError, match=says):
        apply_chunk_states(write(text), Media(open_ram(SMALL)))


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
