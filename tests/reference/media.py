"""The flash rules once more, as plainly as Python can say them: dictionaries and if-statements.

An independent model of OCSSD 2.0 sections 2.3-2.6 that the compiled core is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

OK, INVALID_FIELD, WRITE_FAULT, UNWRITTEN = 0, 0x002, 0x280, 0x287
OFFLINE, INVALID_RESET, OUT_OF_ORDER, CLOSED_EARLY = 0x2C0, 0x2C1, 0x2F2, 0x2F1


@dataclass
class Chunk:
    state: str = "FREE"
    wp: int = 0
    random: bool = False  # random-write chunk: anywhere, any number, OPEN until it is reset
    pe_cycles: int = 0
    fail_write: bool = False
    fail_reset: bool = False
    sectors: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)


class ReferenceMedia:
    """Chunks by (pu, chunk); pu counts over groups."""

    def __init__(self, geometry, early_reset: bool = True, multi_reset: bool = False) -> None:
        self.g = geometry
        self.early_reset = early_reset
        self.multi_reset = multi_reset
        self.blank = (bytes(geometry.sector_bytes), bytes(geometry.oob_bytes))  # a gap in a random chunk
        self.chunks = {(pu, c): Chunk() for pu in range(geometry.total_pus) for c in range(geometry.chunks)}

    def _may_open(self, pu: int) -> bool:
        is_open = [key for key, chunk in self.chunks.items() if chunk.state == "OPEN"]
        here = [key for key in is_open if key[0] == pu]
        return (self.g.maxoc == 0 or len(is_open) < self.g.maxoc) and (
            self.g.maxocpu == 0 or len(here) < self.g.maxocpu
        )

    def write(self, pu: int, chunk: int, sector: int, payload: list[tuple[bytes, bytes]]) -> int:
        c = self.chunks[pu, chunk]
        n = len(payload)
        if c.state in ("OFFLINE", "CLOSED") or sector + n > self.g.sectors:
            return WRITE_FAULT
        if n % self.g.ws_min and not c.random:
            return INVALID_FIELD
        if sector != c.wp and not c.random:
            return OUT_OF_ORDER
        if c.state == "FREE" and not self._may_open(pu):
            return WRITE_FAULT
        c.state = "OPEN"
        if c.fail_write:
            c.fail_write, c.fail_reset, c.state = False, True, "CLOSED"
            return CLOSED_EARLY
        for i, item in enumerate(payload):
            c.sectors[sector + i] = item
        c.wp = max(c.wp, sector + n)
        if c.wp == self.g.sectors and not c.random:
            c.state = "CLOSED"
        return OK

    def copy(self, sources: list[tuple[int, int, int]], pu: int, chunk: int, sector: int) -> int:
        """Sources are (pu, chunk, sector); they are all read before anything is written."""
        if not all(self.readable(*source) for source in sources):
            return UNWRITTEN
        payload = [self.chunks[p, c].sectors.get(s, self.blank) for p, c, s in sources]
        return self.write(pu, chunk, sector, payload)

    def readable(self, pu: int, chunk: int, sector: int) -> bool:
        c = self.chunks[pu, chunk]
        if c.state == "CLOSED" or (c.random and c.state == "OPEN"):
            return sector < c.wp
        return c.state == "OPEN" and sector < c.wp - self.g.mw_cunits

    def read(self, pu: int, chunk: int, sector: int) -> tuple[int, bytes | None, bytes | None]:
        if not self.readable(pu, chunk, sector):
            return UNWRITTEN, None, None
        return OK, *self.chunks[pu, chunk].sectors.get(sector, self.blank)

    def reset(self, pu: int, chunk: int) -> int:
        c = self.chunks[pu, chunk]
        if c.state == "OFFLINE":
            return OFFLINE
        if c.state == "FREE" and not self.multi_reset:
            return INVALID_RESET
        if c.state == "OPEN" and not self.early_reset:
            return INVALID_RESET
        c.pe_cycles += 1
        if c.fail_reset:
            c.state = "OFFLINE"
            return INVALID_RESET
        c.state, c.wp = "FREE", 0
        c.sectors.clear()
        return OK
