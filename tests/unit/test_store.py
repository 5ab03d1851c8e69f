"""The image file: what is formatted, what is refused, what survives."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from ocssd_daemon._fast import Media

from ocssd_daemon.ftl.target import CapacityError, capacity_of, open_target
from ocssd_daemon.nand import store as store_module
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.layout import CHUNK_DTYPE, layout_of
from ocssd_daemon.nand.store import StoreError, open_file, open_ram
from tests.kit.requires import missing

SMALL = validate(Geometry(groups=1, pus=2, chunks=16, sectors=64, sector_bytes=4096))
WRITE_FAULT = 0x280


class Killed(BaseException):
    """Stands for a signal that nothing survives."""


def _die(*_: object) -> None:
    raise Killed


def image(tmp_path: Path) -> str:
    return str(tmp_path / "flash.img")


def test_chunk_table_entry_is_32_bytes() -> None:
    assert CHUNK_DTYPE.itemsize == 32


def test_regions_do_not_overlap_and_are_in_order() -> None:
    layout = layout_of(SMALL)
    regions = [layout.chunks, layout.l2p, layout.oob, layout.data]
    for before, after in itertools.pairwise(regions):
        assert before.offset + before.size_bytes <= after.offset
    assert layout.size_bytes == layout.data.offset + SMALL.raw_bytes


@pytest.mark.parametrize("made_by", ["missing", "empty", "truncate", "dd"])
def test_a_missing_empty_or_zero_filled_file_is_formatted(tmp_path: Path, made_by: str) -> None:
    path = Path(image(tmp_path))
    if made_by == "empty":
        path.touch()
    elif made_by == "truncate":
        path.touch()
        os.truncate(path, 10 << 20)
    elif made_by == "dd":
        path.write_bytes(bytes(10 << 20))
    target = open_target(open_file(str(path), SMALL))
    assert target.how_started == "fresh"
    assert target.disk.write(0, b"x" * 4096) == 0


@pytest.mark.parametrize("at", [0, 9 << 20])
def test_foreign_content_is_refused_and_left_alone(tmp_path: Path, at: int) -> None:
    path = Path(image(tmp_path))
    path.write_bytes(bytes(at) + b"my thesis" + bytes(1 << 20))
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not an image of this program"):
        open_file(str(path), SMALL)
    assert path.read_bytes() == before


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    keep = open_file(image(tmp_path), SMALL)
    with pytest.raises(StoreError, match="in use by another process"):
        open_file(image(tmp_path), SMALL)
    keep.close()
    open_file(image(tmp_path), SMALL).close()


@pytest.mark.parametrize(("path", "rule"), [("/nowhere/flash.img", "No such file"), ("/", "cannot be opened")])
def test_a_path_that_cannot_be_opened_is_named(path: str, rule: str) -> None:
    with pytest.raises(StoreError, match=rule):
        open_file(path, SMALL)


def test_a_device_file_is_refused() -> None:
    with pytest.raises(StoreError, match="not a regular file"):
        open_file("/dev/null", SMALL)


def test_a_failed_open_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("no")

    monkeypatch.setattr(store_module, "_map", fail)
    with pytest.raises(StoreError):
        open_file(image(tmp_path), SMALL)
    assert not Path(image(tmp_path)).exists()


@pytest.mark.parametrize("step", ["format_chunks", "save_superblock"])
def test_a_start_that_was_killed_while_it_formatted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    Path(image(tmp_path)).touch()
    with monkeypatch.context() as killed:
        killed.setattr(store_module.Store, step, _die)
        with pytest.raises(Killed):
            open_file(image(tmp_path), SMALL)
    target = open_target(open_file(image(tmp_path), SMALL))
    assert target.how_started == "fresh"
    assert target.disk.write(0, b"x" * 4096) == 0


def test_an_image_that_was_cut_short_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = open_target(open_file(image(tmp_path), SMALL))
    target.close()
    target.store.close()
    os.truncate(image(tmp_path), 1 << 20)
    with pytest.raises(StoreError, match="is cut short, 1048576 of"):
        open_file(image(tmp_path), SMALL)
    assert Path(image(tmp_path)).stat().st_size == 1 << 20


def test_the_image_keeps_its_geometry_and_an_explicit_other_one_is_refused(tmp_path: Path) -> None:
    open_file(image(tmp_path), SMALL).close()
    other = validate(Geometry(groups=1, pus=2, chunks=32, sectors=64))
    kept = open_file(image(tmp_path), other)
    assert kept.geometry == SMALL
    kept.close()
    with pytest.raises(StoreError, match=r"made with geometry\.chunks = 16, not 32"):
        open_file(image(tmp_path), other, explicit=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode:
        missing("a file system that can be filled", "run as root, so that a small tmpfs can be mounted")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_host_disk_is_enospc_and_what_was_written_stays(full_disk: Path) -> None:
    target = open_target(open_file(image(full_disk), SMALL))
    results = [target.disk.write(lba * 4096, lba.to_bytes(8, "little") * 512) for lba in range(1500)]
    written = results.index(28)
    assert written > 64
    assert set(results[written:]) == {28}
    for lba in range(written):
        assert target.disk.read(lba * 4096, 4096) == lba.to_bytes(8, "little") * 512
    again = open_target(target.store)
    assert again.how_started == "recovered"
    assert again.disk.read((written - 1) * 4096, 4096) == (written - 1).to_bytes(8, "little") * 512


def test_a_copy_on_a_full_host_disk_is_a_write_fault(full_disk: Path) -> None:
    """To the flash of a raw device: the space of a chunk is reserved before its first sector, whoever writes it."""
    media = Media(open_file(image(full_disk), SMALL))
    chunk_bytes = SMALL.sectors * SMALL.sector_bytes
    full = next(chunk for chunk in range(32) if media.write(chunk << 6, b"x" * chunk_bytes) == WRITE_FAULT)
    assert full > 2
    assert media.copy([0, 1, 2, 3], full << 6) == WRITE_FAULT
    assert media.reset(1) == 0
    assert media.copy([0, 1, 2, 3], 1 << 6) == 0


def test_a_disk_too_full_for_the_tables_is_refused(full_disk: Path) -> None:
    (full_disk / "other").write_bytes(bytes(11 << 20))
    with pytest.raises(StoreError, match="No space left on device"):
        open_file(image(full_disk), SMALL)
    assert not Path(image(full_disk)).exists()


def test_either_superblock_slot_can_be_lost(tmp_path: Path) -> None:
    store = open_file(image(tmp_path), SMALL)
    store.save_superblock(seq=5)
    store.save_superblock(seq=6)
    store.close()
    with open(image(tmp_path), "r+b") as file:
        file.write(b"\xff" * 4096)  # slot 0 held the newest generation or the one before
    assert open_file(image(tmp_path), SMALL).superblock.seq in (5, 6)


def test_a_clean_stop_is_a_checkpoint_and_keeps_the_counters(tmp_path: Path) -> None:
    target = open_target(open_file(image(tmp_path), SMALL))
    assert target.disk.write(8192, b"a" * 4096) == 0
    target.close()
    target.store.close()
    again = open_target(open_file(image(tmp_path), SMALL))
    assert again.how_started == "checkpoint"
    assert again.disk.read(8192, 4096) == b"a" * 4096
    assert again.ftl.stats()["user_sectors_written"] == 1


def test_a_checkpoint_that_does_not_match_its_checksum_is_not_believed(tmp_path: Path) -> None:
    target = open_target(open_file(image(tmp_path), SMALL))
    assert target.disk.write(0, b"a" * 4096) == 0
    target.close()
    target.store.l2p[0] = 7
    again_store = target.store
    again = open_target(again_store)
    assert again.how_started == "recovered"
    assert again.disk.read(0, 4096) == b"a" * 4096


@pytest.mark.parametrize("field", ["wp", "cnlb"])
def test_a_chunk_table_that_reaches_beyond_its_chunks_is_refused(tmp_path: Path, field: str) -> None:
    store = open_file(image(tmp_path), SMALL)
    store.chunks["state"][3] = 2
    store.chunks[field][3] = SMALL.sectors + 1
    store.close()
    with pytest.raises(StoreError, match="damaged chunk table: 1 entries"):
        open_file(image(tmp_path), SMALL)


@pytest.mark.parametrize("lba", [0xFFFFFFFF, 0, 77], ids=["out-of-range", "all-the-first", "all-another"])
@pytest.mark.parametrize("durability", ["process", "host"])
def test_out_of_band_entries_that_lie_do_not_lead_gc_to_another_sector(
    tmp_path: Path, lba: int, durability: str
) -> None:
    """A clean start trusts its checkpoint and has not read the entries; GC must not trust them either."""
    store = open_file(image(tmp_path), SMALL) if durability == "host" else open_ram(SMALL)
    target = open_target(store, block_bytes=4096, durability=durability)
    sectors = target.disk.size_bytes // 4096
    for at in range(sectors):
        assert target.disk.write(at * 4096, at.to_bytes(4096, "little")) == 0
    target.ftl.program_buffers()
    store.oob[:, 8:12] = np.frombuffer(lba.to_bytes(4, "little"), np.uint8)
    for _ in range(3):
        for at in range(1, sectors, 2):
            assert target.disk.write(at * 4096, at.to_bytes(4096, "little")) == 0
    assert target.ftl.stats()["gc_sectors_moved"] > 0
    for at in range(sectors):
        assert target.disk.read(at * 4096, 4096) == at.to_bytes(4096, "little")
    # What was moved has an entry that recovery believes; what was not is lost to the lie, and not another's.
    store.save_superblock(boot_id="another boot")
    again = open_target(store, block_bytes=4096, durability=durability)
    assert again.how_started == "recovered"
    found = [at for at in range(sectors) if store.l2p[at]]
    assert set(range(1, sectors, 2)) < set(found)
    for at in found:
        assert again.disk.read(at * 4096, 4096) == at.to_bytes(4096, "little")


def test_damaged_out_of_band_entries_do_not_lead_gc_out_of_the_map() -> None:
    store = open_ram(SMALL)
    target = open_target(store, block_bytes=4096)
    sectors = target.disk.size_bytes // 4096
    for lba in range(sectors):
        assert target.disk.write(lba * 4096, lba.to_bytes(4096, "little")) == 0
    target.ftl.program_buffers()
    store.oob[:] = 0xFF
    for _ in range(3):
        for lba in range(1, sectors, 2):
            assert target.disk.write(lba * 4096, lba.to_bytes(4096, "little")) == 0
    assert target.ftl.stats()["gc_sectors_moved"] > 0
    for lba in range(sectors):
        assert target.disk.read(lba * 4096, 4096) == lba.to_bytes(4096, "little")


def test_after_a_host_crash_damaged_sectors_lose_to_older_intact_ones(tmp_path: Path) -> None:
    """Power loss under durability host: a newer copy whose data never reached the disk does not win."""
    target = open_target(open_file(image(tmp_path), SMALL), durability="host")
    assert target.disk.write(0, b"old" + bytes(4093)) == 0
    assert target.disk.flush() == 0
    assert target.disk.write(0, b"new" + bytes(4093)) == 0
    newest = int(target.store.l2p[0]) - 1
    row = (newest >> SMALL.sector_bits) * SMALL.sectors + (newest & (SMALL.sectors - 1))
    target.store.data[row] = 0xEE  # its entry is on disk, its data is not
    target.store.save_superblock(boot_id="another boot")
    again = open_target(target.store)
    assert again.how_started == "recovered"
    assert again.disk.read(0, 4096) == b"old" + bytes(4093)


def test_trims_are_remembered_after_a_kill() -> None:
    store = open_ram(SMALL)
    target = open_target(store)
    assert target.disk.write(0, b"a" * 8192) == 0
    assert target.disk.discard(0, 4096) == 0
    again = open_target(store)
    assert again.how_started == "recovered"
    assert again.disk.read(0, 8192) == bytes(4096) + b"a" * 4096


WRITER = """
import sys
from ocssd_daemon.ftl.target import open_target
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.store import open_file
geometry = validate(Geometry(groups=1, pus=2, chunks=16, sectors=64, sector_bytes=4096))
disk = open_target(open_file(sys.argv[1], geometry)).disk
sectors = disk.size_bytes // 4096
number = 0
while True:
    number += 1
    place = number * 2654435761 % sectors
    disk.write(place * 4096, number.to_bytes(8, "little") * 512)
    sys.stdout.write(f"{place} {number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("after", [1, 300, 2000, 7777])
def test_what_was_acknowledged_is_there_after_kill_9(tmp_path: Path, after: int) -> None:
    """A process that writes and says so is killed; whatever it said is on the image."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, image(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    said = {}
    for line in lines:
        if line.endswith("\n"):
            place, number = map(int, line.split())
            said[place] = number
    target = open_target(open_file(image(tmp_path), SMALL))
    assert target.how_started == "recovered"
    for place, number in said.items():
        # The write after the last one that was acknowledged may be there too.
        found = int.from_bytes(target.disk.read(place * 4096, 512)[:8], "little")
        assert found >= number, f"sector {place}: found {found}, acknowledged {number}"
        assert target.disk.read(place * 4096, 4096) == found.to_bytes(8, "little") * 512


def test_capacity_is_raw_over_one_plus_op() -> None:
    assert capacity_of(Geometry(), 0.11) == int((1 << 20) / 1.11)


def test_a_small_device_gets_the_spare_lines_that_gc_needs() -> None:
    line = SMALL.total_pus * SMALL.sectors
    assert capacity_of(SMALL, 0.11) == 12 * line
    with pytest.raises(CapacityError, match=r"ftl\.op = 0\.11: leaves 1\.6 spare lines of 16, GC needs 4"):
        capacity_of(SMALL, 0.11, exact=True)


def test_a_device_with_too_few_lines_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"geometry\.chunks = 4"):
        capacity_of(validate(Geometry(chunks=4)), 0.11)


@pytest.mark.parametrize(("limit", "enough"), [("maxoc", 4), ("maxocpu", 2)])
def test_a_device_that_may_not_open_the_chunks_of_both_frontiers_is_refused(limit: str, enough: int) -> None:
    """Otherwise the first writes fail, chunk after chunk counts as broken, and the disk ends read-only."""
    def geometry(most: int) -> Geometry:
        return msgspec.structs.replace(SMALL, **{limit: most})

    with pytest.raises(ValueError, match=f"geometry.{limit} = {enough - 1}: the FTL keeps"):
        open_target(open_ram(geometry(enough - 1)))
    open_target(open_ram(geometry(enough // 2)), frontiers=1)
    target = open_target(open_ram(geometry(enough)))
    for at in range(0, 3 * target.disk.size_bytes, 1 << 16):
        assert target.disk.write(at % target.disk.size_bytes, bytes([at >> 16 & 0xFF]) * (1 << 16)) == 0
    assert target.media.stats()["write_failures"] == 0


def test_fresh_ram_takes_memory_only_as_it_is_written() -> None:
    store = open_ram(validate(Geometry()))
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    target = open_target(store)
    assert target.disk.write(0, bytes(1 << 20)) == 0
    with open("/proc/self/statm") as file:
        grown_bytes = (int(file.read().split()[1]) - before) * 4096
    assert grown_bytes < 64 << 20, "1 MiB written to a 4 GiB device"
    assert np.count_nonzero(store.chunks["state"] != 1) <= 8
