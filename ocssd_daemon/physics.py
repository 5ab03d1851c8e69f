"""Owns what the settings make of the flash beyond its rules: time, faults, age; and when each is put on.

    before the FTL starts    factory bad blocks, chunk states, endurance, a used life: only on flash never used before
    after it has started     latency, fault rules, wear; filling a used drive

Knows no transport and no reactor: the caller stands the reactor still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ocssd_daemon._fast import Ftl, Media
from ocssd_daemon._physics import Faults, Timing, Wear, attach_faults, attach_timing, attach_wear
from ocssd_daemon.nand import aging, faults
from ocssd_daemon.nand.faults import Rule
from ocssd_daemon.nand.geometry import Geometry
from ocssd_daemon.nand.latency import Latency
from ocssd_daemon.nand.store import Store
from ocssd_daemon.settings import Settings, latency_of

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
    except (aging.AgingError, faults.FaultError) as error:
        raise PhysicsError(str(error)) from None


def _prepare(settings: Settings, store: Store) -> None:
    if settings.wear.pe_limit:
        aging.set_endurance(store.chunks, settings.wear.pe_limit, settings.wear.pe_spread, settings.seed)
    if settings.age:
        age = aging.parse_age(settings.age)
        if age.life and not settings.wear.pe_limit:
            raise PhysicsError("age: life needs an endurance; set wear.pe_limit")
        aging.set_life(store.chunks, age.life, settings.wear.pe_limit, age.seed)
    if settings.faults.chunk_states:
        for state in faults.load_chunk_states(settings.faults.chunk_states):
            set_chunk_state(store, state)
    aging.mark_bad(store.chunks, _bad(settings, store.geometry))


def _bad(settings: Settings, geometry: Geometry) -> list[int]:
    bad = aging.bad_chunks(settings.faults.bad, geometry, settings.seed) if settings.faults.bad else []
    if settings.faults.bad_table:
        bad += faults.load_bad_blocks(settings.faults.bad_table, geometry.total_pus, geometry.chunks)
    return bad


def _indices(state: faults.ChunkState, g: Geometry) -> list[int]:
    """The chunks that a line of a chunk state file names. Raises FaultError when there are none."""
    shape = ((state.group, g.groups), (state.pu, g.pus), (state.chunk, g.chunks))
    ranges = [range(span[0], min(span[1], count - 1) + 1) for span, count in shape]
    if not all(ranges):
        raise faults.FaultError(
            f"no such chunk: the flash has {g.groups} groups x {g.pus} PUs x {g.chunks} chunks"
        )
    return [
        (group * g.pus + pu) * g.chunks + chunk
        for group in ranges[0]
        for pu in ranges[1]
        for chunk in ranges[2]
    ]


def set_chunk_state(store: Store, state: faults.ChunkState) -> None:
    """Put chunks into a state of the file's choosing; the write pointer is made to agree with it."""
    indices = _indices(state, store.geometry)
    if state.type is not None:
        store.chunks["type"][indices] = state.type
    if state.wear_index is not None:
        store.chunks["wear_index"][indices] = state.wear_index
    if state.state is not None:
        sectors = store.geometry.sectors
        open_wp = min(state.wp or 0, sectors - 1)
        store.chunks["state"][indices] = state.state
        store.chunks["wp"][indices] = {
            1: 0,
            2: min(state.wp or sectors, sectors),
            4: open_wp,
            8: aging.NO_WP,
        }[state.state]


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
        """Add a rule. Returns its id. Raises ValueError when there are too many."""
        if rule.action in (faults.ACTIONS["slow"], faults.ACTIONS["hang"]) and self.timing is None:
            # Delays need timelines, even where everything else takes no time.
            self.timing = Timing(self.geometry, Latency(page_sectors=1, planes=1, buffer_sectors=1 << 16))
            self.take_time(True)
        number = self.faults.add(rule)
        attach_faults(self.media, self.faults)
        return number

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
                return [self.add_rule(rule) for rule in _RULE_FILES[kind](path)]
            self.take_offline(_OFFLINE_FILES[kind](path, self.geometry))
        except faults.FaultError as error:
            raise PhysicsError(str(error)) from None
        return []

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


def _offline_states(path: str, geometry: Geometry) -> list[int]:
    indices = []
    for state in faults.load_chunk_states(path):
        if state.state != 8:
            raise faults.FaultError(f"{path}: a running FTL owns its chunks; only OFFLINE can be imported, "
                                    "other states with faults.chunk_states on a fresh device")  # fmt: skip
        indices += _indices(state, geometry)
    return indices


def _bad_blocks(path: str, geometry: Geometry) -> list[int]:
    return faults.load_bad_blocks(path, geometry.total_pus, geometry.chunks)


_RULE_FILES = {
    "resetfail": faults.load_reset_failures,
    "writefail": faults.load_write_failures,
    "rules": faults.load,
}
_OFFLINE_FILES = {"chunkstate": _offline_states, "bbtable": _bad_blocks}


def attach(settings: Settings, store: Store, media: Media, ftl: Ftl | None, fresh: bool, virtual: bool) -> Physics:
    """Put on everything that *settings* ask for. Raises PhysicsError and SettingsError."""
    geometry = store.geometry
    latency = latency_of(settings, geometry)
    if fresh and settings.age and ftl is not None:
        filled = round(aging.parse_age(settings.age).fill * ftl.capacity_sectors)
        if filled:
            ftl.fill(0, filled)
    timing = Timing(geometry, latency) if latency else None
    retry_ns = max(latency.sense_ns) if latency else 0
    wear = None if settings.wear.is_none else Wear(geometry, settings.wear, retry_ns, settings.seed)
    made = Physics(media, ftl, geometry, timing, wear, Faults(geometry, settings.seed), virtual)
    attach_wear(media, wear, _age_ns(settings, store, fresh), virtual)
    made.take_time(True)
    try:
        for rule in rules_of(settings):
            made.add_rule(rule)
    except (faults.FaultError, ValueError) as error:
        raise PhysicsError(f"faults: {error}") from None
    return made


def _age_ns(settings: Settings, store: Store, fresh: bool) -> int:
    """Flash is as old as its newest data says, or as the user says of a fresh drive."""
    if fresh and settings.age:
        return int(aging.parse_age(settings.age).retention_days * aging.DAY_NS)
    return int(store.chunks["programmed_ns"].max())


def rules_of(settings: Settings) -> list[faults.Rule]:
    """The rules of the configuration, those of its file last. Raises FaultError."""
    rules = [faults.parse(text) for text in settings.faults.rules]
    return rules + (faults.load(settings.faults.file) if settings.faults.file else [])
