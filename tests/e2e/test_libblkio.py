"""libblkio's virtio-blk-vhost-user driver, as qemu-img links it: a second vhost-user front end, and no guest."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.e2e.serve import Served, serve
from tests.kit.qemu import current_qemu

MIB = 1 << 20


def image_options(daemon: Served) -> str:
    return f"driver=virtio-blk-vhost-user,path={daemon.vhost},cache.direct=on"


def qemu_img(*arguments: str) -> str:
    return run_sibling("qemu-img", *arguments)


def run_sibling(program: str, *arguments: str) -> str:
    argv = [current_qemu().sibling(program), *arguments]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_an_image_copied_in_through_vhost_user_compares_equal_through_nbd(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB) + b"\xa5" * MIB + random.Random(1).randbytes(30 * MIB))
    with serve(tmp_path, "--size", "64M") as daemon:
        target = ["--target-image-opts", image_options(daemon)]
        qemu_img("convert", "-n", "-f", "raw", str(image), *target)
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", str(image), daemon.nbd_uri)


def test_random_writes_and_flushes_with_many_in_flight_all_complete(tmp_path: Path) -> None:
    with serve(tmp_path, "--size", "64M") as daemon:
        load = ["-w", "-c", "20000", "-d", "64", "-s", "4096", "-S", "1044480", "--flush-interval", "500"]
        assert "completed" in qemu_img("bench", *load, "-t", "none", "--image-opts", image_options(daemon))
        assert daemon.stats()["transports"]["vhost-user"]["errors"] == 0


def test_write_zeroes_and_discard_give_space_back_and_read_as_zeroes(tmp_path: Path) -> None:
    with serve(tmp_path, "--size", "64M") as daemon:
        said = run_sibling(
            "qemu-io",
            *("-d", "unmap", "-t", "none", "--image-opts", image_options(daemon)),
            *("-c", "write -P 0xa5 0 4M", "-c", "write -z -u 1M 1M", "-c", "discard 2M 1M"),
            *("-c", "read -P 0 1M 2M", "-c", "read -P 0xa5 0 1M", "-c", "read -P 0xa5 3M 1M"),
        )
        assert "failed" not in said
        assert daemon.stats()["ftl"]["mapped_sectors"] == 2 * MIB // 4096
        assert daemon.stats()["transports"]["vhost-user"]["errors"] == 0
