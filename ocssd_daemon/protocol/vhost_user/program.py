"""Owns what a vhost-user back end says of itself before any socket exists: the answer to --print-capabilities.

Spec: vhost-user protocol, "Backend programs". The descriptor that packages install for management software says the
same: `share/qemu/vhost-user/50-ocssd-daemon.json`.
"""

from __future__ import annotations

from collections.abc import Collection

BACKEND_TYPE = "block"
# A feature of a back-end program is an option that it takes.
OPTION_OF_FEATURE = {"read-only": "--read-only", "blk-file": "--blk-file"}


def capabilities(options: Collection[str]) -> dict[str, object]:
    """The JSON object for a program whose command line takes *options*."""
    features = [feature for feature, option in OPTION_OF_FEATURE.items() if option in options]
    return {"type": BACKEND_TYPE, "features": features}
