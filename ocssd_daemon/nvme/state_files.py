"""Owns the reference emulator's table of bad blocks (``lbbtable``), for the bad-block marks of OCSSD 1.2.

Its fault and chunk state files are read by ``nand/faults.py``, into the one rule language.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class StateFileError(ValueError):
    """One sentence with file and rule."""


def apply_bad_blocks(path: str, namespace: Any, owned: NDArray[np.uint8] | None = None) -> None:
    """The reference's table: one raw byte per block and plane, LUN by LUN; non-zero is bad. No file: all are good.

    What it says of blocks of the host FTL (*owned*, one per PU) is not taken.
    """
    if not Path(path).exists():
        return
    raw = np.frombuffer(Path(path).read_bytes(), np.uint8)
    if len(raw) < namespace.chunk_count:
        raise StateFileError(f"{path}: {len(raw)} bytes; a byte for each of {namespace.chunk_count} blocks is needed")
    flags = namespace.media.chunks["flags"]
    here = np.arange(namespace.chunk_base, namespace.chunk_base + namespace.chunk_count)
    bad = raw[:namespace.chunk_count] != 0
    if owned is not None:
        bad &= owned[here // namespace.media.geometry.chunks] == 0
    flags[here] = flags[here] & 0x0F | bad.astype(np.uint8) << 4
