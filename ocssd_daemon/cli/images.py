"""``ocssd create`` and ``ocssd import``: own their arguments, how a result looks, and that a failure leaves nothing.

An image is made under a name that nobody has, and gets its real one when it is whole: neither a file that happens to be
called alike nor somebody else's import is touched. Exit codes: 0 done, 1 a file cannot be used or made, 2 usage or
settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from ocssd_daemon.cli.arguments import config_option, preset_option, set_option
from ocssd_daemon.cli.output import Refusal, WrongSettings, output_option, progress_bar, show

PART = ".part"
IMPORT_KEYS = tuple(f"geometry.{name}" for name in ("ws_min", "ws_opt", "mw_cunits", "maxoc", "maxocpu"))


# ocssd create.


@click.command(short_help="Make an image file for --store.")
@click.argument("path", metavar="FILE")
@preset_option
@config_option
@click.option("--qemu-img", "options", metavar="OPTIONS",
              help="Options of the reference's qemu-img create -f ocssd: num_grp=2,num_pu=4,...")
@click.option("--size", metavar="SIZE", help="Raw flash, such as 4G.")
@set_option
@output_option
def create(path: str, preset: str, config: str | None, options: str | None, size: str | None,
           assignments: tuple[str, ...], output: str) -> None:
    """Make an image file for --store, of a geometry; the file is sparse."""
    from ocssd_daemon import settings as sets
    from ocssd_daemon.cli import qemu_img
    from ocssd_daemon.cli.reference_options import Translation

    try:
        translated = qemu_img.translate(options) if options is not None else Translation("")
        layers = [
            sets.from_preset(preset), translated.layer(), sets.from_toml(config) if config else {},
            {"size": sets.Given(size, "--size")} if size else {}, _geometry_only(assignments),
        ]
        settings = sets.build(*layers)
    except sets.SettingsError as error:
        raise WrongSettings(str(error)) from None
    _make(path, settings, qemu_img.wants_room(options))
    result = {**_described(path, settings.geometry), "notes": translated.notes,
              "serve": _serve_line(path, settings, {key for layer in layers for key in layer})}
    show(result, output)


def _geometry_only(assignments: tuple[str, ...]) -> dict[str, Any]:
    from ocssd_daemon import settings as sets

    layer = sets.from_assignments(assignments)
    for key, given in layer.items():
        if not key.startswith("geometry.") and key in sets.KEYS:
            raise sets.SettingsError(key, "an image has a geometry only; give this to ocssd-daemon", *given)
    return layer


def _make(path: str, settings: Any, whole: bool) -> None:
    with _new_image(path, settings.geometry) as store:
        if whole:
            os.posix_fallocate(store.fd, 0, store.layout.size_bytes)


# ocssd import.


@click.command("import", short_help="Make an image of one of the earlier emulator.")
@click.argument("source", metavar="SRC")
@click.argument("path", metavar="DST")
@set_option
@output_option
def import_image(source: str, path: str, assignments: tuple[str, ...], output: str) -> None:
    """Make an image of ours from one of the reference emulator's qemu-img (-f ocssd); SRC is only read.

    --set geometry.ws_min=… (ws_opt, mw_cunits, maxoc, maxocpu) replaces what SRC says.
    """
    from ocssd_daemon.nvme.reference_image import ImageError, ReferenceImage

    overrides = _overrides(assignments)
    try:
        with ReferenceImage(source, overrides) as image:
            image.descriptors()                 # what is wrong with SRC is said before anything is made
            with _new_image(path, image.geometry) as store, progress_bar(f"import {source}") as progress:
                report = image.copy_to(store, progress)
            kinds = ["ocssd20"] * image.namespaces
            multi_reset = bool(image.mccap & 2)
    except ImageError as error:
        raise Refusal(str(error)) from None
    result = {
        "source": source, **_described(path, image.geometry), **dataclasses.asdict(report),
        "serve": _line(path, {"nvme.namespaces": kinds} if len(kinds) > 1 else {},
                       {"nvme.multi_reset": True} if multi_reset else {}),
    }
    show(result, output)


def _overrides(assignments: tuple[str, ...]) -> dict[str, int]:
    from ocssd_daemon import settings as sets

    try:
        layer = sets.from_assignments(assignments)
        for key, given in layer.items():
            if key not in IMPORT_KEYS and key in sets.KEYS:
                raise sets.SettingsError(key, f"an import can replace {', '.join(IMPORT_KEYS)}", *given)
        return {key.partition(".")[2]: sets.check(key, given) for key, given in layer.items()}
    except sets.SettingsError as error:
        raise WrongSettings(str(error)) from None


# Both.


@contextlib.contextmanager
def _new_image(path: str, geometry: Any) -> Iterator[Any]:
    """A fresh store that becomes *path* when the block ends well, and is gone when it does not."""
    from ocssd_daemon.nand.store import StoreError, check_unused, open_file

    part = ""
    with _terminated():
        try:
            check_unused(path)
            part = _own_file(path)
            store = open_file(part, geometry, True)
        except StoreError as error:
            _unlink(part)
            raise Refusal(str(error).replace(part or path, path)) from None
        except OSError as error:
            _unlink(part)
            raise Refusal(f"{path}: cannot be made: {error.strerror}") from None
        try:
            yield store
            store.sync()
            check_unused(path)                  # it took a while: somebody may have made one meanwhile
            os.replace(part, path)
        except StoreError as error:
            raise Refusal(str(error)) from None
        except OSError as error:
            raise Refusal(f"{path}: {error.strerror or error}") from None
        finally:
            store.close()
            _unlink(part)


def _own_file(path: str) -> str:
    """An empty file beside *path*, so that it can be renamed. One that is left by a kill ends in PART."""
    fd, part = tempfile.mkstemp(prefix=f"{os.path.basename(path)}.", suffix=PART, dir=os.path.dirname(path) or ".")
    os.close(fd)
    return part


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that it can clean up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _described(path: str, geometry: Any) -> dict[str, Any]:
    return {"image": path, "geometry": msgspec.to_builtins(geometry), "raw_bytes": geometry.raw_bytes}


def _serve_line(path: str, settings: Any, named: set[str]) -> str:
    """The daemon's command line for what was made, with those settings that the image does not keep."""
    nvme = msgspec.to_builtins(settings.nvme)
    given = {key: nvme[key.partition(".")[2]] for key in sorted(named) if key.startswith("nvme.")}
    default = {"nvme.namespaces": ("ocssd20",), "nvme.multi_reset": False, "nvme.early_reset": True}
    return _line(path, {key: value for key, value in given.items() if value != default.get(key)})


def _line(path: str, *groups: dict[str, Any]) -> str:
    import shlex

    words = ["ocssd-daemon", "--vfio-user", "/run/ocssd-nvme.sock", "--store", path]
    for key, value in (item for group in groups for item in group.items()):
        words += ["--set", f"{key}={_text(value)}"]
    return shlex.join(words)


def _text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
