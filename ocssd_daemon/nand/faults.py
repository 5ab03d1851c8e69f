"""Owns the rule language of faults, and the import of the reference emulator's fault files.

    on=write chunk=5-9 do=fail p=0.01
    on=read group=0 pu=1 do=corrupt:3 every=100
    on=reset do=offline after=1000 times=1
    on=any pu=2 do=hang:2s while=/tmp/hang

    where   on = read | write | reset | any (several with +), group, pu, chunk, sector = N | N-M | * (default *)
    what    do = fail | offline | slow:TIME | hang:TIME | corrupt:BITS | torn | powercut
    when    p = probability, every = N, after = N, times = N or the word once, while = path of a file that must exist

``fail`` ends a read as unrecovered, closes the chunk of a write early (what a rule's ``sector`` leaves out before it is
written) and takes the chunk of a reset offline. ``hang``
keeps the whole PU busy. ``torn`` loses the second half of a write's last sector and says nothing. ``powercut`` ends the
process at that instruction. Spec of the effects: OCSSD 2.0, media statuses 281h, 2F1h, 2C1h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ocssd_daemon.nand.geometry import Geometry

ANY = (0, 0xFFFF_FFFF)
OPERATIONS = {"read": 1, "write": 2, "reset": 4, "any": 7}
ACTIONS = {"fail": 1, "offline": 2, "slow": 3, "hang": 4, "corrupt": 5, "torn": 6, "powercut": 7}
AMOUNTS = {"slow": "a time such as 5ms", "hang": "a time such as 2s", "corrupt": "a number of bits"}
ONLY_FOR = {"corrupt": 1, "torn": 2}  # actions that mean something for one operation only
UNITS_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
TRIGGER_MAX = 255
NO_WP = 0xFFFF_FFFF

Span = tuple[int, int]


class FaultError(ValueError):
    """A rule that cannot be; one line that names word and rule."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, as ``native/faults.pxd`` has it; ``text`` is what it was made from."""

    text: str
    operations: int
    action: int
    amount: int = 0
    group: Span = ANY
    pu: Span = ANY
    chunk: Span = ANY
    sector: Span = ANY
    chance: float = 1.0
    every: int = 1
    after: int = 0
    times: int = 0
    trigger: str = ""


def _whole(key: str, text: str, low: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= ANY[1]:
        raise FaultError(f"{key}={text}: must be a whole number from {low}")
    return int(text)


def _span(key: str, text: str) -> Span:
    if text == "*":
        return ANY
    first, dash, last = text.partition("-")
    span = (_whole(key, first), _whole(key, last if dash else first))
    if span[0] > span[1]:
        raise FaultError(f"{key}={text}: ends before it begins")
    return span


def _operations(text: str) -> int:
    mask = 0
    for name in text.split("+"):
        if name not in OPERATIONS:
            raise FaultError(f"on={text}: must be one of {', '.join(OPERATIONS)}, or several with +")
        mask |= OPERATIONS[name]
    return mask


def _time_ns(key: str, text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ns|us|ms|s)", text)
    if match is None:
        raise FaultError(f"do={key}:{text}: must be a time such as 5ms or 2s")
    return round(float(match[1]) * UNITS_NS[match[2]])


def _action(text: str) -> tuple[int, int]:
    name, _, amount = text.partition(":")
    if name not in ACTIONS or bool(amount) != (name in AMOUNTS):
        forms = ", ".join(f"{action}:..." if action in AMOUNTS else action for action in ACTIONS)
        raise FaultError(f"do={text}: must be one of {forms}")
    if not amount:
        return ACTIONS[name], 0
    return ACTIONS[name], _whole("do=corrupt", amount, 1) if name == "corrupt" else _time_ns(name, amount)


def _chance(text: str) -> float:
    try:
        chance = float(text)
    except ValueError:
        chance = -1.0
    if not 0 < chance <= 1:
        raise FaultError(f"p={text}: must be a probability above 0, at most 1")
    return chance


def _trigger(text: str) -> str:
    if not 0 < len(text.encode()) <= TRIGGER_MAX or "\0" in text:
        raise FaultError(f"while={text!r}: must be a path of at most {TRIGGER_MAX} bytes")
    return text


def _words(text: str) -> dict[str, str]:
    words: dict[str, str] = {}
    for word in text.split():
        key, equals, value = ("times", "=", "1") if word == "once" else word.partition("=")
        if not equals or key not in KEYS:
            raise FaultError(f"{word}: must be KEY=VALUE with one of {', '.join(KEYS)}")
        if key in words:
            raise FaultError(f"{word}: {key} is given twice")
        words[key] = value
    return words


KEYS = ("on", "group", "pu", "chunk", "sector", "do", "p", "every", "after", "times", "while")


def parse(text: str) -> Rule:
    """The rule that *text* says. Raises FaultError."""
    words = _words(text)
    for key in ("on", "do"):
        if key not in words:
            raise FaultError(f"{text or 'empty rule'}: {key}= is missing")
    operations = _operations(words["on"])
    action, amount = _action(words["do"])
    only = ONLY_FOR.get(words["do"].partition(":")[0], operations)
    if operations != only:
        raise FaultError(
            f"do={words['do']}: only with on={'read' if only == OPERATIONS['read'] else 'write'}"
        )
    return Rule(
        text=" ".join(text.split()),
        operations=operations,
        action=action,
        amount=amount,
        **{key: _span(key, words[key]) for key in ("group", "pu", "chunk", "sector") if key in words},
        chance=_chance(words.get("p", "1")),
        every=_whole("every", words.get("every", "1"), 1),
        after=_whole("after", words.get("after", "0")),
        times=_whole("times", words["times"], 1) if "times" in words else 0,
        trigger=_trigger(words["while"]) if "while" in words else "",
    )


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FaultError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FaultError(f"{path}: is not text") from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            yield number, line


def load(path: str) -> list[Rule]:
    """The rules of a file, one a line; ``#`` begins a comment. Raises FaultError with file and line."""
    rules = []
    for number, line in _lines(path):
        try:
            rules.append(parse(line))
        except FaultError as error:
            raise FaultError(f"{path}:{number}: {error}") from None
    return rules


# Files of the reference emulator.


class ChunkState(NamedTuple):
    """One line of a chunk state file; None: as it is. ``indices``: the chunks, ``wp``: what goes with the state."""

    indices: list[int]
    state: int | None
    type: int | None
    wp: int | None
    wear_index: int | None


_ALIASES = {
    "group": "group", "grp": "group", "punit": "pu", "pu": "pu", "chunk": "chunk", "chk": "chunk",
    "sectr": "sector", "sec": "sector", "resetfail_prob": "percent", "writefail_prob": "percent", "prob": "percent",
    "state": "state", "type": "type", "wp": "wp", "wi": "wi", "ns": "ns", "pe_cycles": "pe_cycles",
}  # fmt: skip
_STATES = {"FREE": 1, "CLOSED": 2, "OPEN": 4, "OFFLINE": 8}
_TYPES = {"W_SEQ": 1, "SEQ": 1, "SEQUENTIAL": 1, "W_RAN": 2, "RAN": 2, "RANDOM": 2}


def _fields(line: str) -> dict[str, str]:
    fields = {}
    for word in line.split():
        key, equals, value = word.partition("=")
        if not equals or key not in _ALIASES:
            raise FaultError(f"{word}: must be KEY=VALUE with one of {', '.join(_ALIASES)}")
        fields[_ALIASES[key]] = str(int(value, 0)) if re.fullmatch(r"0[xX][0-9a-fA-F]+", value) else value
    return fields


def _place(fields: dict[str, str], *keys: str) -> str:
    return " ".join(f"{key}={fields[key]}" for key in keys if fields.get(key, "*") != "*")


def _failure(operation: str, fields: dict[str, str]) -> Rule:
    percent = _whole("probability", fields.get("percent", "100"))
    if percent > 100:
        raise FaultError(f"probability {percent}: must be from 0 to 100 percent")
    place = _place(fields, "group", "pu", "chunk", "sector")
    return parse(f"on={operation} {place} do=fail" + (f" p={percent / 100}" if percent < 100 else ""))


def _failures(operation: str, path: str) -> list[Rule]:
    rules = []
    for number, line in _lines(path):
        try:
            fields = _fields(line)
            if fields.get("percent") != "0":
                rules.append(_failure(operation, fields))
        except FaultError as error:
            raise FaultError(f"{path}:{number}: {error}") from None
    return rules


def load_reset_failures(path: str) -> list[Rule]:
    """Rules of an ``lresetfail`` file."""
    return _failures("reset", path)


def load_write_failures(path: str) -> list[Rule]:
    """Rules of an ``lwritefail`` file."""
    return _failures("write", path)


def _named(table: dict[str, int], key: str, fields: dict[str, str]) -> int | None:
    if key not in fields:
        return None
    if fields[key] not in table:
        raise FaultError(f"{key}={fields[key]}: must be one of {', '.join(table)}")
    return table[fields[key]]


def _indices(fields: dict[str, str], g: Geometry) -> list[int]:
    """The chunks that a line names."""
    ranges = []
    for key, count in (("group", g.groups), ("pu", g.pus), ("chunk", g.chunks)):
        if key not in fields:
            raise FaultError(f"{key}= is missing")
        first, last = _span(key, fields[key])
        if first >= count or (last >= count and (first, last) != ANY):
            raise FaultError(f"{key}={fields[key]}: there are {count}")
        ranges.append(range(first, min(last, count - 1) + 1))
    groups, pus, chunks = ranges
    return [(group * g.pus + pu) * g.chunks + chunk for group in groups for pu in pus for chunk in chunks]


def _write_pointer(state: int | None, fields: dict[str, str], sectors: int) -> int | None:
    """The write pointer that goes with *state*: as the line says, if a chunk in that state can have it."""
    if state is None or state == _STATES["OFFLINE"]:
        return None if state is None else NO_WP
    most = {"FREE": 0, "OPEN": sectors - 1, "CLOSED": sectors}
    name = next(name for name, value in _STATES.items() if value == state)
    wp = _whole("wp", fields.get("wp", str(most[name] if name == "CLOSED" else 0)))
    if wp > most[name]:
        raise FaultError(f"wp={wp}: a chunk that is {name} has at most {most[name]}")
    return wp


def _chunk_state(fields: dict[str, str], geometry: Geometry) -> ChunkState:
    state = _named(_STATES, "state", fields)
    return ChunkState(
        indices=_indices(fields, geometry),
        state=state,
        type=_named(_TYPES, "type", fields),
        wp=_write_pointer(state, fields, geometry.sectors),
        wear_index=_whole("wi", fields["wi"]) % 256 if "wi" in fields else None,
    )


def load_chunk_states(path: str, geometry: Geometry) -> list[ChunkState]:
    """Lines of an ``lchunkstate`` file, for flash of *geometry*."""
    states = []
    for number, line in _lines(path):
        try:
            states.append(_chunk_state(_fields(line), geometry))
        except FaultError as error:
            raise FaultError(f"{path}:{number}: {error}") from None
    return states


def load_bad_blocks(path: str, pus: int, chunks: int) -> list[int]:
    """Chunk indices that an ``lbbtable`` file (one byte per block, PU after PU) marks as bad."""
    try:
        table = Path(path).read_bytes()
    except OSError as error:
        raise FaultError(f"{path}: {error.strerror}") from None
    if len(table) == 0 or len(table) % (pus * chunks):
        raise FaultError(
            f"{path}: has {len(table)} bytes, expected a multiple of {pus} PUs x {chunks} blocks"
        )
    planes = len(table) // (pus * chunks)
    return [i for i in range(pus * chunks) if any(table[i * planes : (i + 1) * planes])]
