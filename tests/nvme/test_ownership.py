"""A parallel unit has one owner: what the host FTL has looks taken to the guest, what the guest has it never uses."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ocssd_daemon import Device as Flash
from ocssd_daemon import settings as sets
from ocssd_daemon.device import Device
from ocssd_daemon.nand.store import StoreError
from ocssd_daemon.nvme.namespaces import raw_namespace
from ocssd_daemon.nvme.state_files import apply_bad_blocks
from tests.kit.daemon import daemon, run_daemon
from tests.kit.nvme_host import NvmeHost
from tests.kit.vfio_user_client import VfioUserClient
from tests.nvme.test_rules12 import mark, page, table
from tests.nvme.test_rules20 import FREE, GROUP, OFFLINE, PU, chunk_log, dsm, oobs, run, sectors, set_dulbe

OURS = np.array([1, 1, 0, 0], np.uint8)                 # the host FTL has group 0 of 2 x 2


# ---- what the guest meets, 2.0 -----------------------------------------------------------------------------------


@pytest.fixture
def host(start) -> NvmeHost:
    return start(foreign=OURS)[1]


def test_the_chunk_log_shows_them_offline_and_without_a_write_pointer(host) -> None:
    log = chunk_log(host)
    assert [int(s) for s in log["state"]] == [OFFLINE] * 16 + [FREE] * 16
    assert set(log["wp"][:16].tolist()) == {0xFFFF_FFFF_FFFF_FFFF}


@pytest.mark.parametrize(("command", "status"), [
    (lambda h: h.vector_write(run(0, 4), sectors(4), oobs(4)), 0x4280),
    (lambda h: h.vector_write(run(GROUP, 4) + run(PU, 4), sectors(8), oobs(8)), 0x4280),
    (lambda h: h.write_blocks(0, sectors(4)), 0x4280),
    (lambda h: h.io(0x08, dwords=struct.pack("<QH", 0, 3)), 0x4280),
    (lambda h: h.vector(0x90, [0]), 0x42C0),
    (lambda h: dsm(h, (0, 64)), 0x42C0),
    (lambda h: h.vector(0x93, run(0, 4), destination=h.lba_list(run(GROUP, 4))), 0x4281),
    (lambda h: h.vector_read(run(0, 4))[0], 0),
    (lambda h: h.read_blocks(0, 4)[0], 0),
], ids=["vector write", "one of two", "write", "zeroes", "reset", "DSM", "copy from", "vector read", "read"])
def test_a_command_on_them_is_answered_as_an_offline_chunks_is(start, command, status) -> None:
    target, host = start(foreign=OURS)
    with target.reactor.paused():                       # there is something that must not be seen or lost
        target.media.chunks["state"][0], target.media.chunks["wp"][0] = 2, 64
    assert command(host).status == status
    chunks = target.media.chunks[["state", "wp"]]
    assert chunks[0].tolist() == (2, 64)
    assert set(chunks["state"][1:]) == {FREE}


def test_their_data_cannot_be_read(start) -> None:
    target, host = start(foreign=np.zeros(4, np.uint8))
    assert host.vector_write(run(0, 64), sectors(64)).status == 0
    with target.reactor.paused():
        target.server.device.foreign[:] = OURS
    done, data, _ = host.vector_read(run(0, 4))
    assert (done.status, data) == (0, bytes(4 * 4096))
    set_dulbe(host)
    assert host.vector_read(run(0, 4))[0].status == 0x4287


def test_a_format_leaves_them_alone(start) -> None:
    target, host = start(foreign=OURS)
    with target.reactor.paused():
        target.media.chunks["state"][0], target.media.chunks["wp"][0] = 2, 64
    assert host.admin(0x80, 1).status == 0
    assert int(target.media.chunks["state"][0]) == 2


# ---- 1.2 ---------------------------------------------------------------------------------------------------------


def test_in_12_they_are_reserved_by_the_host_and_refuse_every_command(start) -> None:
    target, host = start(("ocssd12",), planes=2, foreign=OURS)
    ours, channel = page(0), 1 << 10
    assert table(host, 0)[1][64:] == bytes([8] * 8)
    assert struct.unpack_from("<I", table(host, 0)[1], 28) == (8,)      # counted as reserved
    assert table(host, channel)[1][64:] == bytes(8)
    assert host.vector_write(ours, sectors(8), oobs(8)).status == 0x4002
    assert host.vector(0x90, [0], control=1).status == 0x4002
    assert host.vector_read(ours)[0].status == 0x42FF
    assert mark(host, [0], 2) == 0x4002
    assert mark(host, [channel, 0], 2) == 0x4002
    assert not target.media.chunks["flags"].any()
    theirs = [ppa + channel for ppa in ours]
    assert host.vector_write(theirs, sectors(8), oobs(8)).status == 0


# ---- the other way round -----------------------------------------------------------------------------------------


def shared(store: Path | None = None, **more: str) -> Device:
    """Four PUs: 0 and 1 for the disk, 2 and 3 for a guest."""
    given = {"geometry.groups": "2", "geometry.pus": "2", "geometry.chunks": "16", "geometry.sectors": "64",
             "ftl.pus": "0-1", **({"store": str(store)} if store else {}), **more}
    layer = sets.from_assignments([f"{key}={value}" for key, value in given.items()])
    return Device(sets.build(layer), sets.named(layer))


@pytest.fixture
def device() -> Iterator[Device]:
    made = shared()
    yield made
    made.close()


def test_the_ftl_never_touches_what_the_guest_has_however_much_it_collects(device) -> None:
    mine, theirs = device.media.chunks[:32], device.media.chunks[32:]
    theirs["state"][3], theirs["wp"][3], theirs["pe_cycles"][3] = 4, 8, 1
    before = theirs.copy()
    rng = random.Random(5)
    blocks = device.disk.size_bytes // 4096
    for _ in range(8 * blocks):
        assert device.disk.write(rng.randrange(blocks) * 4096, os.urandom(16) * 256) == 0
    assert device.ftl.stats()["gc_runs"] > 10
    assert int(mine["pe_cycles"].sum()) > 50
    assert np.array_equal(theirs, before)


def test_the_disk_is_as_large_as_its_own_pus(device) -> None:
    assert 0 < device.disk.size_bytes < device.geometry.raw_bytes // 2
    assert device.ftl_owns.tolist() == [1, 1, 0, 0]


def test_an_image_keeps_the_owners(tmp_path) -> None:
    shared(tmp_path / "image").close()
    with pytest.raises(StoreError, match=r"its disk lies on PUs \[0, 1\], ftl.pus names \[2, 3\]"):
        shared(tmp_path / "image", **{"ftl.pus": "2-3"})
    shared(tmp_path / "image").close()


def test_flash_that_a_guest_wrote_is_not_taken_for_a_disk(tmp_path) -> None:
    """The host FTL would have erased it without a word."""
    path = tmp_path / "image"
    with Flash(store=str(path), groups=2, pus=2, chunks=16, sectors=64) as flash:
        rows = np.frombuffer(sectors(8), np.uint8).reshape(8, 4096)
        assert flash.write(flash.lba(group=1, sector=range(8)), rows) == (0, 0)
    with pytest.raises(StoreError, match="holds raw flash that was written"):
        shared(path, **{"ftl.pus": "all"})
    shared(path).close()                                # its own PUs are free
    with Flash(store=str(path)) as flash:
        assert flash.read(flash.lba(group=1, sector=range(8)))[0] == 0
        assert int(flash.chunk_log()["state"][32]) == 4


def test_a_bad_block_table_does_not_reach_into_the_disk(device, tmp_path) -> None:
    (tmp_path / "bb").write_bytes(b"\1" * 64)
    apply_bad_blocks(str(tmp_path / "bb"), raw_namespace("ocssd12", 1, device.media), device.ftl_owns)
    assert np.flatnonzero(device.media.chunks["flags"]).tolist() == list(range(32, 64))


def test_disk_and_flash_are_served_side_by_side(tmp_path) -> None:
    socket = tmp_path / "nvme"
    arguments = ["--vfio-user", socket, "--size", "64M", "--store", tmp_path / "image", "--set",
                 "nvme.namespaces=ocssd20,block", "--set", "ftl.pus=0-3"]
    for start in range(2):
        with daemon(tmp_path, *arguments), VfioUserClient(str(socket), 64 << 20) as client:
            client.negotiate()
            client.map_memory()
            host = NvmeHost(client)
            host.enable()
            host.create_queue()
            group = _group(host)
            if start == 0:
                assert host.vector_write(run(group, 4), sectors(4), oobs(4)).status == 0
                assert host.write_blocks(8, b"x" * 512, nsid=2, lba_bytes=512).status == 0
            assert host.vector_write(run(0, 4), sectors(4), oobs(4)).status == 0x4280
            assert host.vector_read(run(group, 4))[0].status == 0
            assert host.read_blocks(8, 1, nsid=2, lba_bytes=512)[1] == b"x" * 512
            host.close()
    done = run_daemon("--vfio-user", socket, "--store", tmp_path / "image", "--set", "ftl.pus=0-7", "--run", "true",
                      "--set", "nvme.namespaces=block")
    assert done.returncode == 1
    assert "its disk lies on PUs [0, 1, 2, 3]" in done.stderr


def _group(host) -> int:
    """The first address of group 1, from the geometry's field widths."""
    at = host.allocate(4096)
    assert host.admin(0xE2, 1, data=at).status == 0
    grp_len, pu_len, chk_len, sec_len = host.get(at + 8, 4)
    assert grp_len == 1
    return 1 << pu_len + chk_len + sec_len

