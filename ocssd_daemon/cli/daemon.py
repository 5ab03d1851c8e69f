"""``ocssd-daemon``: owns its arguments and its exit codes, and turns what goes wrong at start into one line.

Flags that name a setting are that setting's short form and win over the configuration file; ``--set`` wins
over both. Exit codes: 0 a clean end, 1 failed while starting or running, 2 usage or settings; with
``--run``, the command's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ocssd_daemon import __version__
from ocssd_daemon import settings as sets
from ocssd_daemon.cli.output import OneLineErrors
from ocssd_daemon.log import LEVELS, configure, kv

if TYPE_CHECKING:
    from ocssd_daemon.daemon import Daemon
    from ocssd_daemon.nand.geometry import Geometry

log = logging.getLogger(__name__)

# Flags that are the short form of a setting.
SHORT_FORMS = {
    "socket_path": "vhost.socket",
    "nbd": "nbd.listen",
    "vfio_user": "nvme.socket",
    "control": "control.socket",
    "store": "store",
    "size": "size",
    "durability": "durability",
    "age": "age",
    "read_only": "read_only",
    "insecure": "nbd.insecure",
}

WAYS = """no transport named; name one or more of these ways to attach the disk:
  --socket /run/ocssd.sock           vhost-user-blk, for QEMU and other virtual machine monitors
  --nbd unix:/run/ocssd-nbd.sock     NBD over a Unix socket, for clients on this machine
  --nbd tcp:127.0.0.1:10809          NBD over TCP
  --vfio-user /run/ocssd-nvme.sock   the Open-Channel SSD itself, as an NVMe controller for QEMU 10.1 or newer"""


def fail(line: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"ocssd-daemon: {line}", err=True)
    sys.exit(code)


def _short_forms(flags: dict[str, Any]) -> dict[str, sets.Given]:
    """What the flags set: only those that were given."""
    return {
        key: sets.Given(flags[name], f"--{name.replace('_', '-')}")
        for name, key in SHORT_FORMS.items()
        if flags[name] not in (None, (), False)
    }


def _layers(flags: dict[str, Any]) -> list[dict[str, sets.Given]]:
    ours = [
        sets.from_toml(flags["config"]) if flags["config"] else {},
        _short_forms(flags),
        sets.from_assignments(flags["assignments"]),
    ]
    return [sets.from_preset(flags["preset"]), _reference_layer(flags["qemu_nvme"], ours), *ours]


def _reference_layer(line: str | None, ours: list[dict[str, sets.Given]]) -> dict[str, sets.Given]:
    """Settings of the reference emulator's options; what means nothing here is said once.

    It took the shape of the flash from its backing file, so that is looked at: *ours* may name it.
    """
    if line is None:
        return {}
    from ocssd_daemon.cli.qemu_nvme import Backing, translate
    from ocssd_daemon.nand.store import StoreError, peek

    named = {key: given for layer in ours for key, given in layer.items()}
    backing = Backing()
    if "store" in named:
        with contextlib.suppress(StoreError):  # opening it says why
            geometry, size_bytes = peek(str(named["store"].value))
            backing = Backing(size_bytes, geometry)
    done = translate(line, backing)
    for note in done.notes:
        log.warning(kv("qemu_nvme.no_meaning", option=note))
    if {"size", "geometry.chunks"} & named.keys():
        done.values.pop("size", None)
    return done.layer()


def _print_capabilities(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import json

        from ocssd_daemon.protocol.vhost_user.program import capabilities

        options = [option for each in context.command.params for option in each.opts]
        click.echo(json.dumps(capabilities(options)))
        context.exit()


@click.command(
    "ocssd-daemon",
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--socket",
    "--socket-path",
    "socket_path",
    metavar="PATH",
    help="Serve vhost-user-blk at this Unix socket.",
)
@click.option("--fd", type=click.IntRange(0), metavar="N", help="Serve vhost-user-blk on this inherited socket.")
@click.option("--nbd", multiple=True, metavar="ADDRESS", help="Serve NBD at unix:PATH or tcp:HOST:PORT. Repeatable.")
@click.option("--vfio-user", metavar="PATH", help="Serve the NVMe controller over vfio-user at this Unix socket.")
@click.option("--qemu-nvme", metavar="OPTIONS", help="Options of the reference emulator's -device nvme,…")
@click.option("--control", metavar="PATH", help="Control socket for ocssd; default: the first socket's path + .ctl.")
@click.option("--store", "--blk-file", metavar="FILE", help="Keep the flash in this image file; default: RAM.")
@click.option("--size", metavar="SIZE", help="Raw flash, such as 4G; the disk is smaller by the over-provisioning.")
@click.option("--preset", default="default", metavar="NAME", help=f"Start from: {', '.join(sets.PRESETS)}.")
@click.option("--config", metavar="FILE", help="Settings in TOML.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")
@click.option("--age", metavar="life=90%,fill=80%,...", help="A used drive: life, fill, retention (180d), seed.")
@click.option("--durability", metavar="process|host", help="What a FLUSH survives; host: also a crash of this machine.")
@click.option("--read-only", is_flag=True, help="Refuse every write.")
@click.option("--insecure", is_flag=True, help="Allow NBD over TCP without TLS on an address that is not loopback.")
@click.option("--pidfile", metavar="PATH", help="Write the process id here when ready; locked, removed at the end.")
@click.option("--run", metavar="COMMAND", help="When ready run this with $uri, $socket and $ctl; end when it ends.")
@click.option("--exit-with-parent", is_flag=True, help="End when the parent process does.")
@click.option("--show-attach", is_flag=True, help="When ready print the command lines that attach the disk.")
@click.option("--check", is_flag=True, help="Only check the settings; say what the device would be.")
@click.option(
    "--print-capabilities",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_capabilities,
    help="What this vhost-user back end can do, as JSON.",
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", help="Least severe lines to log.")
@click.version_option(__version__, prog_name="ocssd-daemon")
def main(**flags: Any) -> None:
    """Emulate an Open-Channel SSD and serve it as a disk over sockets, until a signal ends it."""
    configure(flags["log_level"], journal="JOURNAL_STREAM" in os.environ)
    try:
        layers = _layers(flags)
        settings = sets.build(*layers)
    except sets.SettingsError as error:
        fail(str(error), 2)
    if flags["check"]:
        _say_checked(_check_device(settings, sets.named(*layers)))
        return
    sys.exit(_serve(settings, flags, sets.named(*layers)))


def _check_device(settings: sets.Settings, named: frozenset[str]) -> Geometry:
    """Refuse what is sound one by one but makes no device, or does not fit the image. Returns the geometry to be."""
    import msgspec

    from ocssd_daemon.device import Device, DeviceError
    from ocssd_daemon.nand.store import StoreError, look

    try:
        if settings.store and os.path.exists(settings.store) and os.path.getsize(settings.store):
            return look(settings.store, settings.geometry, sets.names_geometry(named))
        Device(msgspec.structs.replace(settings, store=None), named, clock="virtual").close()
        return settings.geometry
    except StoreError as error:
        fail(str(error), 1)
    except (sets.SettingsError, DeviceError) as error:
        fail(str(error), 2)


def _say_checked(geometry: Geometry) -> None:
    click.echo(
        f"good: {geometry.groups} groups, {geometry.pus} PUs each, {geometry.chunks} chunks each, "
        f"{geometry.sectors} sectors each, {geometry.raw_bytes} bytes of flash"
    )


def _serve(settings: sets.Settings, flags: dict[str, Any], named: frozenset[str]) -> int:
    # Imported late: --help and a wrong setting need none of it.
    import trio

    from ocssd_daemon.daemon import Daemon, Options
    from ocssd_daemon.device import DeviceError
    from ocssd_daemon.nand.store import StoreError
    from ocssd_daemon.pidfile import PidfileError
    from ocssd_daemon.transport.listen import ListenError, inherited

    options = Options(
        fd=flags["fd"],
        pidfile=flags["pidfile"],
        run=flags["run"],
        exit_with_parent=flags["exit_with_parent"],
        on_ready=_show_attach if flags["show_attach"] else None,
        named=named,
    )
    _allow_descriptors()
    try:
        passed = inherited()
        _check_ways(settings, options, passed)
        return trio.run(Daemon(settings, options, passed).main)
    except (sets.SettingsError, DeviceError) as error:
        fail(str(error), 2)
    except (PidfileError, ListenError, StoreError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        return 130


def _allow_descriptors() -> None:
    """As many as the system lets us have: a virtqueue takes three, and the usual soft limit is 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_ways(settings: sets.Settings, options: Any, passed: dict[str, Any]) -> None:
    """Refuse what names no transport, or names one twice over. Exits with code 2."""
    from ocssd_daemon.doors import DOORS

    named = [door.name for door in DOORS.values() if door.addresses(settings)]
    unknown = passed.keys() - DOORS.keys() - {"control"}
    if unknown:
        fail(f"FileDescriptorName={min(unknown)}: must be one of {', '.join(DOORS)}, control", 2)
    if passed and (named or options.fd is not None or options.run is not None):
        fail("sockets were passed by the service manager: --socket, --fd, --nbd and --run are not for here", 2)
    if options.fd is not None and settings.vhost.socket is not None:
        fail("--fd and --socket exclude each other", 2)
    if not named and not passed.keys() & DOORS.keys() and options.fd is None:
        fail(WAYS, 2)


def _show_attach(daemon: Daemon) -> None:
    from ocssd_daemon.cli.attach import attach_text

    click.echo(attach_text(daemon.environment()))


if __name__ == "__main__":
    main()
