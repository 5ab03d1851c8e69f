"""Owns the options of a device that commands share, and how they become settings."""

from __future__ import annotations

import math
from typing import Any

import click

from ocssd_daemon.cli.output import WrongSettings

preset_option = click.option("--preset", default="default", metavar="NAME", help="Start from this preset.")
config_option = click.option("--config", metavar="FILE", help="Settings in TOML.")
set_option = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")


class FiniteRange(click.FloatRange):
    """A range of numbers that are numbers: click lets NaN through, which is below nothing and above nothing."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        return number


def settings_of(preset: str, config: str | None, assignments: tuple[str, ...]) -> tuple[Any, frozenset[str]]:
    """Settings as the daemon reads them, and the keys that were named. Raises WrongSettings."""
    from ocssd_daemon import settings as sets

    try:
        layers = [
            sets.from_preset(preset),
            sets.from_toml(config) if config else {},
            sets.from_assignments(assignments),
        ]
        return sets.build(*layers), sets.named(*layers)
    except sets.SettingsError as error:
        raise WrongSettings(str(error)) from None
