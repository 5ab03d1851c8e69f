"""What the front end says about rings and memory: what is refused, when a ring runs, what a change does to it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ocssd_daemon._vhost import FAULT_MEMORY_LOST
from tests.kit.blk_driver import FLUSH, IN, OK, OUT, BlkRig
from tests.kit.guest_memory import GuestMemory
from tests.kit.virtqueue import Packed, Split

MIB = 1 << 20


@pytest.fixture
def idle() -> Iterator[BlkRig]:
    """A device with features and memory, whose ring is not set up."""
    with BlkRig(start=False) as rig:
        rig.device.set_features(rig.features)
        rig.add_memory()
        yield rig


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- memory ----------------------------------------------------------------------------------------------------------

BASE = 1 << 40  # far from the guest of the fixture

BAD_REGIONS = {
    "VU-22-overlaps-in-gpa": ((4096, MIB, BASE, 0), "guest addresses overlap"),
    "VU-23-overlaps-in-user": ((BASE, MIB, 0x7F00_0000_1000, 0), "user addresses overlap"),
    "VU-24-gpa-wraps": ((2**64 - 4096, 8192, BASE, 0), "wrap"),
    "VU-24-user-wraps": ((BASE, 8192, 2**64 - 4096, 0), "wrap"),
    "VU-25-empty": ((BASE, 0, BASE, 0), "size is 0"),
    "VU-25-unaligned-gpa": ((BASE + 1, MIB, BASE, 0), "multiples"),
    "VU-25-unaligned-user": ((BASE, MIB, BASE + 1, 0), "multiples"),
    "VU-26-larger-than-the-file": ((BASE, MIB + 4096, BASE, 0), "beyond the end of the file"),
    "VU-28-offset-beyond": ((BASE, 4096, BASE, MIB), "beyond the end of the file"),
    "VU-28-offset-huge": ((BASE, 4096, BASE, 2**63), "beyond the end of the file"),
    "VU-28-offset-unaligned": ((BASE, 4096, BASE, 1), "multiples"),
    "VU-28-offset-and-size-wrap": ((BASE, 8192, BASE, 2**64 - 4096), "beyond the end of the file"),
}


@pytest.mark.parametrize("case", BAD_REGIONS)
def test_a_bad_region_is_refused_with_a_sentence(idle: BlkRig, case: str) -> None:
    region, sentence = BAD_REGIONS[case]
    with memfd(MIB) as fd, pytest.raises(ValueError, match=sentence):
        idle.device.mem_add(*region, fd)


def test_VU_14_only_regular_files_are_memory(idle: BlkRig) -> None:
    a, b = os.pipe()
    event = os.eventfd(0)
    directory = os.open("/", os.O_RDONLY)
    for fd in (a, event, directory, -1, 9999):
        with pytest.raises(ValueError, match="not a regular file"):
            idle.device.mem_add(BASE, 4096, BASE, 0, fd)
    for fd in (a, b, event, directory):
        os.close(fd)


def test_VU_14_a_file_sealed_against_writing_is_refused(idle: BlkRig) -> None:
    with memfd(4096) as fd:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(ValueError, match="cannot be mapped"):
            idle.device.mem_add(BASE, 4096, BASE, 0, fd)


def test_VU_30_an_unknown_region_cannot_be_removed(idle: BlkRig) -> None:
    region = idle.memory.regions[0]
    with pytest.raises(ValueError, match="no such"):
        idle.device.mem_remove(region.gpa, region.size + 4096, region.user_addr)


def test_VU_29_there_is_a_last_memory_slot() -> None:
    with BlkRig(start=False) as rig, memfd(4096) as fd:
        for i in range(509):
            rig.device.mem_add(i << 12, 4096, BASE + (i << 12), 0, fd)
        with pytest.raises(ValueError, match="no memory slot"):
            rig.device.mem_add(BASE, 4096, 0, 0, fd)


def test_translation_finds_every_region_of_many() -> None:
    """Regions added in a mixed order, a request in each."""
    regions = [(i * 8 * MIB, 64 << 10) for i in (3, 0, 9, 5, 1, 7)]
    with BlkRig(memory=GuestMemory((1 << 32, 8 * MIB), *regions)) as rig:
        for gpa, _ in regions:
            request = rig.request(OUT, gpa // MIB, out=bytes(512))
            rig.memory.write(gpa + 512, bytes([gpa // MIB]) * 512)
            request.chain[1].addr = gpa + 512
            assert rig.run(request) == OK
        for gpa, _ in regions:
            assert rig.read(gpa // MIB, 512) == bytes([gpa // MIB]) * 512


def test_VU_30_removing_a_rings_memory_breaks_that_ring_only() -> None:
    with BlkRig(num_queues=2, memory=GuestMemory((0, 4 * MIB), (8 * MIB, 4 * MIB))) as rig:
        first = rig.memory.regions[0]
        other_memory = GuestMemory((8 * MIB, 4 * MIB))
        other_memory.regions = [rig.memory.regions[1]]
        other_memory._next = 8 * MIB
        other = Split(other_memory)
        rig.start(1, other)
        rig.device.mem_remove(first.gpa, first.size, first.user_addr)
        assert rig.device.fault(0) == "the ring's memory was removed"
        assert not rig.device.broken(1)
        assert rig.queue.errors() == 1


def test_VU_31_a_replaced_table_that_still_has_the_ring_lets_it_run_on() -> None:
    with BlkRig() as rig:
        rig.write(0, b"\x01" * 512)
        rig.queue.submit(rig.request(IN, in_size=512).chain)
        rig.device.mem_reset()
        assert rig.device.process(64) == 0
        rig.add_memory()
        rig.device.mem_commit()
        assert rig.device.process(64) == 1
        assert len(rig.queue.completed()) == 1
        assert rig.read(0, 512) == b"\x01" * 512


def test_VU_31_a_replaced_table_without_the_ring_breaks_it_until_it_is_addressed_again() -> None:
    with BlkRig() as rig, memfd(MIB) as fd:
        rig.device.mem_reset()
        rig.device.mem_add(BASE, MIB, BASE, 0, fd)
        rig.device.mem_commit()
        assert rig.device.broken(0)
        rig.add_memory()
        assert rig.device.process(64) == 0
        rig.address()
        assert rig.run(rig.request(FLUSH)) == OK


def test_memory_may_be_plugged_while_a_ring_runs() -> None:
    with BlkRig() as rig:
        more = GuestMemory((64 * MIB, MIB))
        rig.memory.regions += more.regions
        request = rig.request(IN, in_size=512)
        request.chain[1].addr = 64 * MIB
        rig.device.mem_add(*more.regions[0].table_entry())
        assert rig.run(request) == OK


@pytest.mark.parametrize("what", ["data", "ring"])
def test_VU_27_a_file_that_is_truncated_under_us_ends_the_session_not_the_daemon(what: str) -> None:
    with BlkRig(memory=GuestMemory((0, 4 * MIB), (8 * MIB, 4 * MIB))) as rig:
        request = rig.request(OUT, out=bytes(4096))
        request.chain[1].addr = 8 * MIB
        rig.queue.submit(request.chain)
        os.ftruncate(rig.memory.regions[what == "data"].fd, 0)
        rig.device.process(64)
        assert rig.device.poisoned
        assert rig.reactor.events() == [(7, FAULT_MEMORY_LOST)]
        assert rig.device.process(64) == 0


def test_gpa_addresses_are_taken_as_they_are() -> None:
    with BlkRig(start=False, memory=GuestMemory((0, 4 * MIB), (8 * MIB, MIB))) as rig:
        rig.device.set_features(rig.features)
        rig.device.set_gpa_addresses(True)
        for region in rig.memory.regions:
            rig.device.mem_add(region.gpa, region.size, 0, region.offset, region.fd)
        q = rig.queue
        rig.device.vring_num(0, q.num)
        rig.device.vring_addr(0, 0, q.desc, q.used, q.avail, 0)
        rig.device.vring_kick(0, q.kick_fd)
        rig.device.vring_enable(0, True)
        assert rig.run(rig.request(FLUSH)) == OK


# ---- rings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 2, 200, 255, 0xFFFFFFFF])
def test_VU_32_a_ring_that_does_not_exist_is_refused(idle: BlkRig, index: int) -> None:
    for call in (
        lambda: idle.device.vring_num(index, 16),
        lambda: idle.device.vring_kick(index, -1),
        lambda: idle.device.vring_get_base(index),
        lambda: idle.device.vring_enable(index, True),
    ):
        with pytest.raises(ValueError, match="does not exist"):
            call()


@pytest.mark.parametrize("num", [0, 100, 32769, 65535, 65536, 2**32 - 1])
def test_VU_33_a_bad_ring_size_is_refused(idle: BlkRig, num: int) -> None:
    with pytest.raises(ValueError, match="size"):
        idle.device.vring_num(0, num)


def test_VU_33_a_packed_ring_need_not_be_a_power_of_two() -> None:
    with BlkRig(Packed, num=11) as rig:
        for _ in range(30):
            assert rig.run(rig.request(FLUSH)) == OK


@pytest.mark.parametrize("part", ["desc", "used", "avail"])
def test_VU_34_every_part_of_a_ring_must_be_aligned_and_inside_one_region(idle: BlkRig, part: str) -> None:
    q, user = idle.queue, idle.memory.user
    region = idle.memory.regions[0]
    good = {"desc": user(q.desc), "used": user(q.used), "avail": user(q.avail)}
    size = {"desc": 16 * 16, "used": 4 + 8 * 16, "avail": 4 + 2 * 16}[part]
    align = {"desc": 16, "used": 4, "avail": 2}[part]
    end = user(region.gpa + region.size)
    idle.device.vring_num(0, 16)
    for bad, sentence in (
        (0xDEAD_0000_0000, "inside one memory region"),
        (2**64 - align, "inside one memory region"),
        (good[part] + 1, "misaligned"),
        ((end - size + align) & -align, "inside one memory region"),  # VQ-32: the ring's last bytes are missing
    ):
        with pytest.raises(ValueError, match=sentence):
            idle.device.vring_addr(0, 0, **(good | {part: bad}), log=0)
    idle.device.vring_addr(0, 0, **(good | {part: (end - size) & -align}), log=0)


def test_VU_34_a_ring_may_not_straddle_regions() -> None:
    with BlkRig(start=False, memory=GuestMemory((0, MIB), (MIB, MIB))) as rig:
        rig.device.set_features(rig.features)
        rig.add_memory()
        rig.device.vring_num(0, 16)
        q, user = rig.queue, rig.memory.user
        with pytest.raises(ValueError, match="inside one memory region"):
            rig.device.vring_addr(0, 0, user(MIB - 128), user(q.used), user(q.avail), 0)


def test_VU_35_unknown_address_flags_are_refused(idle: BlkRig) -> None:
    idle.device.vring_num(0, 16)
    with pytest.raises(ValueError, match="flags"):
        idle.address(flags=0x80)


@pytest.mark.parametrize("base", [0x10000, 2**32 - 1, 2**33])
def test_VU_36_a_split_base_has_16_bits(idle: BlkRig, base: int) -> None:
    with pytest.raises(ValueError, match="index"):
        idle.device.vring_base(0, base)


@pytest.mark.parametrize("base", [16, 16 << 16, 0x7FFF, 2**32])
def test_VU_36_a_packed_base_is_below_the_ring_size(base: int) -> None:
    with BlkRig(Packed, num=16, start=False) as rig:
        rig.device.set_features(rig.features)
        rig.device.vring_num(0, 16)
        with pytest.raises(ValueError, match="index"):
            rig.device.vring_base(0, base)


def test_VU_36_a_packed_base_that_came_before_the_size_breaks_the_ring_at_its_start() -> None:
    with BlkRig(Packed, num=16, start=False) as rig:
        rig.device.set_features(rig.features)
        rig.add_memory()
        rig.device.vring_base(0, 100)
        rig.device.vring_num(0, 16)
        rig.address()
        rig.device.vring_kick(0, rig.queue.kick_fd)
        assert rig.device.fault(0) == "the base index does not fit the ring"


@pytest.mark.parametrize("set_fd", ["vring_kick", "vring_call", "vring_err"])
def test_VU_14_only_eventfds_are_notifications(idle: BlkRig, set_fd: str) -> None:
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as file:
        for fd in (reader, writer, file.fileno(), 9999):
            with pytest.raises(ValueError, match="not an eventfd"):
                getattr(idle.device, set_fd)(0, fd)
    os.close(reader)
    os.close(writer)


def test_VU_38_a_ring_that_was_never_configured_can_be_enabled_and_asked(idle: BlkRig) -> None:
    idle.device.vring_enable(0, True)
    idle.device.vring_enable(0, False)
    assert idle.device.vring_get_base(0) == 0


def test_VU_39_the_same_eventfd_may_serve_twice_and_be_set_again() -> None:
    with BlkRig() as rig:
        for _ in range(3):
            rig.device.vring_kick(0, rig.queue.call_fd)
            rig.device.vring_call(0, rig.queue.call_fd)
        assert rig.run(rig.request(FLUSH)) == OK


def test_a_kick_before_enable_is_remembered() -> None:
    with BlkRig() as rig:
        rig.device.vring_enable(0, False)
        request = rig.request(FLUSH)
        rig.queue.submit(request.chain)
        rig.queue.kick()
        assert rig.device.process(64) == 0
        rig.device.vring_enable(0, True)
        assert rig.device.process(64) == 1
        assert request.status == OK


@pytest.mark.parametrize("layout", [Split, Packed])
@pytest.mark.parametrize("change", ["mem_reset", "mem_remove", "get_base"])
def test_a_request_that_was_under_way_when_its_ring_was_disabled_ends_before_its_memory_goes(
    layout: type, change: str
) -> None:
    with BlkRig(layout) as rig:
        request = rig.request(IN, in_size=5 * MIB)  # more than one turn moves
        rig.queue.submit(request.chain)
        assert rig.device.process(64) == 0
        rig.device.vring_enable(0, False)
        region = rig.memory.regions[0]
        if change == "mem_reset":
            rig.device.mem_reset()
        elif change == "mem_remove":
            rig.device.mem_remove(region.gpa, region.size, region.user_addr)
        else:
            rig.device.vring_get_base(0)
        assert request.status == OK
        assert len(rig.queue.completed()) == 1
        rig.device.vring_enable(0, True)
        assert rig.device.process(64) == 0


def test_without_protocol_features_a_ring_needs_no_enable() -> None:
    with BlkRig(start=False) as rig:
        rig.device.set_features(rig.features & ~(1 << 30))
        rig.add_memory()
        rig.device.vring_num(0, 16)
        rig.address()
        rig.device.vring_kick(0, rig.queue.kick_fd)
        assert rig.run(rig.request(FLUSH)) == OK


@pytest.mark.parametrize("layout", [Split, Packed])
def test_a_stopped_ring_goes_on_from_the_base_it_reported(layout: type) -> None:
    with BlkRig(layout, num=8) as rig:
        for _ in range(21):
            assert rig.run(rig.request(FLUSH), indirect=True) == OK
        base = rig.device.vring_get_base(0)
        # split: the index; packed: slot 5 of the third lap (wrap bits set again), for avail and for used
        assert base == (21 if layout is Split else 0x8005_8005)
        assert rig.device.process(64) == 0
        rig.start(base=base)
        for _ in range(21):
            assert rig.run(rig.request(FLUSH), indirect=True) == OK


def test_vring_base_is_refused_while_the_ring_runs() -> None:
    with BlkRig() as rig, pytest.raises(ValueError, match="running"):
        rig.device.vring_base(0, 0)


def test_reset_device_keeps_memory_and_error_fds_and_drops_the_rest() -> None:
    with BlkRig() as rig:
        rig.run(rig.request(FLUSH))
        rig.device.reset_device()
        rig.queue.submit(rig.request(FLUSH).chain)
        assert rig.device.process(64) == 0
        q = Split(rig.memory)
        q.err_fd, rig.queue.err_fd = rig.queue.err_fd, q.err_fd
        rig.queue = q
        rig.device.set_features(rig.features)
        rig.device.vring_num(0, q.num)
        rig.address()
        rig.device.vring_kick(0, q.kick_fd)
        rig.device.vring_enable(0, True)
        assert rig.run(rig.request(FLUSH)) == OK
        q.offer(99)
        rig.device.process(64)
        assert q.errors() == 1


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapping_count() -> int:
    with open("/proc/self/maps") as maps:
        return len(maps.readlines())


def test_VU_53_a_storm_of_starts_and_stops_leaks_nothing() -> None:
    with BlkRig() as rig:
        rig.run(rig.request(FLUSH))
        before = open_fds()
        mappings = mapping_count()
        for _ in range(200):
            rig.device.vring_get_base(0)
            rig.device.reset_device()
            rig.device.set_features(rig.features)
            rig.device.mem_reset()
            rig.add_memory()
            rig.start(base=rig.queue.used_idx if isinstance(rig.queue, Split) else 0)
            rig.run(rig.request(FLUSH))
        assert open_fds() == before
        assert abs(mapping_count() - mappings) < 8


@pytest.mark.parametrize("use", ["config", "device_features", "stats", "mem_reset", "arm"])
def test_a_closed_device_says_so(use: str) -> None:
    with BlkRig() as rig:
        rig.device.close()
        with pytest.raises(ValueError, match="closed"):
            getattr(rig.device, use)()


def test_close_releases_everything_and_is_idempotent() -> None:
    before = open_fds()
    rig = BlkRig()
    rig.device.close()
    rig.device.close()
    del rig
    assert open_fds() <= before + 3  # the reactor's own
