"""What the vhost-user back-end program says of itself, on the command line and in its descriptor."""

from __future__ import annotations

import json
from pathlib import Path

from ocssd_daemon.protocol.vhost_user.program import BACKEND_TYPE, capabilities

DESCRIPTOR = Path(__file__).parents[2] / "share/qemu/vhost-user/50-ocssd-daemon.json"


def test_a_capability_is_shown_only_if_the_command_line_has_its_option():
    assert capabilities(["--socket-path", "--blk-file"]) == {"type": "block", "features": ["blk-file"]}


def test_the_descriptor_has_the_fields_of_its_schema():
    descriptor = json.loads(DESCRIPTOR.read_text())
    assert descriptor.keys() == {"description", "type", "binary", "tags"}
    assert descriptor["type"] == BACKEND_TYPE
    assert Path(descriptor["binary"]).name == "ocssd-daemon"
