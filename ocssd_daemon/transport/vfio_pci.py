"""Owns what PCI sees of the controller: configuration space, the sizes of the regions, interrupt indices.

PCI Local Bus 3.0, 6.1 (header), 6.8.2 (MSI-X); PCI Power Management 1.2, 3.2; PCI Express 2.0, 7.8
(capability). Registers of BAR0 are the controller's (nvme/registers.py). Nothing here waits or knows the
socket.
"""

from __future__ import annotations

from dataclasses import dataclass

from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.nvme.registers import DOORBELLS
from ocssd_daemon.protocol.vfio_user.wire import Irq, IrqFlags, Region, RegionFlags

CONFIG_BYTES = 4096
PAGE_BYTES = 4096
MSIX_ENTRY_BYTES = 16
CLASS_NVME = 0x010802

CAP_PM, CAP_MSIX, CAP_PCIE = 0x40, 0x50, 0x60
MSIX_BAR = 4
PCIE_FLR = 1 << 28
DEVCTL_FLR = 1 << 15


def _power_of_two(size_bytes: int) -> int:
    return 1 << (size_bytes - 1).bit_length()


@dataclass(frozen=True)
class RegionShape:
    size_bytes: int
    flags: int = RegionFlags.READ | RegionFlags.WRITE


@dataclass(frozen=True)
class IrqShape:
    count: int
    flags: int = IrqFlags.EVENTFD


def regions(config: ControllerConfig) -> dict[int, RegionShape]:
    """The regions that have a size; every other index is empty."""
    bar0 = max(4 * PAGE_BYTES, _power_of_two(DOORBELLS + config.doorbell_bytes))
    return {Region.BAR0: RegionShape(bar0), Region.BAR4: RegionShape(_msix_bar_bytes(config)),
            Region.CONFIG: RegionShape(CONFIG_BYTES)}


def irqs(config: ControllerConfig) -> dict[int, IrqShape]:
    """NORESIZE is left clear on MSI-X: QEMU then sends one message per new vector instead of all of them
    again.
    """
    automatic = IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
    return {Irq.INTX: IrqShape(1, automatic), Irq.MSIX: IrqShape(config.vectors), Irq.ERR: IrqShape(1),
            Irq.REQ: IrqShape(1)}


def _table_bytes(config: ControllerConfig) -> int:
    return -(-config.vectors * MSIX_ENTRY_BYTES // PAGE_BYTES) * PAGE_BYTES


def _msix_bar_bytes(config: ControllerConfig) -> int:
    return _power_of_two(_table_bytes(config) + PAGE_BYTES)


class ConfigSpace:
    """4096 bytes, each with a mask of the bits that a write changes. ``function_reset`` is set by a write of
    FLR.
    """

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._writable = bytearray(CONFIG_BYTES)
        self.function_reset = False
        self.reset()

    def reset(self) -> None:
        self.bytes = bytearray(CONFIG_BYTES)
        self._header()
        self._power_management()
        self._msix()
        self._express()

    def read(self, offset: int, count_bytes: int) -> bytes:
        return bytes(self.bytes[offset:offset + count_bytes])

    def write(self, offset: int, data: bytes) -> None:
        """Read-only bits stay as they are, whatever is written."""
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self.bytes[at] = self.bytes[at] & ~mask | value & mask
        if self._value(CAP_PCIE + 8, 2) & DEVCTL_FLR:
            self._put(CAP_PCIE + 8, 2, self._value(CAP_PCIE + 8, 2) & ~DEVCTL_FLR)
            self.function_reset = True

    @property
    def bar0_address(self) -> int:
        """Where the guest has put BAR0; 0: nowhere yet."""
        return self._value(0x10, 8) & ~0xF

    def _put(self, offset: int, width: int, value: int, writable: int = 0) -> None:
        self.bytes[offset:offset + width] = value.to_bytes(width, "little")
        if writable:
            self._writable[offset:offset + width] = writable.to_bytes(width, "little")

    def _value(self, offset: int, width: int) -> int:
        return int.from_bytes(self.bytes[offset:offset + width], "little")

    def _header(self) -> None:
        config, shapes = self._config, regions(self._config)
        self._put(0x00, 2, config.vid)
        self._put(0x02, 2, config.did)
        self._put(0x04, 2, 0, writable=0x0547)
        self._put(0x06, 2, 0x0010)                                  # capability list
        self._put(0x08, 4, CLASS_NVME << 8 | 0x01)
        self._put(0x0C, 1, 0, writable=0xFF)
        self._put(0x10, 8, 0x4, writable=-shapes[Region.BAR0].size_bytes & (1 << 64) - 1)   # 64-bit memory
        self._put(0x20, 4, 0x0, writable=-shapes[Region.BAR4].size_bytes & 0xFFFF_FFFF)
        self._put(0x2C, 2, config.ssvid)
        self._put(0x2E, 2, config.ssid)
        self._put(0x34, 1, CAP_PM)
        self._put(0x3C, 1, 0, writable=0xFF)
        self._put(0x3D, 1, 1)                                       # INTA#

    def _power_management(self) -> None:
        self._put(CAP_PM, 2, 0x01 | CAP_MSIX << 8)
        self._put(CAP_PM + 2, 2, 0x0003)
        self._put(CAP_PM + 4, 2, 0x0008, writable=0x0003)           # D0; no soft reset

    def _msix(self) -> None:
        self._put(CAP_MSIX, 2, 0x11 | CAP_PCIE << 8)
        self._put(CAP_MSIX + 2, 2, self._config.vectors - 1, writable=0xC000)
        self._put(CAP_MSIX + 4, 4, MSIX_BAR)
        self._put(CAP_MSIX + 8, 4, _table_bytes(self._config) | MSIX_BAR)

    def _express(self) -> None:
        self._put(CAP_PCIE, 2, 0x10)
        self._put(CAP_PCIE + 2, 2, 0x0002)                          # version 2, endpoint
        self._put(CAP_PCIE + 4, 4, PCIE_FLR | 1 << 15)              # role-based error reporting
        self._put(CAP_PCIE + 8, 2, 0x2810, writable=0xFFFF)
        self._put(CAP_PCIE + 12, 4, 0x0011)                         # 2.5 GT/s, x1
        self._put(CAP_PCIE + 16, 2, 0, writable=0x01F3)
        self._put(CAP_PCIE + 18, 2, 0x0011)
