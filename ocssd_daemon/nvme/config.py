"""Owns what an operator may choose about the controller, with the limits that the specification sets.

NVM Express Base 1.3, 3.1 (CAP) and 5.15 (Identify). Times are in the units of the fields they become.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .lifetime import Lifetime

PAGE_BYTES = 4096               # CAP.MPSMIN 0; MDTS counts in this unit


@dataclass(frozen=True)
class ControllerConfig:
    """One controller's identity and limits. ``mdts`` is a power of two of 4 KiB pages, 0 for no limit."""

    vid: int = 0x1D1D
    did: int = 0x1F1F
    ssvid: int = 0x1D1D
    ssid: int = 0x1F1F
    serial: str = "ocssd-0"
    model: str = "ocssd-daemon"
    firmware: str = "1.0"
    mdts: int = 7
    queue_pairs: int = 64       # I/O queue pairs
    entries: int = 1024         # of one queue
    stride: int = 0             # CAP.DSTRD
    page_shift_max: int = 0     # CAP.MPSMAX: 4096 << this is the largest page the host may choose
    aerl: int = 3               # 0's based
    acl: int = 3                # 0's based
    error_entries: int = 64
    write_cache: bool = True    # there is a volatile one, and it is on at first
    coalesce_commands: int = 0  # 0's based, feature 08h at first
    coalesce_100us: int = 0
    shadow_doorbells: bool = True
    lifetime: Lifetime = field(default_factory=Lifetime, compare=False)

    @property
    def max_transfer_bytes(self) -> int:
        """The largest data transfer of one command; 0 when nothing limits it."""
        return PAGE_BYTES << self.mdts if self.mdts else 0

    @property
    def vectors(self) -> int:
        """Interrupt vectors: one for the admin queue, one for each I/O completion queue."""
        return self.queue_pairs + 1

    @property
    def doorbell_bytes(self) -> int:
        """Length of the doorbell area that starts at register offset 0x1000."""
        return 2 * (self.queue_pairs + 1) * (4 << self.stride)
