"""The Linux kernel's NBD client, in a guest, uses our export over TCP."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.jobs import check_file_system, churn, fill, make_file_system
from tests.e2e.serve import serve
from tests.kit.guest import run_guest

HOST_SEEN_FROM_GUEST = "10.0.2.2"
DEVICE = "/dev/nbd0"


def attach(port: int, options: str = "") -> str:
    return f"""
/sbin/nbd-client {HOST_SEEN_FROM_GUEST} {port} {DEVICE} {options}
test "$(blockdev --getsize64 {DEVICE})" -gt 0
"""


def detach() -> str:
    return f"/sbin/nbd-client -d {DEVICE}\n"


def test_the_kernel_client_makes_a_file_system_and_verifies_data_on_it(tmp_path: Path) -> None:
    use = make_file_system(DEVICE) + fill(percent=50) + churn(mib=24)
    use += f"rm /mnt/data; fstrim -v /mnt; {check_file_system(DEVICE)}"
    with serve(tmp_path, "--size", "128M") as daemon:
        run_guest(attach(daemon.nbd_port) + use + detach(), network=True)
        assert daemon.stats()["transports"]["nbd"]["errors"] == 0


def test_four_kernel_connections_write_the_same_disk(tmp_path: Path) -> None:
    with serve(tmp_path, "--size", "128M") as daemon:
        job = attach(daemon.nbd_port, "-C 4") + make_file_system(DEVICE) + fill(percent=50) + churn(mib=16)
        run_guest(job + check_file_system(DEVICE) + detach(), network=True)
        assert daemon.stats()["transports"]["nbd"]["connections"] >= 4
