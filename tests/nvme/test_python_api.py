"""The flash inside this process, on numpy arrays."""

from __future__ import annotations

import numpy as np
import pytest

from ocssd_daemon import Device, describe

SHAPE = {"groups": 2, "pus": 2, "chunks": 8, "sectors": 64, "ws_min": 4, "ws_opt": 8, "mw_cunits": 0}


@pytest.fixture
def ssd():
    with Device(**SHAPE) as device:
        yield device


def rows(count, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, width), np.uint8)


def test_a_vector_write_reads_back_with_its_oob(ssd):
    lbas, data, oob = ssd.lba(group=1, pu=1, chunk=3, sector=range(8)), rows(8, 4096, 1), rows(8, 16, 2)
    assert ssd.write(lbas, data, oob) == (0, 0)
    status, failed, got, extra = ssd.read(lbas)
    assert (status, failed) == (0, 0)
    assert np.array_equal(got, data)
    assert np.array_equal(extra, oob)


def test_addresses_pack_sector_chunk_pu_and_group(ssd):
    assert ssd.lba(1, 1, 3, 5).tolist() == [1 << 10 | 1 << 9 | 3 << 6 | 5]
    with pytest.raises(ValueError, match="chunk 8"):
        ssd.lba(chunk=8)


def test_failures_are_values_that_describe_themselves(ssd):
    status, failed = ssd.write(ssd.lba(sector=range(4, 8)), rows(4, 4096, 1))
    assert (describe(status), failed) == ("0x2f2 OUT_OF_ORDER: not at the write pointer of the chunk", 0xF)
    ssd.set_dulbe(True)
    assert ssd.read(ssd.lba(sector=range(2)))[:2] == (0x287, 0b11)


def test_chunks_close_reset_and_copy(ssd):
    lbas, data = ssd.lba(sector=range(64)), rows(64, 4096, 3)
    assert ssd.write(lbas, data) == (0, 0)
    assert ssd.chunk_log()[0][["state", "wp"]].tolist() == (2, 64)
    assert ssd.copy(lbas[:4], ssd.lba(pu=1, sector=range(4))) == (0, 0)
    assert np.array_equal(ssd.read(ssd.lba(pu=1, sector=range(4)))[2], data[:4])
    assert ssd.reset(lbas[:1]) == (0, 0)
    assert not ssd.read(lbas[:1])[2].any()


def test_identify_is_what_a_guest_gets(ssd):
    found = ssd.identify()
    assert (found["major"], found["num_grp"], found["clba"], found["ws_opt"]) == (2, 2, 64, 8)


@pytest.mark.parametrize(("data", "oob"), [(rows(3, 4096, 0), None), (rows(4, 512, 0), None), (rows(4, 4096, 0),
                                                                                               rows(4, 8, 0))])
def test_arrays_of_a_wrong_shape_are_refused(ssd, data, oob):
    with pytest.raises(ValueError, match="shape"):
        ssd.write(ssd.lba(sector=range(4)), data, oob)


def test_an_image_keeps_the_flash(tmp_path):
    path = str(tmp_path / "flash")
    with Device(store=path, **SHAPE) as ssd:
        assert ssd.write(ssd.lba(sector=range(4)), rows(4, 4096, 5)) == (0, 0)
    with Device(store=path) as ssd:
        assert np.array_equal(ssd.read(ssd.lba(sector=range(4)))[2], rows(4, 4096, 5))
