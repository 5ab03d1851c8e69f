"""Owns the numbers of how flash ages, as ``native/wear.pxd`` takes them. Rates are per bit, shares 0 to 1."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


def _count(high: int, text: str) -> Meta:
    return Meta(ge=0, le=high, description=text)


def _real(high: float, text: str) -> Meta:
    return Meta(ge=0.0, le=high, description=text)


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Endurance, failures, bit errors and ECC; the formulas stand in ``native/wear.pxd``."""

    pe_limit: Annotated[int, _count(1 << 31, "P/E cycles of a chunk on fresh flash; 0: no limit")] = 0
    pe_spread: Annotated[float, _real(1.0, "standard deviation of that, as a share")] = 0.0
    fail_at_limit: Annotated[
        float, _real(1.0, "chance that a program or erase fails at the limit; grows with x^4")
    ] = 0.0
    rber: Annotated[float, _real(0.5, "raw bit error rate of fresh flash")] = 0.0
    cycles_factor: Annotated[float, _real(1e6, "growth of that with cycles: 1 + factor x^2")] = 10.0
    retention_factor: Annotated[float, _real(1e6, "growth with age of the data: 1 + factor x days")] = 0.05
    disturb: Annotated[float, _real(0.5, "bit error rate added by each read of the chunk")] = 0.0
    ecc_bits: Annotated[int, _count(1 << 20, "bits that ECC corrects per sector; 0: no bit errors")] = 0
    retries: Annotated[int, _count(100, "read retry levels; each costs one more sense")] = 5
    retry_gain: Annotated[float, _real(1.0, "what a retry level multiplies the error rate by")] = 0.6
    notice_share: Annotated[float, _real(1.0, "share of ecc_bits above which a read has high ECC effort")] = (
        0.75
    )
    shelf: Annotated[bool, Meta(description="data ages while the daemon does not run, by the wall clock")] = True
    refresh: Annotated[
        bool, Meta(description="the device itself rewrites a raw chunk that is hard to read, and notifies that")
    ] = False
    wear_delta: Annotated[int, _count(255, "step of the wear-level index that is notified; 0: never")] = 0

    @property
    def is_none(self) -> bool:
        """Nothing ever fails or is noted."""
        return not (self.fail_at_limit or self.ecc_bits or (self.wear_delta and self.pe_limit))
