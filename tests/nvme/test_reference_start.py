"""The daemon started as the reference emulator was: ``dd if=/dev/zero of=blknvme …`` and its ``-device`` options."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ocssd_daemon.protocol.nvme import identify, ocssd12, ocssd20
from tests.kit.daemon import daemon, run_daemon
from tests.kit.nvme_host import NvmeHost
from tests.kit.vfio_user_client import VfioUserClient
from tests.nvme.test_rules20 import oobs, sectors

MIB = 1 << 20
LINE_12 = ("serial=deadbeef,lver=1,lmtype=0,nlbaf=5,lba_index=3,mdts=10,namespaces=1,lnum_ch=1,lnum_lun=4,lnum_pln=2,"
           "lsec_size=4096,lsecs_per_pg=4,lpgs_per_blk=64,lmetasize=16")
LINE_20 = "serial=deadbeef,num_queues=8,dlfeat=1,learly_reset=1,lws_min=4,lws_opt=8,lmw_cunits=0"
LINE_0 = "serial=deadbeef,lver=0,nlbaf=5,lba_index=0"


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """As people make it, but 64 MiB."""
    path = tmp_path / "blknvme"
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=64"], check=True, capture_output=True)
    return path


@contextmanager
def host_of(directory: Path, backing: Path, line: str) -> Iterator[NvmeHost]:
    socket = directory / "nvme.sock"
    with daemon(directory, "--vfio-user", socket, "--store", backing, "--qemu-nvme", line), \
            VfioUserClient(str(socket), 64 * MIB) as client:
        client.negotiate()
        client.map_memory()
        host = NvmeHost(client)
        host.enable()
        host.create_queue()
        yield host
        host.close()


def identified(host: NvmeHost, opcode: int, *, nsid: int = 1, cns: int = 0) -> bytes:
    at = host.allocate(4096)
    assert host.admin(opcode, nsid, data=at, dwords=bytes([cns])).status == 0
    return host.get(at, 4096)


def test_a_12_device_has_the_blocks_that_the_file_has_room_for_and_keeps_its_content(
    tmp_path: Path, backing: Path
) -> None:
    for start in range(2):
        with host_of(tmp_path, backing, LINE_12) as host:
            assert identified(host, 0x06, cns=1)[4:24].rstrip() == b"deadbeef"
            group = ocssd12.Identity.parse(identified(host, 0xE2)).groups[0]
            # 64 MiB / (4 LUNs x 2 planes x 256 sectors x (4096 + 8) bytes)
            assert (group.num_ch, group.num_lun, group.num_pln, group.num_blk, group.num_pg) == (1, 4, 2, 7, 64)
            if start == 0:
                assert host.vector_write([0, 1, 2, 3], sectors(4), oobs(4)).status == 0
            done, data, oob = host.vector_read([0, 1, 2, 3], oob_bytes=16)
            assert (done.status, data, oob) == (0, sectors(4), oobs(4))


def test_a_20_device_has_as_much_flash_as_the_file_is_long(tmp_path: Path, backing: Path) -> None:
    for start in range(2):
        with host_of(tmp_path, backing, LINE_20) as host:
            g = ocssd20.Geometry.parse(identified(host, 0xE2))
            assert g.num_grp * g.num_pu * g.num_chk * g.clba * 4096 == 64 * MIB
            if start == 0:
                assert host.vector_write(list(range(8)), sectors(8), oobs(8)).status == 0
            done, data, _ = host.vector_read(list(range(8)))
            assert (done.status, data) == (0, sectors(8))


def test_without_lightnvm_it_is_a_disk_of_the_files_size(tmp_path: Path, backing: Path) -> None:
    for start in range(2):
        with host_of(tmp_path, backing, LINE_0) as host:
            ns = identify.IdentifyNamespace.parse(identified(host, 0x06))
            assert (ns.vs0, ns.lbaf[0].lbads) == (0, 9)
            assert 64 * MIB <= ns.nsze * 512 < 128 * MIB
            if start == 0:
                assert host.write_blocks(7, b"x" * 512, lba_bytes=512).status == 0
                assert host.io(0x00).status == 0
            assert host.read_blocks(7, 1, lba_bytes=512)[1] == b"x" * 512


def test_two_block_namespaces_are_two_halves_of_the_disk(tmp_path: Path, backing: Path) -> None:
    with host_of(tmp_path, backing, "lver=0,namespaces=2") as host:
        sizes = [identify.IdentifyNamespace.parse(identified(host, 0x06, nsid=nsid)).nsze for nsid in (1, 2)]
        assert sizes[0] == sizes[1]
        for nsid in (1, 2):
            assert host.write_blocks(0, bytes([nsid]) * 4096, nsid=nsid).status == 0
            assert host.write_blocks(sizes[0] - 1, bytes([nsid + 2]) * 4096, nsid=nsid).status == 0
        for nsid in (1, 2):
            assert host.read_blocks(0, 1, nsid=nsid)[1] == bytes([nsid]) * 4096
            assert host.read_blocks(sizes[0] - 1, 1, nsid=nsid)[1] == bytes([nsid + 2]) * 4096
            assert host.read_blocks(sizes[0], 1, nsid=nsid)[0].status == 0x4080
        ranges = host.put(struct.pack("<IIQ", 0, sizes[0], 0))
        assert host.io(0x09, nsid=1, address=ranges, count=16, dwords=struct.pack("<II", 0, 4)).status == 0
        assert host.admin(0x80, 1).status == 0
        assert host.read_blocks(0, 1, nsid=1)[1] == bytes(4096)
        assert host.read_blocks(0, 1, nsid=2)[1] == b"\x02" * 4096


@pytest.mark.parametrize(("line", "code", "says"), [
    (f"{LINE_12},lmetasize=64", 1, "the image was made with geometry.oob_bytes = 16, not 64"),
    (LINE_12.replace("lnum_lun=4", "lnum_lun=2"), 1, "the image was made with geometry.pus = 4, not 2"),
    ("lver=1,lchannels=1", 2, "lchannels"),
])
def test_a_line_that_is_not_the_images_is_refused(
    tmp_path: Path, backing: Path, line: str, code: int, says: str
) -> None:
    first = ["--vfio-user", tmp_path / "s", "--store", backing, "--run", "true"]
    assert run_daemon(*first, "--qemu-nvme", LINE_12).returncode == 0
    done = run_daemon(*first, "--qemu-nvme", line)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
