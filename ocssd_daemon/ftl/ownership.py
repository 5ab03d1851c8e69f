"""Owns the question whose a parallel unit is: the host FTL's (the disk), or the guest's (raw namespaces).

A PU has one owner. PUs are numbered through the device, group by group; text names them as ``all``, ``none`` or ranges
such as ``0-3,6`` (both ends included, as people count).
"""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_pus(text: str, total: int) -> list[int]:
    """The PUs that *text* names, in order. Raises ValueError with one sentence."""
    if text in ("all", "none"):
        return list(range(total)) if text == "all" else []
    found: set[int] = set()
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        if match is None:
            raise ValueError(f"ftl.pus = {text}: must be auto, all, none, or ranges such as 0-3,6")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < total:
            raise ValueError(f"ftl.pus = {text}: {piece.strip()} is not within the {total} PUs of the device")
        found.update(range(first, last + 1))
    return sorted(found)


def owned_pus(text: str, total: int, *, disk_is_served: bool) -> list[int]:
    """As ``parse_pus``; ``auto`` gives the FTL everything when somebody serves its disk, else nothing."""
    if text == "auto":
        text = "all" if disk_is_served else "none"
    return parse_pus(text, total)
