"""Owns the table of doors: for each transport, where its settings say to listen, its URIs, and what serves
it.

A transport appears here, in ``--help`` and in ``--print-capabilities`` only when it works. Its code is
imported when it is asked for: a daemon with one door does not pay for the others at start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from ocssd_daemon.settings import Settings, SettingsError
from ocssd_daemon.transport.listen import Address, AddressError, UnixAddress, parse_address, unix_address

Serve = Callable[..., Awaitable[Any]]  # (listener, device, *, task_status)


class Door(NamedTuple):
    """One transport, as the daemon sees it."""

    name: str  # in logs, in statistics, and as FileDescriptorName= of socket activation
    option: str  # how the command line names it, for the message that shows the ways
    variable: str  # what --run exports its URI as
    addresses: Callable[[Settings], list[Address]]
    uri: Callable[[Address, Settings], str]
    serve: Callable[[], Serve]


def _checked(key: str, parse: Callable[[str], Address], text: str) -> Address:
    try:
        return parse(text)
    except AddressError as error:
        raise SettingsError(key, str(error)) from None


# vhost-user-blk


def _vhost_addresses(settings: Settings) -> list[Address]:
    path = settings.vhost.socket
    return [] if path is None else [_checked("vhost.socket", unix_address, path)]


def _vhost_uri(address: Address, settings: Settings) -> str:
    return address.path if isinstance(address, UnixAddress) else str(address)


def _vhost_serve() -> Serve:
    from ocssd_daemon.transport.vhost_user import serve_vhost_user

    return serve_vhost_user


# NBD


def _nbd_addresses(settings: Settings) -> list[Address]:
    return [_checked("nbd.listen", parse_address, text) for text in settings.nbd.listen]


def _nbd_uri(address: Address, settings: Settings) -> str:
    """An NBD URI (nbd/doc/uri.md) of the default export: there is only one, so it needs no name."""
    scheme = "nbds" if settings.nbd.tls.mode == "require" else "nbd"
    if isinstance(address, UnixAddress):
        return f"{scheme}+unix:///?socket={quote(address.path)}"
    host = f"[{address.host}]" if ":" in address.host else address.host or "localhost"
    return f"{scheme}://{host}:{address.port}"


def _nbd_serve() -> Serve:
    from ocssd_daemon.transport.nbd import serve_nbd

    return serve_nbd


# NVMe over vfio-user


def _nvme_addresses(settings: Settings) -> list[Address]:
    path = settings.nvme.socket
    return [] if path is None else [_checked("nvme.socket", unix_address, path)]


def _nvme_uri(address: Address, settings: Settings) -> str:
    return address.path if isinstance(address, UnixAddress) else str(address)


def _nvme_serve() -> Serve:
    from ocssd_daemon.transport.vfio_user_door import serve_vfio_user

    return serve_vfio_user


DOORS: dict[str, Door] = {
    door.name: door
    for door in (
        Door("vhost-user", "--socket PATH", "socket", _vhost_addresses, _vhost_uri, _vhost_serve),
        Door("nbd", "--nbd unix:PATH|tcp:HOST:PORT", "uri", _nbd_addresses, _nbd_uri, _nbd_serve),
        Door("vfio-user", "--vfio-user PATH", "vfio", _nvme_addresses, _nvme_uri, _nvme_serve),
    )
}
