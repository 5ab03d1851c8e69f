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


@pytest.mark.parametrize(("lbas", "says"), [
    ([], "shape"), ([[1, 2]], "shape"), (list(range(65)), "1 to 64"), ([-1], "integers from 0"), ([0.5], "integers"),
])
def test_addresses_that_cannot_be_are_refused(ssd, lbas, says):
    for call in (ssd.read, ssd.reset, lambda a: ssd.copy(a, a)):
        with pytest.raises(ValueError, match=says):
            call(lbas)


def test_an_array_of_another_type_is_refused_instead_of_cut(ssd):
    lbas = ssd.lba(sector=range(4))
    with pytest.raises(ValueError, match="data has dtype float64"):
        ssd.write(lbas, np.zeros((4, 4096)))
    with pytest.raises(ValueError, match="oob has dtype int64"):
        ssd.write(lbas, rows(4, 4096, 0), np.zeros((4, 16), np.int64))
    with pytest.raises(ValueError, match="2 sources for 1 targets"):
        ssd.copy(lbas[:2], lbas[:1])


def test_the_statuses_of_the_documentation(ssd):
    """Each that the docstrings name, made to happen."""
    data, full = rows(4, 4096, 1), rows(64, 4096, 2)
    first = ssd.lba(sector=range(4))
    outside = np.arange(4, dtype=np.uint64) + (1 << 40)
    assert ssd.write(outside, data)[0] == 0x280
    assert ssd.write(first + 4, data)[0] == 0x2F2
    assert ssd.write(first[:3], data[:3])[0] == 0x002
    assert ssd.write(ssd.lba(chunk=1, sector=range(64)), full) == (0, 0)
    assert ssd.write(ssd.lba(chunk=1, sector=range(4)), data)[0] == 0x280
    assert ssd.reset(outside[:1])[0] == ssd.reset(ssd.lba(chunk=2))[0] == 0x2C1
    assert ssd.copy(first, ssd.lba(chunk=3, sector=range(4)))[0] == 0x281
    assert ssd.read(first)[0] == 0
    assert (ssd.read(first)[3] == 0xFF).all()
    ssd.set_dulbe(True)
    assert ssd.copy(first, ssd.lba(chunk=3, sector=range(4)))[0] == 0x287


def test_an_image_keeps_the_flash(tmp_path):
    path = str(tmp_path / "flash")
    with Device(store=path, **SHAPE) as ssd:
        assert ssd.write(ssd.lba(sector=range(4)), rows(4, 4096, 5)) == (0, 0)
    with Device(store=path) as ssd:
        assert np.array_equal(ssd.read(ssd.lba(sector=range(4)))[2], rows(4, 4096, 5))


NUMBERS = {"sense_ns": 40_000, "program_ns": 800_000, "erase_ns": 2_000_000, "transfer_ns_per_sector": 5_000,
           "controller_ns": 1_000}


def test_with_a_virtual_clock_commands_take_the_time_of_the_flash():
    with Device(**SHAPE, clock="virtual", latency=NUMBERS) as ssd:
        unit = ssd.lba(chunk=1, sector=range(8))
        ssd.now_ns = 10_000
        assert ssd.write(unit, rows(8, 4096, 1)) == (0, 0)
        assert ssd.done_ns == 10_000 + 1_000 + 8 * 5_000 + 800_000
        ssd.now_ns = ssd.done_ns                        # one after the other
        assert ssd.read(unit[:1])[0] == 0
        assert ssd.done_ns == ssd.now_ns + 1_000 + 40_000 + 5_000
        other = ssd.lba(group=1, chunk=1, sector=range(8))
        assert ssd.write(other, rows(8, 4096, 1)) == (0, 0)     # at the same time, on another unit: it does not wait
        assert ssd.done_ns == ssd.now_ns + 1_000 + 8 * 5_000 + 800_000
        at = ssd.now_ns
        ssd.now_ns = 0                                  # time does not run backwards
        assert ssd.reset(ssd.lba(pu=1, chunk=2)) == (0x2C1, 1)  # a free chunk: refused at once
        ssd.read(ssd.lba(pu=1, chunk=2))
        assert ssd.done_ns >= at


def test_a_latency_that_cannot_be_leaves_the_image_to_the_next(tmp_path):
    path = str(tmp_path / "flash")
    with pytest.raises(ValueError, match="must be at least 1") as caught:
        Device(store=path, **SHAPE, clock="virtual", latency={"erase_ns": 1, "planes": -2})
    Device(store=path).close()
    assert caught                                           # held, and with it every frame that might hold the image


def test_without_latency_a_command_ends_when_it_is_issued(ssd):
    with Device(**SHAPE, clock="virtual") as virtual:
        virtual.now_ns = 77
        virtual.write(virtual.lba(sector=range(4)), rows(4, 4096, 1))
        assert virtual.done_ns == 77


@pytest.mark.parametrize(("options", "says"), [
    ({"clock": "wall"}, "clock=wall: must be real or virtual"),
    ({"latency": "tlc"}, "only with clock='virtual'"),
    ({"clock": "virtual", "latency": {"speed": 1}}, "latency: speed: must be one of profile, sense_ns"),
    ({"clock": "virtual", "latency": "fast"}, "must be one of none, slc"),
    ({"clock": "virtual", "latency": {"erase_ns": -1}}, "must be from 0"),
])
def test_a_clock_or_a_latency_that_cannot_be_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Device(**SHAPE, **options)
