"""``ocssd``: the operator's client. Owns which commands there are; each is a module of its own.

What commands share is below them: ``output`` (how answers look), ``rpc`` (asking a daemon), ``arguments`` (settings).
``-o json`` is the interface for programs; text is for people and may change. Nothing here imports trio or numpy, so
that it starts at once.

Exit codes: 0 done, 1 the daemon refused, cannot be reached, or it failed at run time, 2 usage or settings.
"""

from __future__ import annotations

import sys

import click

from ocssd_daemon import __version__
from ocssd_daemon.cli.check_geometry import check_geometry
from ocssd_daemon.cli.fault import fault
from ocssd_daemon.cli.images import create, import_image
from ocssd_daemon.cli.output import OneLineErrorsGroup, output_option, show
from ocssd_daemon.cli.rpc import call, find
from ocssd_daemon.cli.simulate import simulate
from ocssd_daemon.cli.sweep import sweep
from ocssd_daemon.control import schema

# Commands: one per method that takes no parameters; others get a function of their own.


@click.group(
    "ocssd",
    cls=OneLineErrorsGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("--control", envvar="OCSSD_CONTROL", metavar="PATH", help="Control socket; default: the only one.")
@click.version_option(__version__, prog_name="ocssd")
@click.pass_context
def main(context: click.Context, control: str | None) -> None:
    """Ask a running ocssd-daemon, or simulate one."""
    context.obj = control


SHORT = {"info": "Say what is running, and its settings.", "stats": "Counters of the FTL, the flash and the doors."}


def _plain_command(method: str) -> None:
    @main.command(method, help=schema.METHODS[method].effect, short_help=SHORT[method])
    @output_option
    @click.pass_obj
    def command(control: str | None, output: str) -> None:
        show(call(find(control), method), output)


for _method in SHORT:
    _plain_command(_method)


for _command in (check_geometry, create, fault, import_image, simulate, sweep):
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
