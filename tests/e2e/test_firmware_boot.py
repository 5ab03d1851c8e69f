"""The PC firmware reads our disk before any kernel does: a boot sector written over NBD starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.serve import serve
from tests.kit.guest import vhost_user_blk
from tests.kit.qemu import host_qemu
from tests.kit.requires import requires

EXIT_PORT_VALUE = 0x10
QEMU_EXIT_CODE = EXIT_PORT_VALUE << 1 | 1  # what -device isa-debug-exit makes of the value written to its port
MESSAGE = b"BOOTED FROM FLASH\r\n"
BOOT_SECTOR = bytes.fromhex(
    "fc"  # cld
    "31c0 8ed8 8ec0"  # ds = es = 0
    "b80102 bb007e b90200 b600 cd13"  # int 13h: read one sector, cylinder 0 head 0 sector 2, to 0000:7e00
    "720e"  # on failure: exit
    "be007e"  # si = 7e00h
    "ac 84c0 7406"  # next byte; zero: exit
    "baf803 ee ebf5"  # to the serial port 3f8h; loop
    f"ba0105 b0{EXIT_PORT_VALUE:02x} ee"  # exit: value to port 501h
    "f4 ebfd"  # halt
)


def boot_disk() -> bytes:
    """A boot sector with its signature, and the sector that it reads and prints."""
    return BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + MESSAGE.ljust(512, b"\0")


def test_the_firmware_boots_from_a_disk_that_an_nbd_client_wrote(tmp_path: Path) -> None:
    qemu, qemu_io = host_qemu(), requires("qemu-io", "qemu-utils")
    content = tmp_path / "boot.bin"
    content.write_bytes(boot_disk())
    with serve(tmp_path, "--size", "64M") as daemon:
        subprocess.run([qemu_io, "-f", "raw", "-c", f"write -s {content} 0 1024", daemon.nbd_uri], check=True)
        done = subprocess.run(
            [
                *(qemu.path, "-accel", "tcg", "-machine", "q35,memory-backend=mem", "-m", "64"),
                *("-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-nodefaults", "-nographic"),
                *("-serial", "stdio", "-device", "isa-debug-exit", *vhost_user_blk(qemu, daemon.vhost)),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
    assert MESSAGE in done.stdout
    assert done.returncode == QEMU_EXIT_CODE
