"""Owns the text files that arm faults and set chunk states, in the reference emulator's form: one place per line.

A line has ``key=value`` words in any order; ``#`` starts a comment, ``*`` stands for every value, numbers may be 0x….
Both dialects of the keys are read (``grp pu chk sec`` and ``group punit chunk sectr``). Errors name file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ocssd_daemon._nvme import FAULT_DTYPE
from ocssd_daemon.nand.geometry import Geometry

from ..protocol.nvme.ocssd20 import ChunkState

ALIASES = {"grp": "group", "punit": "pu", "chk": "chunk", "sectr": "sector", "sec": "sector", "resetfail_prob": "prob",
           "writefail_prob": "prob"}
STATES = {state.name: state for state in ChunkState}
TYPES = {"W_SEQ": 1, "W_RAN": 2, "SEQ": 1, "SEQUENTIAL": 1, "RAN": 2, "RANDOM": 2}
NO_WP = 0xFFFF_FFFF
CERTAIN = 1 << 16               # fault_t.chance


class StateFileError(ValueError):
    """One sentence with file, line and rule."""


def _lines(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """``(place for messages, words)`` of each line that says something."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StateFileError(f"{path}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            yield f"{path}:{number}", _words(f"{path}:{number}", words)


def _words(place: str, words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise StateFileError(f"{place}: {word}: must be key=value")
        found[ALIASES.get(key, key)] = value
    return found


def _values(place: str, words: dict[str, str], key: str, count: int) -> range:
    """What a place key names: one value, or all with ``*``."""
    text = words.pop(key, None)
    if text is None:
        raise StateFileError(f"{place}: {key}= is missing")
    if text == "*":
        return range(count)
    value = _number(place, key, text)
    if not 0 <= value < count:
        raise StateFileError(f"{place}: {key}={text}: there are {count}")
    return range(value, value + 1)


def _number(place: str, key: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise StateFileError(f"{place}: {key}={text}: must be a number") from None


def _chunks(place: str, words: dict[str, str], g: Geometry) -> list[int]:
    places = [_values(place, words, key, count)
              for key, count in (("group", g.groups), ("pu", g.pus), ("chunk", g.chunks))]
    return [(group * g.pus + pu) * g.chunks + chunk for group in places[0] for pu in places[1] for chunk in places[2]]


def read_faults(path: str, g: Geometry, *, sectors: bool) -> NDArray[Any]:
    """Armed places as FAULT_DTYPE, from a write fault file (*sectors*) or a reset fault file; prob is percent."""
    rows = []
    for place, words in _lines(path):
        chunks = _chunks(place, words, g)
        within = _values(place, words, "sector", g.sectors) if sectors else range(1)
        percent = _number(place, "prob", words.pop("prob", ""))
        if not 0 <= percent <= 100 or words:
            raise StateFileError(f"{place}: prob={percent}: 0 to 100 percent, and nothing else ({', '.join(words)})")
        rows += [(chunk, sector, CERTAIN * percent // 100) for chunk in chunks for sector in within]
    return np.array(rows, FAULT_DTYPE)


def apply_chunk_states(path: str, media: Any, owned: NDArray[np.uint8] | None = None) -> None:
    """Set states, wear and write pointers of chunks. The caller starts the reactor afterwards.

    *owned*, one per PU, marks those of the host FTL: it keeps books of its own, so their chunks are refused.
    """
    for place, words in _lines(path):
        chunks = _chunks(place, words, media.geometry)
        if owned is not None and any(owned[chunk // media.geometry.chunks] for chunk in chunks):
            raise StateFileError(f"{place}: the host FTL owns this parallel unit (ftl.pus)")
        fields = _chunk_fields(place, words, media.geometry)
        for name, value in fields.items():
            media.chunks[name][chunks] = value
    media.recount_open()


def _chunk_fields(place: str, words: dict[str, str], g: Geometry) -> dict[str, int]:
    state = words.pop("state", None)
    kind = words.pop("type", "W_SEQ")
    if state not in STATES or kind not in TYPES:
        raise StateFileError(f"{place}: state={state} type={kind}: {', '.join(STATES)}; {', '.join(TYPES)}")
    wp = _number(place, "wp", words.pop("wp", "0"))
    wear = _number(place, "wi", words.pop("wi", "0"))
    if words:
        raise StateFileError(f"{place}: {', '.join(words)}: not known here")
    return {"state": STATES[state], "type": TYPES[kind], "wear_index": wear & 0xFF,
            "wp": _checked_wp(place, STATES[state], wp, g.sectors)}


def _checked_wp(place: str, state: ChunkState, wp: int, sectors: int) -> int:
    """A write pointer that its state can have."""
    if state == ChunkState.OFFLINE:
        return NO_WP
    allowed = {ChunkState.FREE: range(1), ChunkState.OPEN: range(sectors), ChunkState.CLOSED: range(sectors + 1)}[state]
    if wp not in allowed:
        raise StateFileError(f"{place}: wp={wp}: a chunk that is {state.name} has at most {allowed.stop - 1}")
    return wp


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
