"""``ocssd create`` and ``ocssd import``: images made like, and from, those of the reference's qemu-img."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ocssd_daemon import Device
from ocssd_daemon.cli.client import main
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.store import StoreError, open_file
from ocssd_daemon.nvme.reference_image import ReferenceImage
from tests.kit.daemon import run_daemon
from tests.kit.reference_image import CLOSED, FREE, NO_WP, OFFLINE, OPEN, ReferenceWriter
from tests.nvme.test_rules20 import oobs, sectors


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def good(*words: object) -> dict[str, Any]:
    done = run(*words, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# ---- create ------------------------------------------------------------------------------------------------------


def test_create_takes_every_option_of_qemu_img(tmp_path: Path) -> None:
    line = ("num_grp=2,num_pu=3,num_chk=12,num_sec=256,sec_size=8k,md_size=32,num_ns=2,mccap=7,ws_min=8,ws_opt=16,"
            "mw_cunits=48,preallocation=off,size=1G,nocow=on")
    made = good("create", "--qemu-img", line, tmp_path / "image")
    assert made["geometry"] == {
        "groups": 4, "pus": 3, "chunks": 12, "sectors": 256, "sector_bytes": 8192, "oob_bytes": 32, "ws_min": 8,
        "ws_opt": 16, "mw_cunits": 48, "maxoc": 0, "maxocpu": 0}
    assert "--set nvme.multi_reset=true --set nvme.namespaces=ocssd20,ocssd20" in made["serve"]
    assert [note.partition(":")[0] for note in made["notes"]] == ["size", "nocow"]
    store = open_file(str(tmp_path / "image"), Geometry())
    assert (store.geometry.groups, store.is_fresh) == (4, True)
    store.close()


def test_create_without_options_has_the_defaults_of_qemu_img_which_its_help_misnames(tmp_path: Path) -> None:
    made = good("create", "--qemu-img", "", tmp_path / "image")
    assert [made["geometry"][key] for key in ("groups", "pus", "chunks", "sectors")] == [2, 8, 60, 4096]
    assert made["raw_bytes"] == 15 << 30
    assert os.stat(tmp_path / "image").st_blocks * 512 < 64 << 20, "the file is not sparse"


def test_create_takes_our_own_settings_and_presets(tmp_path: Path) -> None:
    made = good("create", "--preset", "pblk-12", "--set", "geometry.pus=2", tmp_path / "image")
    assert (made["geometry"]["pus"], made["geometry"]["chunks"]) == (2, 256)
    assert "nvme.namespaces=ocssd12" in made["serve"]
    assert "nvme.planes=2" in made["serve"]
    assert good("create", "--size", "64M", tmp_path / "sized")["raw_bytes"] == 64 << 20


def test_preallocation_takes_the_room_at_once(tmp_path: Path) -> None:
    good("create", "--qemu-img", "num_grp=1,num_pu=1,num_chk=2,num_sec=256,preallocation=falloc", tmp_path / "image")
    assert os.stat(tmp_path / "image").st_blocks * 512 >= 2 << 20


@pytest.mark.parametrize(("words", "code", "says"), [
    (["--qemu-img", "ws_min=0"], 2, "ws_min=0 (--qemu-img): must be from 1 to 4096"),
    (["--qemu-img", "ws_min=3"], 2, "geometry.ws_opt=8 (--qemu-img): must be a multiple of ws_min (3)"),
    (["--qemu-img", "num_grps=3"], 2, "did you mean num_grp?"),
    (["--qemu-img", "num_grp"], 2, "num_grp= (--qemu-img): needs a value"),
    (["--qemu-img", "num_pu=x"], 2, "num_pu=x (--qemu-img): must be a number"),
    (["--qemu-img", "sec_size=1000"], 2, "geometry.sector_bytes=1000 (--qemu-img): must be a power of two"),
    (["--qemu-img", "mccap=8"], 2, "bit 0 vector copy"),
    (["--qemu-img", "num_ns=200"], 2, "geometry.groups=400"),
    (["--qemu-img", "preallocation=maybe"], 2, "must be one of off, metadata, falloc, full"),
    (["--set", "nvme.mdts=3"], 2, "nvme.mdts=3 (--set): an image has a geometry only"),
    (["--set", "geometry.chunk=3"], 2, "geometry.chunk"),
])
def test_create_names_what_is_wrong_and_leaves_nothing(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    done = run("create", *words, tmp_path / "image")
    assert (done.exit_code, says in done.output) == (code, True), done.output
    assert list(tmp_path.iterdir()) == []


def test_create_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"my thesis")
    assert "left alone" in run("create", path).output
    assert path.read_bytes() == b"my thesis"
    good("create", tmp_path / "other")
    done = run("create", tmp_path / "other")
    assert (done.exit_code, "is an image already" in done.output) == (1, True)


# ---- import ------------------------------------------------------------------------------------------------------


def imported(tmp_path: Path, writer: ReferenceWriter, *words: str) -> tuple[dict[str, Any], Device]:
    made = good("import", writer.path, tmp_path / "ours", *words)
    return made, Device(store=str(tmp_path / "ours"))


def test_states_write_pointers_wear_data_and_oob_are_carried_over(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    writer.chunk(0, CLOSED, wp=64, wear=3)
    writer.write(0, 0, sectors(64), oobs(64))
    writer.chunk(7, OPEN, wp=40, wear=200)
    writer.write(7, 0, sectors(40, seed=9), oobs(40))
    writer.chunk(8, CLOSED, wp=20)                                      # closed early by a failed write
    writer.write(8, 0, sectors(20, seed=5), oobs(20))
    writer.chunk(9, OFFLINE, wp=NO_WP, wear=255)
    made, ssd = imported(tmp_path, writer)
    assert made["chunks"] == {"free": 20, "closed": 2, "open": 1, "offline": 1}
    assert (made["sectors"], made["namespaces"], made["notes"]) == (124, 1, [])
    with ssd:
        log = ssd.chunk_log()
        assert log[["state", "wear_index"]][[0, 7, 8, 9, 10]].tolist() == [
            (CLOSED, 3), (OPEN, 200), (CLOSED, 0), (OFFLINE, 255), (FREE, 0)]
        assert log["wp"][[0, 7, 8]].tolist() == [64, 40, 20]
        status, failed, data, oob = ssd.read(ssd.lba(chunk=0, sector=range(64)))
        assert (status, failed, data.tobytes(), oob.tobytes()) == (0, 0, sectors(64), oobs(64))
        _, _, data, oob = ssd.read(ssd.lba(pu=1, chunk=1, sector=range(16)))    # 40 - mw_cunits are readable
        assert (data.tobytes(), oob.tobytes()) == (sectors(16, seed=9), oobs(16))
        # Writing goes on where it stood.
        more = np.frombuffer(sectors(24), np.uint8).reshape(24, 4096)
        assert ssd.write(ssd.lba(pu=1, chunk=1, sector=range(40, 64)), more) == (0, 0)
        _, _, data, _ = ssd.read(ssd.lba(pu=1, chunk=1, sector=range(64)))
        assert data.tobytes() == sectors(40, seed=9) + sectors(24)


def test_several_namespaces_become_groups_of_one_device(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src", num_ns=3, num_grp=1)
    for ns in range(3):
        writer.chunk(2, CLOSED, wp=64, ns=ns)
        writer.write(2, 0, sectors(64, seed=ns), oobs(64), ns=ns)
    made, ssd = imported(tmp_path, writer)
    assert "nvme.namespaces=ocssd20,ocssd20,ocssd20" in made["serve"]
    with ssd:
        assert ssd.geometry.groups == 3
        for ns in range(3):
            assert ssd.read(ssd.lba(group=ns, chunk=2, sector=range(64)))[2].tobytes() == sectors(64, seed=ns)


def test_a_random_chunk_may_be_read_as_a_whole(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src", ws=(4, 8, 0))
    writer.chunk(1, OPEN, wp=0, kind=2)
    writer.write(1, 60, sectors(4), oobs(4))
    _, ssd = imported(tmp_path, writer)
    with ssd:
        assert ssd.read(ssd.lba(chunk=1, sector=range(60, 64)))[2].tobytes() == sectors(4)


def test_sparse_stays_sparse_and_large_geometries_are_quick(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src", num_grp=2, num_pu=8, num_chk=60, num_sec=4096)       # 15 GiB
    writer.chunk(500, CLOSED, wp=4096)
    writer.write(500, 100, sectors(4), oobs(4))
    good("import", writer.path, tmp_path / "ours")
    l2p_and_table = 4 * 60 * 16 * 4096 + (4 << 20)
    assert os.stat(tmp_path / "ours").st_blocks * 512 < l2p_and_table + (4 << 20)
    with Device(store=str(tmp_path / "ours")) as ssd:
        lbas = ssd.lba(*divmod(500 // 60, 8), 500 % 60, range(100, 104))
        assert ssd.read(lbas)[2].tobytes() == sectors(4)


def test_what_the_emulator_lets_overlap_is_said(tmp_path: Path) -> None:
    """With 2 MiB of chunk descriptors it places the OOB two sectors too early."""
    writer = ReferenceWriter(tmp_path / "src", num_grp=16, num_pu=16, num_chk=256, num_sec=1, ws=(1, 1, 0))
    made = good("import", writer.path, tmp_path / "ours")
    assert made["notes"] == ["the last 2 sectors of each namespace share bytes with its first OOB entries, as the "
                             "emulator laid them out"]


@pytest.mark.parametrize(("shape", "says"), [
    ({"header": {"magic": 1}}, "is no image of qemu-img's format ocssd"),
    ({"header": {"version": 2}}, "version = 2: must be 1"),
    ({"header": {"num_ns": 0}}, "num_ns = 0: must be from 1 to 256"),
    ({"header": {"num_ns": 0xFFFFFFFF}}, "num_ns = 4294967295: must be from 1 to 256"),
    ({"header": {"num_ns": 2}}, "is cut short"),
    ({"header": {"sec_size": 4097}}, "sec_size = 4097: must be a power of two"),
    ({"header": {"sec_size": 1 << 63}}, "sec_size"),
    ({"header": {"md_size": 1 << 31}}, "md_size = 2147483648: must be at most 4096"),
    ({"header": {"ns_size": 77}}, "ns_size = 77: a namespace of this geometry has"),
    ({"header": {"ns_size": 1 << 63}}, "ns_size"),
    ({"sec_size": 512}, "sec_size = 512: must be at least 4096: with smaller sectors the emulator wrote"),
    ({"ws": (0, 8, 24)}, "geometry.ws_min = 0: must be between 1 and 4096; give another with --set geometry.ws_min="),
    ({"ws": (4, 8, 25)}, "geometry.mw_cunits = 25: must be a multiple of ws_min (4)"),
])
def test_an_image_that_cannot_be_is_refused_and_nothing_is_made(
    tmp_path: Path, shape: dict[str, Any], says: str
) -> None:
    writer = ReferenceWriter(tmp_path / "src", **shape)
    done = run("import", writer.path, tmp_path / "ours")
    assert (done.exit_code, says in done.output) == (1, True), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(("chunk", "says"), [
    ({"state": 3}, "state of chunk grp=1 pu=0 chk=1 of namespace 1 = 3: must be 1 free"),
    ({"kind": 0x11}, "type of chunk grp=1 pu=0 chk=1 of namespace 1 = 17"),
    ({"cnlb": 65}, "cnlb of chunk grp=1 pu=0 chk=1 of namespace 1 = 65"),
    ({"slba": 5}, "slba of chunk grp=1 pu=0 chk=1 of namespace 1 = 5"),
    ({"state": OPEN, "wp": 64}, "wp of chunk grp=1 pu=0 chk=1 of namespace 1 = 64: lies beyond"),
    ({"state": CLOSED, "wp": (1 << 64) - 2}, "wp of chunk grp=1 pu=0 chk=1 of namespace 1 = 18446744073709551614"),
    ({"state": FREE, "wp": 4}, "wp of chunk"),
])
def test_a_chunk_that_cannot_be_is_refused_by_its_place(tmp_path: Path, chunk: dict[str, Any], says: str) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    writer.chunk(13, **chunk)
    done = run("import", writer.path, tmp_path / "ours")
    assert (done.exit_code, says in done.output) == (1, True), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_limit_that_is_wrong_can_be_replaced(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src", ws=(0, 8, 25))
    made = good("import", writer.path, tmp_path / "ours", "--set", "geometry.ws_min=4",
                "--set", "geometry.mw_cunits=24")
    assert (made["geometry"]["ws_min"], made["geometry"]["mw_cunits"]) == (4, 24)
    done = run("import", writer.path, tmp_path / "other", "--set", "geometry.pus=4")
    assert (done.exit_code, "an import can replace geometry.ws_min" in done.output) == (2, True)


def test_the_source_is_only_read_and_the_target_never_overwritten(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    before = writer.path.read_bytes()
    target = tmp_path / "ours"
    target.write_bytes(b"my thesis")
    assert run("import", writer.path, target).exit_code == 1
    assert run("import", writer.path, writer.path).exit_code == 1
    assert run("import", tmp_path / "none", tmp_path / "x").output.endswith("No such file or directory\n")
    assert run("import", tmp_path, tmp_path / "x").output == f"ocssd: {tmp_path}: is not a regular file\n"
    assert (writer.path.read_bytes(), target.read_bytes()) == (before, b"my thesis")


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    os.truncate(writer.path, writer.file_bytes - 1)
    assert "is cut short" in run("import", writer.path, tmp_path / "ours").output
    os.truncate(writer.path, 20)
    assert "is cut short: the header" in run("import", writer.path, tmp_path / "ours").output


def test_the_daemon_refuses_the_references_image_and_says_how_to_import_it(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    done = run_daemon("--nbd", "unix:-", "--store", writer.path)
    assert done.returncode == 1
    assert f"ocssd import {writer.path} NEW" in done.stderr
    with pytest.raises(StoreError, match="ocssd import"):
        open_file(str(writer.path), Geometry())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), number)

    writer = ReferenceWriter(tmp_path / "src")
    monkeypatch.setattr(ReferenceImage, "_set_chunks", interrupted)
    done = run("import", writer.path, tmp_path / "ours")
    assert done.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_file_that_is_called_like_half_an_import_is_nobodys_to_delete(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "ours.part")
    before = writer.path.read_bytes()
    good("import", writer.path, tmp_path / "ours")
    assert writer.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "ours.part"]


def test_an_image_that_was_made_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def also_made(*_: object) -> None:
        monkeypatch.undo()
        good("create", tmp_path / "ours", "--set", "geometry.chunks=9")

    writer = ReferenceWriter(tmp_path / "src")
    monkeypatch.setattr(ReferenceImage, "_set_chunks", also_made)
    done = run("import", writer.path, tmp_path / "ours")
    assert (done.exit_code, "is an image already" in done.output) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "src"]
    store = open_file(str(tmp_path / "ours"), Geometry())
    assert store.geometry.chunks == 9
    store.close()


def test_a_zero_filled_file_may_become_an_image(tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "src")
    (tmp_path / "ours").write_bytes(bytes(1 << 20))
    assert good("import", writer.path, tmp_path / "ours")["sectors"] == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = ReferenceWriter(tmp_path / "src")
    monkeypatch.setattr(ReferenceImage, "_copy_span", full)
    writer.chunk(0, CLOSED, wp=64)
    done = run("import", writer.path, tmp_path / "ours")
    assert (done.exit_code, done.output) == (1, f"ocssd: {tmp_path}/ours: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
