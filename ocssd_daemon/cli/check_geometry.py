"""``ocssd check-geometry``: owns its arguments and how the verdict looks; the rules are ``nvme/suitability.py``'s.

Exit codes: 0 everybody takes the device, 1 somebody refuses it (warnings alone are 0), 2 usage.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ocssd_daemon.cli.arguments import config_option, preset_option, set_option, settings_of
from ocssd_daemon.cli.output import output_option, show


@click.command("check-geometry", short_help="Say who in a guest refuses a device, and why.")
@preset_option
@config_option
@set_option
@output_option
def check_geometry(preset: str, config: str | None, assignments: tuple[str, ...], output: str) -> None:
    """Say whether Linux's lightnvm driver, pblk and SPDK take a device, and which number they refuse."""
    from ocssd_daemon.nvme.suitability import problems

    settings, _ = settings_of(preset, config, assignments)
    g, nvme = settings.geometry, settings.nvme
    versions = [kind for kind in dict.fromkeys(nvme.namespaces) if kind != "block"] or ["ocssd20"]
    found = {version: problems(g, version, planes=nvme.planes, mdts=nvme.mdts) for version in versions}
    show({version: [vars(problem) for problem in listed] for version, listed in found.items()}, output,
         lambda _: _show_text(found))
    sys.exit(any(problem.fatal for listed in found.values() for problem in listed))


def _show_text(found: dict[str, Any]) -> None:
    for version, listed in found.items():
        click.echo("\n".join(f"{version}: {line}" for line in [*map(str, listed)] or ["good for all"]))
