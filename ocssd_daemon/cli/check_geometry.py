"""``ocssd check-geometry``: owns its arguments and how the verdict looks; the rules are ``nvme/suitability.py``'s.

Exit codes: 0 everybody takes the device, 1 somebody refuses it (warnings alone are 0), 2 usage.
"""

from __future__ import annotations

import sys

import click
import msgspec

from ocssd_daemon.cli.simulate import settings_of


@click.command("check-geometry")
@click.option("--preset", default="default", metavar="NAME", help="Start from this preset.")
@click.option("--config", metavar="FILE", help="Settings in TOML.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the output.")
def check_geometry(preset: str, config: str | None, assignments: tuple[str, ...], output: str) -> None:
    """Say whether Linux's lightnvm driver, pblk and SPDK take a device, and which number they refuse."""
    from ocssd_daemon.nvme.suitability import problems

    settings, _ = settings_of(preset, config, assignments)
    g, nvme = settings.geometry, settings.nvme
    versions = [kind for kind in dict.fromkeys(nvme.namespaces) if kind != "block"] or ["ocssd20"]
    found = {version: problems(g, version, planes=nvme.planes, mdts=nvme.mdts) for version in versions}
    if output == "json":
        rows = {version: [vars(problem) for problem in listed] for version, listed in found.items()}
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    else:
        for version, listed in found.items():
            click.echo("\n".join(f"{version}: {line}" for line in [*map(str, listed)] or ["good for all"]))
    sys.exit(any(problem.fatal for listed in found.values() for problem in listed))
