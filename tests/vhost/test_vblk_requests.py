"""virtio-blk requests one at a time: cases BLK-01 to BLK-13 of the malformed-input matrix, and well-formed ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.kit.blk_driver import (
    DISCARD,
    F_FLUSH,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SCSI,
    UNSUPP,
    WRITE_ZEROES,
    BlkRig,
    make_target,
    ranges,
)
from tests.kit.guest_memory import GuestMemory
from tests.kit.virtqueue import Packed, Seg, Split

F_DISCARD, F_WRITE_ZEROES, F_CONFIG_WCE, F_RO = 1 << 13, 1 << 14, 1 << 11, 1 << 5
UNMAP = 1


@pytest.fixture(params=[Split, Packed], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest) -> Iterator[BlkRig]:
    with BlkRig(request.param) as rig:
        yield rig


def last_sector(rig: BlkRig) -> int:
    return rig.disk.size_bytes // 512


@pytest.mark.parametrize("type", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x80000000, 0xFFFFFFFF])
def test_BLK_01_an_unknown_type_is_unsupported(rig: BlkRig, type: int) -> None:
    assert rig.run(rig.request(type, in_size=512)) == UNSUPP


@pytest.mark.parametrize("type", [IN, OUT])
@pytest.mark.parametrize("beyond", [0, 1, 2**54, 2**55 - 1, 2**55, 2**63, 2**64 - 1 - 10240])
def test_BLK_02_a_transfer_beyond_the_end_is_an_io_error(rig: BlkRig, type: int, beyond: int) -> None:
    sector = last_sector(rig) + beyond
    request = rig.request(type, sector, in_size=512 * (type == IN), out=bytes(512 * (type == OUT)))
    assert rig.run(request) == IOERR


def test_BLK_02_the_last_sector_is_inside(rig: BlkRig) -> None:
    rig.write(last_sector(rig) - 1, b"\x77" * 512)
    assert rig.read(last_sector(rig) - 1, 512) == b"\x77" * 512
    assert rig.run(rig.request(IN, last_sector(rig) - 1, in_size=1024)) == IOERR


@pytest.mark.parametrize("size", [1, 511, 513, 4095])
def test_BLK_03_a_length_that_is_not_whole_sectors_is_an_io_error(rig: BlkRig, size: int) -> None:
    assert rig.run(rig.request(IN, in_size=size)) == IOERR
    assert rig.run(rig.request(OUT, out=bytes(size))) == IOERR


def test_BLK_03_a_transfer_must_be_whole_blocks_when_blocks_are_larger() -> None:
    with BlkRig(target=make_target(block_bytes=4096)) as rig:
        assert rig.run(rig.request(IN, 8, in_size=4096)) == OK
        assert rig.run(rig.request(IN, 1, in_size=4096)) == IOERR
        assert rig.run(rig.request(IN, 8, in_size=512)) == IOERR


@pytest.mark.parametrize("type", [IN, OUT])
def test_BLK_04_a_transfer_of_nothing_succeeds(rig: BlkRig, type: int) -> None:
    assert rig.run(rig.request(type, 0)) == OK


@pytest.mark.parametrize("type", [OUT, DISCARD, WRITE_ZEROES])
def test_BLK_05_a_read_only_disk_refuses_what_writes(type: int) -> None:
    with BlkRig(target=make_target(read_only=True)) as rig:
        assert rig.device.device_features & F_RO
        assert rig.run(rig.request(type, out=ranges((0, 8, 0)) * 32)) in (IOERR, UNSUPP)
        assert rig.run(rig.request(IN, in_size=512)) == OK


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(20, b"serial-0001\0\0\0\0\0\0\0\0\0", id="exact"),
        pytest.param(6, b"serial", id="short"),
        pytest.param(32, b"serial-0001" + bytes(21), id="long"),
    ],
)
def test_BLK_06_the_identification_fits_any_buffer(rig: BlkRig, size: int, expected: bytes) -> None:
    request = rig.request(GET_ID, in_size=size)
    assert rig.run(request) == OK
    assert request.data == expected


def test_BLK_06_the_identification_is_spread_over_segments(rig: BlkRig) -> None:
    request = rig.request(GET_ID, in_size=20)
    at = request.data_at
    request.chain[1:2] = [Seg(at, 3, writable=True), Seg(at + 3, 17, writable=True)]
    assert rig.run(request) == OK
    assert request.data == b"serial-0001" + bytes(9)


@pytest.mark.parametrize(("type", "feature"), [(DISCARD, F_DISCARD), (WRITE_ZEROES, F_WRITE_ZEROES)])
def test_BLK_07_a_range_request_without_its_feature_is_unsupported(type: int, feature: int) -> None:
    with BlkRig(without=feature) as rig:
        assert rig.run(rig.request(type, out=ranges((0, 8, 0)))) == UNSUPP


SECTORS_MAX = 1 << 22
BAD_PAYLOADS = {
    "not-16n": (ranges((0, 8, 0)) + b"\0", IOERR),
    "empty": (b"", IOERR),
    "33-ranges": (ranges((0, 8, 0)) * 33, IOERR),
    "no-sectors": (ranges((0, 0, 0)), IOERR),
    "too-many-sectors": (ranges((0, SECTORS_MAX + 1, 0)), IOERR),
    "beyond-the-end": (ranges((2**40, 8, 0)), IOERR),
    "end-beyond-the-end": (ranges((0, SECTORS_MAX, 0)), IOERR),
    "offset-wraps": (ranges((2**55, 8, 0)), IOERR),
    "sum-wraps": (ranges((2**64 - 8, 16, 0)), IOERR),
    "reserved-flag": (ranges((0, 8, 2)), UNSUPP),
    "all-flags": (ranges((0, 8, 0xFFFFFFFF)), UNSUPP),
    "second-range-bad": (ranges((0, 8, 0), (0, 8, 4)), UNSUPP),
}


@pytest.mark.parametrize("type", [DISCARD, WRITE_ZEROES], ids=["discard", "write-zeroes"])
@pytest.mark.parametrize("case", BAD_PAYLOADS)
def test_BLK_08_09_a_bad_range_payload_changes_nothing(rig: BlkRig, case: str, type: int) -> None:
    payload, status = BAD_PAYLOADS[case]
    rig.write(0, b"\x42" * 4096)
    assert rig.run(rig.request(type, out=payload)) == status
    assert rig.read(0, 4096) == b"\x42" * 4096


def test_BLK_08_unmap_in_a_discard_is_unsupported(rig: BlkRig) -> None:
    assert rig.run(rig.request(DISCARD, out=ranges((0, 8, UNMAP)))) == UNSUPP


def test_BLK_08_a_misaligned_range_is_an_io_error_when_blocks_are_larger() -> None:
    with BlkRig(target=make_target(block_bytes=4096)) as rig:
        assert rig.run(rig.request(DISCARD, out=ranges((1, 8, 0)))) == IOERR


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_BLK_09_write_zeroes_zeroes_exactly_its_ranges(rig: BlkRig, flags: int) -> None:
    rig.write(0, b"\x42" * 65536)
    assert rig.run(rig.request(WRITE_ZEROES, out=ranges((3, 30, flags), (30, 5, flags), (64, 8, flags)))) == OK
    expected = bytearray(b"\x42" * 65536)
    expected[3 * 512 : 35 * 512] = bytes(32 * 512)
    expected[64 * 512 : 72 * 512] = bytes(8 * 512)
    assert rig.read(0, 65536) == bytes(expected)


def test_a_discard_unmaps_whole_flash_sectors_and_leaves_the_edges(rig: BlkRig) -> None:
    rig.write(0, b"\x42" * 16384)
    assert rig.run(rig.request(DISCARD, out=ranges((4, 20, 0)))) == OK
    data = rig.read(0, 16384)
    assert data[:4096] == b"\x42" * 4096
    assert data[4096:12288] == bytes(8192)
    assert data[12288:] == b"\x42" * 4096


def test_a_range_of_many_pieces_is_done_within_one_request() -> None:
    with BlkRig() as rig:
        rig.write(0, b"\x42" * 4096)
        sectors = rig.disk.size_bytes // 512
        rig.queue.submit(rig.request(WRITE_ZEROES, out=ranges((0, sectors, 0))).chain)
        polls = 0
        while not rig.queue.completed():
            polls += 1
            rig.device.process(64)
        assert polls > 1  # it left the loop in between
        assert rig.read(0, 4096) == bytes(4096)


def test_BLK_10_a_flush_ignores_data_and_sector(rig: BlkRig) -> None:
    assert rig.run(rig.request(FLUSH, 2**60, out=bytes(512), in_size=512)) == OK


def test_BLK_11_data_in_the_wrong_direction_is_an_io_error(rig: BlkRig) -> None:
    assert rig.run(rig.request(IN, out=bytes(512))) == IOERR
    assert rig.run(rig.request(IN, out=bytes(512), in_size=512)) == IOERR
    assert rig.run(rig.request(OUT, in_size=512)) == IOERR
    assert rig.run(rig.request(OUT, out=bytes(512), in_size=512)) == IOERR


def test_BLK_12_a_large_transfer_in_one_segment_is_served() -> None:
    """No size_max is offered, so a segment may be as large as the disk; it is moved in pieces."""
    with BlkRig(num=128, memory=GuestMemory((0, 32 << 20))) as rig:
        size = 5 << 20
        data = bytes(range(256)) * (size // 256)
        request = rig.request(OUT, 0, out=data)
        rig.queue.submit(request.chain)
        done: list[tuple[int, int]] = []
        polls = 0
        while not done:
            polls += 1
            rig.device.process(64)
            done = rig.queue.completed()
        assert request.status == OK
        assert polls > 1  # it left the loop in between
        assert rig.read(0, 1 << 20) == data[: 1 << 20]
        assert rig.read((4 << 20) // 512, 1 << 20) == data[4 << 20 :]


def test_BLK_13_scsi_and_barrier_are_unsupported(rig: BlkRig) -> None:
    assert rig.run(rig.request(SCSI)) == UNSUPP
    assert rig.run(rig.request(OUT | 0x80000000, out=bytes(512))) == UNSUPP


@pytest.mark.parametrize(("size", "written"), [(512, 513), (4096, 4097)])
def test_the_used_length_counts_data_and_status(rig: BlkRig, size: int, written: int) -> None:
    id = rig.queue.submit(rig.request(IN, in_size=size).chain)
    rig.device.process(64)
    assert rig.queue.completed() == [(id, written)]


@pytest.mark.parametrize(
    ("features_without", "wce", "flushed"),
    [
        pytest.param(0, 1, False, id="write-back"),
        pytest.param(0, 0, True, id="wce-off"),
        pytest.param(F_CONFIG_WCE, 1, False, id="flush-only"),
        pytest.param(F_CONFIG_WCE | F_FLUSH, 1, True, id="driver-cannot-flush"),
    ],
)
def test_a_write_is_durable_at_completion_when_the_driver_relies_on_it(
    features_without: int, wce: int, flushed: bool
) -> None:
    with BlkRig(without=features_without) as rig:
        rig.device.set_wce(wce)
        rig.write(0, bytes(4096))
        programmed = rig.target.ftl.media.chunks["wp"].sum()
        assert (programmed > 0) == flushed


def test_the_configuration_space_says_what_is_served() -> None:
    with BlkRig(num_queues=3) as rig:
        rig.device.set_wce(0)
        config = rig.device.config()
        assert len(config) == 60
        assert struct.unpack_from("<QII", config) == (rig.disk.size_bytes // 512, 0, 126)  # capacity, size_max, seg_max
        assert struct.unpack_from("<I", config, 20) == (512,)  # blk_size
        assert struct.unpack_from("<BBHI", config, 24) == (3, 0, 8, 8)  # 4 KiB sectors are 2^3 blocks
        assert struct.unpack_from("<BBH", config, 32) == (0, 0, 3)  # wce, num_queues
        assert struct.unpack_from("<IIIII", config, 36) == (SECTORS_MAX, 32, 8, SECTORS_MAX, 32)
        assert config[56] == 1  # write_zeroes_may_unmap


def test_a_feature_that_was_not_offered_is_refused() -> None:
    with BlkRig(start=False) as rig, pytest.raises(ValueError, match="not offered"):
        rig.device.set_features(1 << 63)


def test_features_stay_while_a_ring_runs_except_logging() -> None:
    with BlkRig() as rig:
        rig.device.set_features(rig.features | 1 << 26)
        rig.device.set_features(rig.features)
        with pytest.raises(ValueError, match="LOG_ALL"):
            rig.device.set_features(rig.features & ~F_DISCARD)


def test_statistics_count_requests_errors_and_bytes(rig: BlkRig) -> None:
    rig.write(0, bytes(4096))
    rig.read(0, 512)
    rig.run(rig.request(99))
    stats = rig.device.stats()
    assert {k: stats[k] for k in ("requests", "errors", "bytes_read", "bytes_written")} == {
        "requests": 3,
        "errors": 1,
        "bytes_read": 512,
        "bytes_written": 4096,
    }


def test_an_identification_longer_than_a_step_is_an_io_error() -> None:
    with BlkRig() as rig:
        request = rig.request(GET_ID, in_size=(1 << 20) + 1)
        assert rig.run(request) == IOERR
        assert request.data == b"\x55" * request.data_size
