"""Owns the controller registers of BAR0 below the doorbells (NVM Express Base 1.3, 3.1): widths, access,
enable, shutdown.

Answers every access at once and never waits: enabling takes effect on the write itself. CC stays readable
and writable while the controller is disabled (newer kernels write it, read it back and then set EN).
Unaligned, oversized and read-only accesses change nothing, reads of reserved space give zeroes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .config import PAGE_BYTES, ControllerConfig
from .ports import QueueShape

DOORBELLS = 0x1000
VERSION_1_3 = 0x00010300

CC_EN = 1 << 0
CC_WRITABLE = 0x00FFFFF1
CSTS_RDY = 1 << 0
CSTS_CFS = 1 << 1
CSTS_SHST_DONE = 2 << 2
SQE_SHIFT, CQE_SHIFT = 6, 4
AQA_MASK = 0x0FFF_0FFF
CSS_NVM = 1 << 37
TIMEOUT_500MS = 0xF


@dataclass(frozen=True)
class Register:
    """``width`` in bytes; ``mask`` of the bits that a plain write changes."""

    offset: int
    width: int
    mask: int = 0


TABLE = {
    "cap": Register(0x00, 8), "vs": Register(0x08, 4), "intms": Register(0x0C, 4, 0xFFFF_FFFF),
    "intmc": Register(0x10, 4, 0xFFFF_FFFF), "cc": Register(0x14, 4, CC_WRITABLE), "csts": Register(0x1C, 4),
    "nssr": Register(0x20, 4), "aqa": Register(0x24, 4, AQA_MASK),
    "asq": Register(0x28, 8, 0xFFFF_FFFF_FFFF_F000), "acq": Register(0x30, 8, 0xFFFF_FFFF_FFFF_F000),
    "cmbloc": Register(0x38, 4), "cmbsz": Register(0x3C, 4),
}
SIZE_BYTES = 0x40


def capabilities(config: ControllerConfig) -> int:
    """CAP: MQES, contiguous queues required, timeout, stride, the NVM command set, page sizes."""
    return (config.entries - 1 | 1 << 16 | TIMEOUT_500MS << 24 | config.stride << 32 | CSS_NVM
            | config.page_shift_max << 52)


class Registers:
    """The register file. ``enable`` and ``disable`` are called on the edges of CC.EN, ``shutdown`` on CC.SHN.

    ``enable(admin_sq, admin_cq, page_bytes)`` returns whether the admin queues could be set up. ``publish(image)``
    is told what reads give, whenever that changes, for those who answer them without asking here.
    """

    def __init__(self, config: ControllerConfig, enable: Callable[[QueueShape, QueueShape, int], bool],
                 disable: Callable[[], None], shutdown: Callable[[], None],
                 interrupt_mask: Callable[[int], None], publish: Callable[[bytes], None]) -> None:
        self._config = config
        self._enable, self._disable, self._shutdown = enable, disable, shutdown
        self._interrupt_mask, self._publish = interrupt_mask, publish
        self.values = dict.fromkeys(TABLE, 0)
        self.values |= {"cap": capabilities(config), "vs": VERSION_1_3}
        self._after = {"intms": self._mask_set, "intmc": self._mask_cleared, "cc": self._configured}
        publish(self._image())

    @property
    def ready(self) -> bool:
        return bool(self.values["csts"] & CSTS_RDY)

    def fatal(self) -> None:
        """The controller cannot go on (3.1.6, CSTS.CFS); the host resets it."""
        self.values["csts"] |= CSTS_CFS
        self._publish(self._image())

    # Access: the file is one little-endian byte array, as PCI sees it.

    def read(self, offset: int, count_bytes: int) -> bytes:
        return self._image()[offset:offset + count_bytes].ljust(count_bytes, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Take a 4- or 8-byte aligned write; anything else is ignored."""
        if len(data) not in (4, 8) or offset % 4:
            return
        for piece in range(0, len(data), 4):
            self._write_dword(offset + piece, int.from_bytes(data[piece:piece + 4], "little"))
        self._publish(self._image())

    def _image(self) -> bytes:
        image = bytearray(SIZE_BYTES)
        for name, register in TABLE.items():
            image[register.offset:register.offset + register.width] = \
                self.values[name].to_bytes(register.width, "little")
        return bytes(image)

    def _write_dword(self, offset: int, value: int) -> None:
        for name, register in TABLE.items():
            if register.offset <= offset < register.offset + register.width and register.mask:
                self._assign(name, register, (offset - register.offset) * 8, value)

    def _assign(self, name: str, register: Register, shift: int, value: int) -> None:
        old, lane = self.values[name], 0xFFFF_FFFF << shift
        self.values[name] = (old & ~lane | value << shift) & register.mask
        after = self._after.get(name)
        if after is not None:
            after(old)

    # Effects.

    def _mask_set(self, old: int) -> None:
        self._set_mask(old | self.values["intms"])

    def _mask_cleared(self, old: int) -> None:
        self._set_mask(old & ~self.values["intmc"])

    def _set_mask(self, mask: int) -> None:
        self.values["intms"] = self.values["intmc"] = mask
        self._interrupt_mask(mask)

    def _configured(self, old: int) -> None:
        new = self.values["cc"]
        if new & CC_EN and not old & CC_EN:
            self._start()
        elif old & CC_EN and not new & CC_EN:
            self.reset(keep_admin=True)
            self.values["cc"] = new
        if new >> 14 & 3 and not old >> 14 & 3:
            self._shutdown()
            self.values["csts"] |= CSTS_SHST_DONE
        elif not new >> 14 & 3:
            self.values["csts"] &= ~CSTS_SHST_DONE

    def _start(self) -> None:
        cc, aqa = self.values["cc"], self.values["aqa"]
        page_shift = cc >> 7 & 0xF
        sq = QueueShape(0, self.values["asq"], (aqa & 0xFFF) + 1)
        cq = QueueShape(0, self.values["acq"], (aqa >> 16 & 0xFFF) + 1)
        sensible = (page_shift <= self._config.page_shift_max and not cc >> 4 & 7 and not cc >> 11 & 7
                    and min(sq.entries, cq.entries) >= 2 and sq.address and cq.address)
        if sensible and self._enable(sq, cq, PAGE_BYTES << page_shift):
            self.values["csts"] = CSTS_RDY
        else:
            self.fatal()

    def reset(self, *, keep_admin: bool = False) -> None:
        """Controller reset (7.3.2). The admin queue registers survive a reset by CC.EN, not one by the
        bus.
        """
        self._disable()
        kept = ("cap", "vs", "aqa", "asq", "acq") if keep_admin else ("cap", "vs")
        self.values = {name: self.values[name] if name in kept else 0 for name in TABLE}
        self._publish(self._image())
