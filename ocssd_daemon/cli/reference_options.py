"""Owns what an option of the reference emulator becomes: settings, a note that it means nothing here, or a refusal.

An option table maps each name to a :class:`Rule`, a function of the option's name, its text and the whole line.
``qemu_nvme`` and ``qemu_img`` are the two tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ocssd_daemon.settings import Given, SettingsError, parse_size


class Line(NamedTuple):
    """All options of one line, by name, and which command-line option they came with."""

    options: Mapping[str, str]
    source: str

    def number(self, name: str, default: int = 0) -> int:
        """The value of *name*; *default* when the line does not say."""
        text = self.options.get(name)
        return default if text is None else number(name, text, self)


Result = dict[str, Any] | str           # settings, or why the option means nothing
Rule = Callable[[str, str, Line], Result]


@dataclass
class Translation:
    """Flat settings, and one note for each option that means nothing here."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layer(self) -> dict[str, Given]:
        return {key: Given(value, self.source) for key, value in self.values.items()}


def refused(name: str, rule: str, value: object, line: Line) -> SettingsError:
    return SettingsError(name, rule, value, line.source)


def number(name: str, text: str, line: Line) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise refused(name, "must be a number", text, line) from None


def ranged(name: str, text: str, line: Line, low: int, high: int) -> int:
    value = number(name, text, line)
    if not low <= value <= high:
        raise refused(name, f"must be from {low} to {high}", value, line)
    return value


def to(key: str, low: int = 0, high: int = 1 << 32, plus: int = 0) -> Rule:
    """A number that becomes a setting, *plus* something."""
    return lambda name, text, line: {key: ranged(name, text, line, low, high) + plus}


def size_to(key: str, low: int, high: int) -> Rule:
    """A size in bytes, also with a suffix."""
    def rule(name: str, text: str, line: Line) -> Result:
        try:
            value = parse_size(text)
        except ValueError:
            value = number(name, text, line)
        if not low <= value <= high:
            raise refused(name, f"must be from {low} to {high}", value, line)
        return {key: value}
    return rule


def text_to(key: str) -> Rule:
    return lambda name, text, line: {key: text}


SWITCHES = {"0": False, "off": False, "false": False, "no": False, "1": True, "on": True, "true": True, "yes": True}


def switch(name: str, text: str, line: Line) -> bool:
    if text not in SWITCHES:
        raise refused(name, "must be 0 or 1", text, line)
    return SWITCHES[text]


def switch_to(key: str) -> Rule:
    return lambda name, text, line: {key: switch(name, text, line)}


def any_text(reason: str) -> Rule:
    """An option that means nothing here, whatever its value."""
    return lambda name, text, line: reason


def unless(silent: int, reason: str, low: int = 0, high: int = 1 << 32) -> Rule:
    """A number that is noted unless it is the one value that is so here anyway."""
    def rule(name: str, text: str, line: Line) -> Result:
        return {} if ranged(name, text, line, low, high) == silent else reason
    return rule


def only(value: int, reason: str) -> Rule:
    """An option that can be had with one value only."""
    def rule(name: str, text: str, line: Line) -> Result:
        if number(name, text, line) != value:
            raise refused(name, reason, text, line)
        return {}
    return rule


def parse(text: str, table: Mapping[str, Rule], source: str, known_as: str) -> Line:
    """Names and values of ``name=value,…``; a comma in a value is written twice, as QEMU wants it."""
    line: dict[str, str] = {}
    for word in text.replace(",,", "\0").split(",") if text.strip() else []:
        name, equals, value = word.strip().replace("\0", ",").partition("=")
        if not equals or name not in table:
            close = difflib.get_close_matches(name, table, 1)
            hint = f"; did you mean {close[0]}?" if close and close[0] != name else ""
            raise SettingsError(name, f"no option of {known_as}{hint}" if name not in table else "needs a value", value,
                                source)
        line[name] = value
    return Line(line, source)


def apply(line: Line, table: Mapping[str, Rule]) -> Translation:
    """Every option of *line* by its rule."""
    done = Translation(line.source)
    for name, text in line.options.items():
        result = table[name](name, text, line)
        if isinstance(result, str):
            done.notes.append(f"{name}: {result}")
        else:
            done.values.update(result)
    return done
