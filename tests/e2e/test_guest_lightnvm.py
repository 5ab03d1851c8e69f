"""Linux 5.10 with lightnvm sees our controller over vfio-user; its driver, pblk, nvme-cli and fio judge."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ocssd_daemon.nvme.raw20 import DESCRIPTOR
from ocssd_daemon.protocol.nvme import ocssd12, ocssd20
from ocssd_daemon.protocol.nvme.ocssd12 import BlockState
from ocssd_daemon.protocol.nvme.ocssd20 import ChunkState
from tests.e2e.jobs import (
    FIO,
    PBLK,
    appear,
    check_file_system,
    churn,
    create_pblk,
    fill,
    keep_ledger,
    ledger_line,
    make_file_system,
    remove_pblk,
    show,
    shown,
    sum_ledger,
    synced,
)
from tests.e2e.serve import ServedNvme, serve_nvme
from tests.kit.guest import Guest, lightnvm_guest, run_guest, vfio_user
from tests.kit.qemu import current_qemu

pytestmark = pytest.mark.timeout(900)  # several guests one after the other
VERSIONS = pytest.mark.parametrize("preset", ["pblk-20", "pblk-12"])
DEVICE = "/dev/nvme0n1"
BLOCKS_SYNCED = 6  # of a ledger, before something dies
TIMES_NS = {"read": 70_000, "write": 1_900_000, "erase": 3_000_000}


def options(**more: object) -> dict[str, object]:
    return {"qemu": current_qemu(), "image": lightnvm_guest(), "memory_mib": 512, **more}


def run(job: str, daemon: ServedNvme) -> str:
    return run_guest(job, vfio_user(daemon.vfio), **options())  # type: ignore[arg-type]


def boot(job: str, daemon: ServedNvme, **more: object) -> Guest:
    return Guest(job, vfio_user(daemon.vfio), **options(**more))  # type: ignore[arg-type]


# What nvme-cli shows, against what the daemon has.

BAD = {(0, 1, 7), (1, 3, 122)}  # group, PU, chunk: bad from the factory
LISTED = rf"""
{appear(DEVICE)}
nvme lnvm list | grep '^nvme0n1[^a-z]*gennvm'
nvme lnvm info | grep '^pblk'
{show("text", f"nvme lnvm id-ns {DEVICE}")}
{show("identity", f"nvme lnvm id-ns {DEVICE} -b")}
cat /sys/bus/pci/drivers/nvme/*/vendor /sys/bus/pci/drivers/nvme/*/device
"""
USE = f"""
{create_pblk(factory=True)}
{make_file_system(PBLK)} {fill(percent=2)} {churn(mib=8)}
dd if=/dev/urandom of=/mnt/kept bs=1M count=8; md5sum /mnt/kept > /tmp/sum
{check_file_system(PBLK)}
{remove_pblk()} {create_pblk(factory=False)}
mount -t ext4 {PBLK} /mnt; md5sum -c /tmp/sum
{check_file_system(PBLK)}
{remove_pblk()}
"""


def numbers(text: bytes) -> dict[str, int]:
    """The "name : value" lines of nvme-cli's id-ns."""
    lines = re.findall(r"^ *(\w[\w ]*?) *(?:\(ns\))? *: (\w+)", text.decode(), re.M)
    return {name: int(value, 0) for name, value in lines if value[0].isdigit()}


def chunk_log(said: str, name: str) -> np.ndarray:
    return np.frombuffer(shown(said, name), DESCRIPTOR)


def serving(directory: Path, preset: str):  # type: ignore[no-untyped-def]
    bad = ",".join("/".join(map(str, place)) for place in sorted(BAD))
    return serve_nvme(directory, "--preset", preset, "--set", f"faults.bad={bad}")


def check_common(said: str) -> None:
    assert "0x1d1d\n0x1f1f" in said
    assert "/mnt/kept: OK" in said


def test_20_the_guest_sees_the_chunks_that_the_daemon_has_and_pblk_verifies_on_them(tmp_path: Path) -> None:
    show_log = f"nvme lnvm chunk-log {DEVICE} -o binary"
    count = f"nvme lnvm chunk-log {DEVICE} | grep '^Total'\n"
    job = LISTED + show("before", show_log) + count + USE + show("after", show_log)
    with serving(tmp_path, "pblk-20") as daemon:
        said = run(job, daemon)
        g, media = daemon.info()["geometry"], daemon.stats()["media"]
    check_common(said)

    text, raw = numbers(shown(said, "text")), ocssd20.Geometry.parse(shown(said, "identity"))
    names = {"num_grp": "groups", "num_pu": "pus", "num_chk": "chunks", "clba": "sectors", "ws_min": "ws_min",
             "ws_opt": "ws_opt", "mw_cunits": "mw_cunits", "maxoc": "maxoc", "maxocpu": "maxocpu"}
    assert {name: text[name] for name in names} == {name: g[key] for name, key in names.items()}
    assert {name: raw[name] for name in names} == {name: g[key] for name, key in names.items()}
    assert (text["ver_major"], text["trdt"], text["twrt"], text["tcrst"]) == (2, *TIMES_NS.values())
    assert f"Total chunks in namespace: {g['groups'] * g['pus'] * g['chunks']}" in said

    before, after = chunk_log(said, "before"), chunk_log(said, "after")
    assert len(before) == len(after) == g["groups"] * g["pus"] * g["chunks"]
    bad = [(group * g["pus"] + pu) * g["chunks"] + chunk for group, pu, chunk in sorted(BAD)]
    assert np.flatnonzero(before["state"] == ChunkState.OFFLINE).tolist() == bad
    good = np.delete(before, bad)
    assert (good["state"] == ChunkState.FREE).all()
    assert not good["wp"].any()
    assert (before["cnlb"] == g["sectors"]).all()
    # Counts are powers of two, so that the packed address is also the sector's number.
    assert (before["slba"] == np.arange(len(before)) * g["sectors"]).all()

    used = np.delete(after, bad)
    assert media["chunks_reset"] == used["wear_index"].sum()
    assert media["chunks_open"] == (used["state"] == ChunkState.OPEN).sum()
    assert media["sectors_written"] >= used["wp"].sum() > 24 * 256
    assert (used["wp"][used["state"] == ChunkState.CLOSED] == g["sectors"]).all()
    assert set(np.unique(used["state"])) <= {ChunkState.FREE, ChunkState.OPEN, ChunkState.CLOSED}


def test_12_the_guest_sees_the_blocks_that_the_daemon_has_and_pblk_verifies_on_them(tmp_path: Path) -> None:
    def table(name: str, channel: int, lun: int) -> str:
        return show(name, f"nvme lnvm diag-bbtbl {DEVICE} -c {channel} -l {lun} -b")

    job = (
        LISTED
        + show("lun0-1-reply", f"nvme admin-passthru {DEVICE} --opcode=0xf2 -n 1 --cdw10={1 << 16} -r -l 320 -b")
        + f"nvme lnvm diag-bbtbl {DEVICE} -c 0 -l 1\n"
        + table("lun0-1", 0, 1) + table("lun1-2", 1, 2)
        + f"nvme lnvm diag-set-bbtbl {DEVICE} -c 1 -l 2 -p 1 -b 5 -v {int(BlockState.GROWN_BAD)}\n"
        + table("lun1-2-marked", 1, 2)
        + f"nvme lnvm diag-set-bbtbl {DEVICE} -c 1 -l 2 -p 1 -b 5 -v {int(BlockState.FREE)}\n"
        + table("lun1-2-free", 1, 2)
        + USE
    )  # fmt: skip
    with serving(tmp_path, "pblk-12") as daemon:
        said = run(job, daemon)
        info, media = daemon.info(), daemon.stats()["media"]
    check_common(said)

    g, planes = info["geometry"], info["settings"]["nvme"]["planes"]
    blocks, pages = g["chunks"] // planes, g["sectors"] // g["ws_min"]
    expected = {"verid": 1, "chnls": g["groups"], "luns": g["pus"], "plns": planes, "blks": blocks, "pgs": pages,
                "fpg_sz": g["ws_min"] * g["sector_bytes"], "csecs": g["sector_bytes"], "sos": g["oob_bytes"],
                "trdt": TIMES_NS["read"], "tprt": TIMES_NS["write"], "tbet": TIMES_NS["erase"]}
    text = numbers(shown(said, "text"))
    assert {name: text[name] for name in expected} == expected
    group = ocssd12.Identity.parse(shown(said, "identity")).groups[0]
    assert (group.num_ch, group.num_lun, group.num_pln, group.num_blk, group.num_pg) == (
        g["groups"], g["pus"], planes, blocks, pages)  # fmt: skip

    assert re.search(rf"tblks *: {g['chunks']}\ntfact *: 1\ntgrown *: 0\n", said)
    reply = shown(said, "lun0-1-reply")
    header = ocssd12.BadBlockHeader.parse(reply[:64])
    assert (header.tblid, header.tblks, header.tfact, header.tgrown) == (b"BBLT", g["chunks"], 1, 0)
    assert shown(said, "lun0-1") == reply[64:]
    bad = [chunk for group, pu, chunk in BAD if (group, pu) == (0, 1)]
    grown = [5 * planes + 1]
    for name, marked in (("lun0-1", bad), ("lun1-2", []), ("lun1-2-marked", grown), ("lun1-2-free", [])):
        states = np.frombuffer(shown(said, name), np.uint8)
        assert len(states) == g["chunks"]
        assert np.flatnonzero(states).tolist() == marked, name
        assert (states[marked] == (BlockState.GROWN_BAD if marked == grown else BlockState.BAD)).all()
    assert media["sectors_written"] > 24 * 256


# Power goes: of the guest's processors, of its QEMU, of our daemon.

ROOM = f"{FIO} --name=load --directory=/mnt --size=16M --rw=randwrite --bs=4k --iodepth=8 --do_verify=0"
LOAD = f"{ROOM} --time_based --runtime=3600 &\n"
LEDGER = "/mnt/ledger"


def recover() -> str:
    """pblk from what the flash holds, and its file system, after a crash."""
    return f"{create_pblk(factory=False)}\n/sbin/e2fsck -fp {PBLK} || test $? = 1\nmount -t ext4 {PBLK} /mnt\n"


def wait_for_blocks(guest: Guest, blocks: int) -> None:
    guest.wait_for(f"SYNCED {blocks}\n")


@VERSIONS
def test_what_was_synced_survives_a_reboot_in_the_guest_and_a_reset_by_qemu(tmp_path: Path, preset: str) -> None:
    """One QEMU, three lives of the guest: it reboots without a word to pblk, then its reset button is pressed."""
    job = f"""
echo "WHICH LIFE"; read life blocks
case $life in
first)
    {create_pblk(factory=True)} {make_file_system(PBLK)}
    dd if=/dev/urandom of=/mnt/kept bs=1M count=4; echo "KEPT $(md5sum < /mnt/kept)"; sync
    {LOAD}
    ( {keep_ledger(LEDGER)} ) &
    read now; reboot -f;;
second)
    {recover()} {sum_ledger(LEDGER, "$blocks")} echo "AGAIN $(md5sum < /mnt/kept)"
    {LOAD}
    {keep_ledger(LEDGER, "$blocks")};;
esac
{recover()} {sum_ledger(LEDGER, "$blocks")} echo "AGAIN $(md5sum < /mnt/kept)"
{check_file_system(PBLK)}
"""
    with serve_nvme(tmp_path, "--preset", preset) as daemon, boot(job, daemon, reboots=True) as guest:
        guest.wait_for("WHICH LIFE")
        guest.send("first 0")
        wait_for_blocks(guest, BLOCKS_SYNCED)
        guest.send("now")

        guest.wait_for("WHICH LIFE", times=2)
        first = synced(guest.console)
        guest.send(f"second {first}")
        wait_for_blocks(guest, first + BLOCKS_SYNCED)
        with guest.qmp() as qmp:
            qmp.execute("system_reset")

        guest.wait_for("WHICH LIFE", times=3)
        second = synced(guest.console)
        guest.send(f"third {second}")
        guest.finish()
        said = guest.console
    assert re.findall(r"LEDGER \w+", said) == [ledger_line(first), ledger_line(second)]
    kept = re.findall(r"^(?:KEPT|AGAIN) (\w{32})", said, re.M)
    assert len(kept) == 3
    assert len(set(kept)) == 1


@VERSIONS
def test_what_was_synced_survives_killed_guests_and_killed_daemons(tmp_path: Path, preset: str) -> None:
    """A guest is killed in the middle of writes; the next one too, and its daemon; a third one finds all of it, and a
    fourth one after a clean stop of the daemon.
    """
    store = ("--preset", preset, "--store", str(tmp_path / "flash.img"))

    def write(prepare: str, first: int) -> str:
        return f"{prepare} {sum_ledger(LEDGER, first)} {LOAD} {keep_ledger(LEDGER, first)}"

    def killed_while_writing(prepare: str, first: int) -> tuple[str, int]:
        with boot(write(prepare, first), daemon) as guest:
            wait_for_blocks(guest, first + BLOCKS_SYNCED)
            daemon.wait_for_counter("media", "sectors_written", 1024)
            guest.kill()
            return guest.console, synced(guest.console)

    with serve_nvme(tmp_path, *store) as daemon:
        fresh = create_pblk(factory=True) + make_file_system(PBLK) + f": > {LEDGER}\n"
        _, first = killed_while_writing(fresh, 0)
        said, second = killed_while_writing(recover(), first)
        assert ledger_line(first) in said
        daemon.kill()
        daemon.start()
        third = f"{recover()} {sum_ledger(LEDGER, second)} {check_file_system(PBLK)} {remove_pblk()}"
        assert ledger_line(second) in run(third, daemon)
        daemon.stop()
        daemon.start()
        fourth = f"{create_pblk(factory=False)} mount -t ext4 {PBLK} /mnt; {sum_ledger(LEDGER, second)}"
        assert ledger_line(second) in run(fourth + check_file_system(PBLK), daemon)


def test_a_user_of_the_reference_pastes_his_line_and_finds_his_device(tmp_path: Path) -> None:
    """README of the reference emulator: 1 GiB made by dd, four LUNs of two planes, 16 KiB pages, 512 a block."""
    line = ("serial=deadbeef,lver=1,lmtype=0,nlbaf=5,lba_index=3,mdts=10,namespaces=1,lnum_ch=1,lnum_lun=4,lnum_pln=2,"
            "lsec_size=4096,lsecs_per_pg=4,lpgs_per_blk=512")
    image = tmp_path / "blknvme"
    with open(image, "wb") as file:
        file.truncate(1 << 30)
    job = f"""
{appear(DEVICE)}
{show("text", f"nvme lnvm id-ns {DEVICE}")}
nvme id-ctrl /dev/nvme0 | grep -E '^(sn|mdts) '
{create_pblk(factory=True, last_pu=3)}
{make_file_system(PBLK)} {fill(percent=2)} {churn(mib=4)} {check_file_system(PBLK)}
{remove_pblk()}
"""
    with serve_nvme(tmp_path, "--store", image, "--size", "1G", "--qemu-nvme", line) as daemon:
        said = run(job, daemon)
        written = daemon.stats()["media"]["sectors_written"]
    text = numbers(shown(said, "text"))
    expected = {"chnls": 1, "luns": 4, "plns": 2, "pgs": 512, "fpg_sz": 16384, "csecs": 4096, "sos": 16}
    assert {name: text[name] for name in expected} == expected
    assert re.search(r"sn *: deadbeef", said)
    assert re.search(r"mdts *: 10\n", said)
    assert written > 1024
