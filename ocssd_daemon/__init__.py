"""ocssd-daemon: an emulated Open-Channel SSD, served over sockets, or in process as ``ocssd_daemon.Device``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ocssd_daemon.nvme.inprocess import Device, describe

__version__ = "0.1.0"
__all__ = ["Device", "__version__", "describe"]


def __getattr__(name: str) -> Any:
    # Looked up when first used: the command-line client must not pay for numpy.
    if name not in ("Device", "describe"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ocssd_daemon.nvme import inprocess

    return getattr(inprocess, name)
