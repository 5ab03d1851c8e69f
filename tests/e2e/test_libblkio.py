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
    argv = [current_qemu().sibling("qemu-img"), *arguments]
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
