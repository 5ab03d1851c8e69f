"""The bench's clients against our daemon, one second each: they negotiate, move data, check it, and print numbers.

And one guest that measures both NVMe devices, a second each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench import nbd, vfio, vfio_guest, vhost
from bench.daemon import Daemon, daemon, nvme_door
from bench.settings import Settings
from tests.kit.requires import requires

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler() -> str:
    return requires("gcc", "gcc")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("bench"), "256M") as ours:
        yield ours


VHOST_VARIANTS = {
    "sleeping": {},
    "polling": {"mode": "poll"},
    "two queues": {"queues": 2},
    "chained descriptors": {"indirect": 0},
    "one at a time": {"depth": 1},
}


@pytest.mark.parametrize("variant", VHOST_VARIANTS.values(), ids=VHOST_VARIANTS)
def test_vhost_client_reads_back_every_generation_it_wrote(running: Daemon, variant: dict[str, object]) -> None:
    result = vhost.run_client(running.vhost, verify=1, requests=20_000, span_bytes="32M", **variant)
    assert result["requests"] == (32 << 20) // 4096


@pytest.mark.parametrize("structured", [0, 1], ids=["simple replies", "structured replies"])
def test_nbd_client_reads_back_every_generation_it_wrote(running: Daemon, structured: int) -> None:
    result = nbd.run_client(running.nbd, verify=1, requests=20_000, span_bytes="32M", structured=structured)
    assert result["requests"] == (32 << 20) // 4096
    assert result["structured"] is bool(structured)


def test_both_clients_see_the_same_device_and_data(running: Daemon) -> None:
    vhost.run_client(running.vhost, op="write", pattern="sequential", requests=1024, span_bytes="4M")
    seen = nbd.run_client(running.nbd, op="read", requests=4096, span_bytes="4M", check_every=1)
    assert seen["device_bytes"] == vhost.device_bytes(running.vhost)


def test_a_second_of_sequential_reading_gives_throughput_and_latency(running: Daemon) -> None:
    vhost.fill(running.vhost)
    result = vhost.run_client(running.vhost, seconds=1, op="read", check_every=1, **vhost.STREAM)
    assert result["mb_per_s"] > 0
    assert 0 < result["p50_ns"] <= result["p99_ns"] <= result["max_ns"] * 1.02


def test_counters_of_the_daemon_count_what_the_client_wrote(running: Daemon) -> None:
    before = running.ftl()["user_sectors_written"]
    vhost.run_client(running.vhost, op="write", requests=5000)
    assert running.ftl()["user_sectors_written"] - before == 5000


def test_a_client_without_a_server_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No such file or directory"):
        vhost.run_client(tmp_path / "nobody.sock", seconds=1)


# ---- NVMe over vfio-user -----------------------------------------------------------------------------------------


def nvme_daemon(directory: Path, doorbells: str) -> AbstractContextManager[Daemon]:
    extra = [*nvme_door(directory), "--set", "nvme.namespaces=block", "--set", f"nvme.doorbells={doorbells}"]
    return daemon(directory, "256M", extra)


@pytest.fixture(scope="module")
def nvme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with nvme_daemon(tmp_path_factory.mktemp("nvme"), "trapped") as ours:
        yield ours


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with nvme_daemon(tmp_path_factory.mktemp("mapped"), "mapped") as ours:
        yield ours


@pytest.mark.parametrize("mode", ["sleep", "poll"])
@pytest.mark.parametrize("doorbells", ["trapped", "shadow", "mapped"])
def test_vfio_client_reads_back_every_generation_it_wrote(
    nvme: Daemon, mapped: Daemon, doorbells: str, mode: str
) -> None:
    socket = mapped.vfio if doorbells == "mapped" else nvme.vfio
    result = vfio.run_client(socket, verify=1, requests=20_000, span_bytes="32M", doorbells=doorbells, mode=mode)
    assert result["requests"] == (32 << 20) // 4096
    assert (result["traps"] < result["requests"]) or doorbells == "trapped"


def test_what_one_door_wrote_the_other_reads(nvme: Daemon) -> None:
    vhost.run_client(nvme.vhost, op="write", pattern="sequential", requests=1024, span_bytes="4M")
    seen = vfio.run_client(nvme.vfio, op="read", requests=4096, span_bytes="4M", check_every=1, queues=2)
    assert seen["device_bytes"] == vhost.device_bytes(nvme.vhost)


def test_vector_commands_of_64_sectors_carry_their_data(tmp_path: Path) -> None:
    small = {**vfio.VECTOR, "span_bytes": "32M"}
    with daemon(tmp_path, "2G", ["--preset", "pblk-20"], doors=nvme_door) as ours:
        vfio.run_client(ours.vfio, op="write", requests=(32 << 20) // vfio.VECTOR_BYTES, **small)
        result = vfio.run_client(ours.vfio, op="read", requests=500, check_every=1, **small)
    assert result["requests"] == 500


def test_a_guest_measures_both_devices_and_pblk(tmp_path: Path) -> None:
    rows = list(vfio_guest.rows(Settings(tmp_path, rounds=1, seconds=1)))
    assert [bool(row.ours) for row in rows] == [True] * (len(vfio_guest.CASES) + 2)
    assert [bool(row.peer) for row in rows] == [True] * len(vfio_guest.CASES) + [False] * 2
