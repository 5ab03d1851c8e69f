"""Owns what the settings make of the flash beyond its rules: time, faults, age; and when each is put on.

    before the FTL starts    factory bad blocks, chunk states, endurance, a used life: only on flash never used before
    after it has started     latency, fault rules, wear; filling a used drive

Knows no transport and no reactor: the caller stands the reactor still.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ocssd_daemon._fast import Ftl, Media
from ocssd_daemon._physics import Faults, Timing, Wear, age_of, attach_faults, attach_timing, attach_wear
from ocssd_daemon.nand import aging, faults
from ocssd_daemon.nand.faults import Rule
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.latency import Latency
from ocssd_daemon.nand.store import Store
from ocssd_daemon.settings import Settings, latency_of

AGE_MAX_NS = 1 << 62            # 146 years: C counts on from here
IMPORTS = ("resetfail", "writefail", "chunkstate", "bbtable", "rules")


class PhysicsError(ValueError):
    """Settings or a request that the flash cannot follow; one line."""


def before_use(settings: Settings, store: Store) -> None:
    """Make fresh flash what *settings* say. Raises PhysicsError; refuses an age for flash that has been used."""
    if not store.is_fresh:
        if settings.age:
            raise PhysicsError(
                f"age={settings.age}: the image has been used already; only a fresh one can be aged"
            )
        return
    try:
        _prepare(settings, store)
    except faults.FaultError as error:
        raise PhysicsError(str(error)) from None


def _prepare(settings: Settings, store: Store) -> None:
    if settings.wear.pe_limit:
        aging.set_endurance(store.chunks, settings.wear.pe_limit, settings.wear.pe_spread, settings.seed)
    if settings.age:
        with _said_of("age", settings.age):
            age = aging.parse_age(settings.age)
        if age.life and not settings.wear.pe_limit:
            raise PhysicsError("age: life needs an endurance; set wear.pe_limit")
        aging.set_life(store.chunks, age.life, settings.wear.pe_limit, age.seed)
    if settings.faults.chunk_states:
        for state in faults.load_chunk_states(settings.faults.chunk_states, store.geometry):
            set_chunk_state(store.chunks, state)
    aging.mark_bad(store.chunks, _bad(settings, store.geometry))


@contextlib.contextmanager
def _said_of(key: str, text: str) -> Iterator[None]:
    """What is wrong with *text*, or with a part of it, is told with the setting that it came from."""
    try:
        yield
    except aging.AgingError as error:
        raise PhysicsError(f"{key}={text}: {str(error).removeprefix(f'{text}: ')}") from None


def _bad(settings: Settings, geometry: Geometry) -> list[int]:
    bad = []
    if settings.faults.bad:
        with _said_of("faults.bad", settings.faults.bad):
            bad += aging.bad_chunks(settings.faults.bad, geometry, settings.seed)
    if settings.faults.bad_table:
        bad += faults.load_bad_blocks(settings.faults.bad_table, geometry.total_pus, geometry.chunks)
    return bad


def set_chunk_state(chunks: NDArray[Any], state: faults.ChunkState) -> None:
    """Put chunks of the table into a state of the file's choosing."""
    for field in ("type", "wear_index", "state", "wp"):
        if getattr(state, field) is not None:
            chunks[field][state.indices] = getattr(state, field)


@dataclass
class Physics:
    """What is attached to one media. ``faults`` is always there, empty or not."""

    media: Media
    ftl: Ftl | None
    geometry: Geometry
    timing: Timing | None
    wear: Wear | None
    faults: Faults
    virtual: bool
    settings: Settings

    def stats(self) -> dict[str, Any]:
        """Counters of latency model and wear, and hits of fault rules."""
        return {
            **(self.timing.stats() if self.timing else {}),
            **(self.wear.stats() if self.wear else {}),
            "fault_hits": sum(rule["hits"] for rule in self.faults.list()),
        }

    def take_time(self, on: bool) -> None:
        """Let operations take time, or not (preconditioning)."""
        attach_timing(self.media, self.timing if on else None, virtual=self.virtual)

    def add_rule(self, rule: Rule) -> int:
        """Add a rule. Returns its id. Raises ValueError when there are too many, or when it could never strike."""
        for key in ("group", "pu", "chunk", "sector"):
            count = getattr(self.geometry, f"{key}s")
            if getattr(rule, key)[0] >= count:
                raise PhysicsError(f"{rule.text}: {key}= must begin below {count}, the flash ends there")
        if rule.action in (faults.ACTIONS["slow"], faults.ACTIONS["hang"]) and self.timing is None:
            # Delays need timelines, even where everything else takes no time.
            self.timing = Timing(self.geometry, Latency(page_sectors=1, planes=1, buffer_sectors=1 << 16))
            self.take_time(True)
        if rule.operations & faults.OPERATIONS["read"] and self.wear is None:
            # What a read rule breaks is noted, and notices are the wear model's.
            self.wear = Wear(self.geometry, self.settings.wear, 0, self.settings.seed)
            attach_wear(self.media, self.wear, age_of(self.media), self.virtual)
        number = self.faults.add(rule)
        attach_faults(self.media, self.faults)
        return number

    def add_rules(self, rules: list[Rule]) -> list[int]:
        """Add all of *rules* or none. Returns their ids. Raises ValueError when there are too many."""
        numbers: list[int] = []
        try:
            for rule in rules:
                numbers.append(self.add_rule(rule))
        except ValueError:
            for number in numbers:
                self.remove_rule(number)
            raise
        return numbers

    def remove_rule(self, number: int) -> None:
        """Take a rule out. Raises PhysicsError when there is none of that id."""
        try:
            self.faults.remove(number)
        except KeyError:
            raise PhysicsError(f"no fault rule {number}") from None
        if not self.faults.list():
            attach_faults(self.media, None)

    def import_file(self, kind: str, path: str) -> list[int]:
        """Take the rules of a file. Returns their ids; chunks that it takes offline have none. Raises PhysicsError."""
        try:
            if kind in _RULE_FILES:
                return self.add_rules(_RULE_FILES[kind](path))
            if kind == "chunkstate":
                self.set_states(path)
            else:
                self.take_offline(faults.load_bad_blocks(path, self.geometry.total_pus, self.geometry.chunks))
        except faults.FaultError as error:
            raise PhysicsError(str(error)) from None
        return []

    def set_states(self, path: str) -> None:
        """Put chunks into the states of a file: any state where a guest owns the PU, OFFLINE only where our FTL does.

        All of the file is checked before anything changes. Raises FaultError and PhysicsError.
        """
        states = faults.load_chunk_states(path, self.geometry)
        owned = {int(pu) for pu in self.ftl.arrays["pus"]} if self.ftl is not None else set()
        ours = [[i for i in state.indices if i // self.geometry.chunks in owned] for state in states]
        for state, chunks in zip(states, ours, strict=True):
            if chunks and state.state != aging.CHUNK_OFFLINE:
                raise PhysicsError(
                    f"{path}: the running FTL owns PU {chunks[0] // self.geometry.chunks}: there, only OFFLINE can be "
                    "imported; other states with faults.chunk_states on a fresh device"
                )
        for state, chunks in zip(states, ours, strict=True):
            theirs = sorted(set(state.indices) - set(chunks))
            set_chunk_state(self.media.chunks, state._replace(indices=theirs))
            self.take_offline(chunks)
        self.media.recount_open()

    def take_offline(self, indices: list[int]) -> None:
        """Take chunks offline while the FTL runs: they fail at their next program or erase; free ones at once."""
        chunks = self.media.chunks
        for index in indices:
            if chunks["state"][index] == 1:
                aging.mark_bad(chunks, [index])
            else:
                for what in ("write", "reset"):
                    self.media.arm_fault(index, what)
        if self.ftl is not None:
            self.ftl.recount()


_RULE_FILES = {
    "resetfail": faults.load_reset_failures,
    "writefail": faults.load_write_failures,
    "rules": faults.load,
}


def attach(
    settings: Settings, store: Store, media: Media, ftl: Ftl | None, fresh: bool, virtual: bool, wall_ns: int = 0
) -> Physics:
    """Put on everything that *settings* ask for. *wall_ns*: the wall clock, 0: none.

    Raises PhysicsError and SettingsError.
    """
    geometry = store.geometry
    latency = latency_of(settings, geometry)
    if fresh and settings.age and ftl is not None:
        filled = round(aging.parse_age(settings.age).fill * ftl.capacity_sectors)
        if filled:
            ftl.fill(0, filled)
    timing = Timing(geometry, latency) if latency else None
    retry_ns = max(latency.sense_ns) if latency else 0
    wear = None if settings.wear.is_none else Wear(geometry, settings.wear, retry_ns, settings.seed)
    made = Physics(media, ftl, geometry, timing, wear, Faults(geometry, settings.seed), virtual, settings)
    attach_wear(media, wear, start_age_ns(settings, store, fresh, wall_ns), virtual)
    made.take_time(True)
    try:
        for rule in rules_of(settings):
            made.add_rule(rule)
    except (faults.FaultError, ValueError) as error:
        raise PhysicsError(f"faults: {error}") from None
    return made


def start_age_ns(settings: Settings, store: Store, fresh: bool, wall_ns: int) -> int:
    """How old the flash is now: as the user says of a fresh drive; else as it was left, and what has passed since.

    It is never younger than its newest data, whatever became of the wall clock, and at most as old as AGE_MAX_NS.
    """
    if fresh and settings.age:
        return int(aging.parse_age(settings.age).retention_days * aging.DAY_NS)
    before = store.superblock
    on_the_shelf_ns = wall_ns - before.wall_ns if settings.wear.shelf and before.wall_ns and wall_ns else 0
    return min(max(int(store.chunks["programmed_ns"].max()), before.age_ns + max(0, on_the_shelf_ns)), AGE_MAX_NS)


def rules_of(settings: Settings) -> list[faults.Rule]:
    """The rules of the configuration, those of its files last. Raises FaultError."""
    rules = [faults.parse(text) for text in settings.faults.rules]
    for kind, path in (
        ("rules", settings.faults.file),
        ("writefail", settings.faults.write_failures),
        ("resetfail", settings.faults.reset_failures),
    ):
        rules += _RULE_FILES[kind](path) if path else []
    return rules
