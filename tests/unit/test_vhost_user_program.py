"""What the vhost-user back-end program says of itself, on the command line and in its descriptor."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ocssd_daemon.protocol.vhost_user.program import BACKEND_TYPE, capabilities
from ocssd_daemon.protocol.vhost_user.session import OFFERED_PROTOCOL_FEATURES
from ocssd_daemon.protocol.vhost_user.wire import ProtocolFeature

PAGE = Path(__file__).parents[2] / "docs/vhost-user.md"
DESCRIPTOR = Path(__file__).parents[2] / "share/qemu/vhost-user/50-ocssd-daemon.json"


def test_a_capability_is_shown_only_if_the_command_line_has_its_option():
    assert capabilities(["--socket-path", "--blk-file"]) == {"type": "block", "features": ["blk-file"]}


def test_the_descriptor_has_the_fields_of_its_schema():
    descriptor = json.loads(DESCRIPTOR.read_text())
    assert descriptor.keys() == {"description", "type", "binary", "tags"}
    assert descriptor["type"] == BACKEND_TYPE
    assert Path(descriptor["binary"]).name == "ocssd-daemon"


def test_the_documentation_lists_exactly_what_is_offered():
    rows = re.findall(r"^\| ([A-Z_]+) \|", PAGE.read_text(), re.MULTILINE)
    assert {ProtocolFeature[name] for name in rows} == set(OFFERED_PROTOCOL_FEATURES)
