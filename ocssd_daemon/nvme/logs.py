"""Owns Get Log Page (NVM Express Base 1.3, 5.14): one builder per log, offsets and lengths handled once for
all.

Offsets are 64 bits wide, in bytes, and must be multiples of 4. A read that starts beyond the log, or of the
chunk log one that ends beyond it, is an invalid field; other logs are padded with zeroes, as hosts ask for
round lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..protocol.nvme import commands, ocssd20
from ..protocol.nvme import logs as layout
from ..protocol.nvme.commands import Record
from ..protocol.nvme.logs import Log
from ..protocol.nvme.status import Status, status_field
from .answers import Answer, fail, to_host
from .namespaces import KIND_OCSSD20, RawNamespace
from .raw20 import chunk_log
from .smart import smart_log

if TYPE_CHECKING:
    from .controller import Controller

CONTENT_COMMANDS = frozenset({0x01, 0x08, 0x09, 0x90, 0x91, 0x93})


def _error(controller: Controller, _nsid: int) -> bytes:
    entries = [layout.ErrorEntry.build({
        "error_count": e["count"], "sqid": e["sqid"], "cid": e["cid"],
        "status_phase": status_field(e["status"]) << 1,
        "parameter_location": 0xFFFF, "lba": e["lba"], "nsid": e["nsid"], "vendor": 0,
    }) for e in controller.queues.error_entries()]
    return b"".join(entries).ljust(64 * controller.config.error_entries, b"\0")


def _smart(controller: Controller, _nsid: int) -> bytes:
    return smart_log(controller)


def _firmware(controller: Controller, _nsid: int) -> bytes:
    revision = controller.config.firmware.encode("ascii", "replace")[:8].ljust(8, b" ")
    return layout.FirmwareLog.build({"afi": 1, "slots": [revision] + [bytes(8)] * 6})


def _effects(controller: Controller, _nsid: int) -> bytes:
    def row(supported: frozenset[int], content: frozenset[int]) -> list[int]:
        bits = [layout.EFFECT_SUPPORTED | (layout.EFFECT_CONTENT if o in content else 0) for o in range(256)]
        return [bits[opcode] if opcode in supported else 0 for opcode in range(256)]
    return layout.EffectsLog.build({"admin": row(controller.admin_opcodes, frozenset({0x80})),
                                    "io": row(controller.io_opcodes, CONTENT_COMMANDS)})


def _changed(_controller: Controller, _nsid: int) -> bytes:
    return bytes(4096)


def _chunks(controller: Controller, nsid: int) -> bytes | int:
    namespace = controller.namespaces.get(nsid)
    if namespace is None:
        return int(Status.INVALID_NAMESPACE)
    if not isinstance(namespace, RawNamespace) or namespace.kind != KIND_OCSSD20:
        return int(Status.LOG_PAGE_INVALID)
    return chunk_log(namespace, controller.foreign_pus()).tobytes()


def _notifications(controller: Controller, _nsid: int) -> bytes:
    entries = b"".join(ocssd20.NotificationEntry.build({**e, "nlb": e["nlb"]})
                       for e in controller.queues.notifications())
    return entries.ljust(64 * ocssd20.NOTIFICATION_BYTES, b"\0")


LOGS: dict[int, Callable[[Any, int], bytes | int]] = {
    Log.ERROR: _error, Log.SMART: _smart, Log.FIRMWARE: _firmware, Log.CHANGED_NAMESPACES: _changed,
    Log.EFFECTS: _effects, Log.CHUNK_INFORMATION: _chunks, Log.CHUNK_NOTIFICATION: _notifications,
}


def get_log_page(controller: Controller, command: Record) -> Answer:
    body = commands.GetLogPage.parse(command.dwords)
    build = LOGS.get(body.lid)
    if build is None:
        return fail(Status.LOG_PAGE_INVALID)
    if body.offset_bytes % 4 or controller.exceeds_mdts(body.length_bytes):
        return fail(Status.INVALID_FIELD)
    page = build(controller, command.nsid)
    if isinstance(page, int):
        return fail(page)
    return _slice(controller, body, page)


def _slice(controller: Controller, body: Record, page: bytes) -> Answer:
    end = body.offset_bytes + body.length_bytes
    if body.offset_bytes > len(page) or (body.lid == Log.CHUNK_INFORMATION and end > len(page)):
        return fail(Status.INVALID_FIELD)
    if not body.retain:
        controller.event_seen(body.lid)
    return to_host(page[body.offset_bytes:end].ljust(body.length_bytes, b"\0"))
