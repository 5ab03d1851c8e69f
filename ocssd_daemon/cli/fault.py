"""``ocssd fault``: owns the arguments of adding, listing, removing and importing fault rules."""

from __future__ import annotations

import os
from typing import Any

import click

from ocssd_daemon.cli.output import output_option, show
from ocssd_daemon.cli.rpc import call, find

KINDS = ["resetfail", "writefail", "chunkstate", "bbtable", "rules"]


def _ask(context: click.Context, method: str, params: dict[str, Any], output: str) -> None:
    show(call(find(context.obj), method, params), output, _show_rules)


def _show_rules(result: dict[str, Any]) -> None:
    for rule in result["rules"]:
        click.echo(f"{rule['id']:>3}  {rule['hits']:>8} of {rule['seen']:<8}  {rule['rule']}")


@click.group()
def fault() -> None:
    """Make things go wrong on the flash of a running daemon."""


@fault.command("list")
@output_option
@click.pass_context
def list_rules(context: click.Context, output: str) -> None:
    """Show the rules, and how often each struck of the times it was asked."""
    _ask(context, "fault.list", {}, output)


@fault.command("add")
@click.argument("rule", nargs=-1, required=True)
@output_option
@click.pass_context
def add_rule(context: click.Context, rule: tuple[str, ...], output: str) -> None:
    """Add a rule, such as: on=write chunk=5-9 do=fail p=0.01"""
    _ask(context, "fault.add", {"rule": " ".join(rule)}, output)


@fault.command("remove")
@click.argument("number", type=int)
@output_option
@click.pass_context
def remove_rule(context: click.Context, number: int, output: str) -> None:
    """Take a rule out."""
    _ask(context, "fault.remove", {"id": number}, output)


@fault.command("import")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("path")
@output_option
@click.pass_context
def import_rules(context: click.Context, kind: str, path: str, output: str) -> None:
    """Take the rules of a file, or the chunks that it names as bad."""
    _ask(context, "fault.import", {"kind": kind, "path": os.path.abspath(path)}, output)
