"""Owns the reference emulator's table of bad blocks (``lbbtable``), for the bad-block marks of OCSSD 1.2.

Its fault and chunk state files are read by ``nand/faults.py``, into the one rule language.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class StateFileError(ValueError):
    """One sentence with file and rule."""


def apply_bad_blocks(path: str, namespace: Any) -> None:
    """The reference's table: one raw byte per block and plane, LUN by LUN; non-zero is bad. No file: all are good."""
    if not Path(path).exists():
        return
    raw = np.frombuffer(Path(path).read_bytes(), np.uint8)
    if len(raw) < namespace.chunk_count:
        raise StateFileError(f"{path}: {len(raw)} bytes; a byte for each of {namespace.chunk_count} blocks is needed")
    flags = namespace.media.chunks["flags"]
    here = slice(namespace.chunk_base, namespace.chunk_base + namespace.chunk_count)
    flags[here] = flags[here] & 0x0F | (raw[:namespace.chunk_count] != 0).astype(np.uint8) << 4
