"""Owns Get and Set Features (NVM Express Base 1.3, 5.14, 5.21): the values, their defaults, and what a
change does.

Every feature is one row of ``FEATURES``. None is saveable, so SV is refused by name and the saved values
(SEL = 2) are the defaults. A controller reset brings the defaults back, except for the features that the
specification calls persistent (figure 109: LBA Range Type, Software Progress Marker); those last until a
reset by the bus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..protocol.nvme import commands
from ..protocol.nvme import features as layout
from ..protocol.nvme.commands import BROADCAST_NSID, Record
from ..protocol.nvme.features import CHANGEABLE, DULBE, NAMESPACE_SPECIFIC, Feature, Select
from ..protocol.nvme.logs import EventType, Log
from ..protocol.nvme.status import Status
from .answers import OK, Answer, fail

if TYPE_CHECKING:
    from .controller import Controller

TEMPERATURE_KELVIN = 300
WARNING_KELVIN = 343
SMART_WARNING_BITS = 0x1F               # of the critical warning: what AEC enables one by one
_SMART_TEMPERATURE = 1
_TEMPERATURE_WARNING = 1 << 1
_ALL_SENSORS = 0xF
_COMPOSITE = 0
COALESCING_UNIT_NS = 100_000


@dataclass(frozen=True)
class Row:
    """``bits`` are the ones of CDW11 that are kept; any other set bit is an invalid field."""

    bits: int = 0xFFFF_FFFF
    default: Callable[[Any, int], int] = lambda controller, cdw11: 0
    changed: Callable[[Any, int, int], Answer] = lambda controller, nsid, value: OK
    scope: int = 0                      # NAMESPACE_SPECIFIC or 0
    data_bytes: int = 0                 # of a data buffer that goes with it
    persistent: bool = False            # over a controller reset
    there: Callable[[Any], bool] = lambda controller: True


def _queues_default(controller: Controller, _cdw11: int = 0) -> int:
    return (controller.config.queue_pairs - 1) * 0x10001


def _queues(controller: Controller, _nsid: int, value: int) -> Answer:
    """All queues are allocated whatever is asked; FFFFh is not a number of queues (5.21.1.7)."""
    if controller.has_io_queues:
        return fail(Status.COMMAND_SEQUENCE)
    if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
        return fail(Status.INVALID_FIELD)
    return Answer(dw0=_queues_default(controller))


def _power(_controller: Controller, _nsid: int, value: int) -> Answer:
    return fail(Status.INVALID_FIELD) if value & 0x1F else OK


def _threshold_default(_controller: Controller, cdw11: int) -> int:
    """None below (THSEL 1), the warning temperature above."""
    return 0 if cdw11 >> 20 & 3 else WARNING_KELVIN


def _temperature(controller: Controller, _nsid: int, value: int) -> Answer:
    """There is one sensor, the composite one (5.21.1.4)."""
    if value >> 16 & 0xF not in (_COMPOSITE, _ALL_SENSORS) or value >> 20 & 3 > 1:
        return fail(Status.INVALID_FIELD)
    if crossed(value & 0xFFFF, under=bool(value >> 20 & 3)) and async_events(controller) & _TEMPERATURE_WARNING:
        controller.raise_event(EventType.SMART, _SMART_TEMPERATURE, Log.SMART)
    return OK


def crossed(threshold: int, *, under: bool) -> bool:
    """Is the temperature beyond *threshold*?"""
    return threshold >= TEMPERATURE_KELVIN if under else threshold <= TEMPERATURE_KELVIN


def async_events(controller: Controller) -> int:
    """Which events the host wants (feature 0Bh)."""
    return value_of(controller, Feature.ASYNC_EVENTS)


def _write_cache(controller: Controller, _nsid: int, value: int) -> Answer:
    """Switched off, what the cache holds is written at once, and every write as it comes (5.21.1.6)."""
    controller.queues.set_write_cache(bool(value & 1))
    if not value & 1:
        controller.queues.flush()
    return OK


def _dulbe(controller: Controller, nsid: int, value: int) -> Answer:
    controller.queues.set_dulbe(nsid, bool(value & DULBE))
    return OK


def _feedback(controller: Controller, nsid: int, value: int) -> Answer:
    controller.queues.set_media_feedback(nsid, value & 3)
    return OK


def _coalescing(controller: Controller, _nsid: int, value: int) -> Answer:
    controller.queues.set_coalescing(value & 0xFF, (value >> 8 & 0xFF) * COALESCING_UNIT_NS)
    return OK


def _coalescing_default(controller: Controller, _cdw11: int) -> int:
    return int(controller.config.coalesce_commands | controller.config.coalesce_100us << 8)


def _vector(controller: Controller, _nsid: int, value: int) -> Answer:
    if value & 0xFFFF >= controller.config.vectors:
        return fail(Status.INVALID_FIELD)
    controller.queues.set_vector_coalescing(value & 0xFFFF, bool(value >> 16 & 1))
    return OK


FEATURES: dict[int, Row] = {
    Feature.ARBITRATION: Row(bits=0xFFFF_FF07),
    Feature.POWER_MANAGEMENT: Row(bits=0xFF, changed=_power),
    Feature.LBA_RANGE_TYPE: Row(bits=0x3F, scope=NAMESPACE_SPECIFIC, data_bytes=layout.LBA_RANGE_TABLE_BYTES,
                                persistent=True),
    Feature.TEMPERATURE_THRESHOLD: Row(bits=0x3F_FFFF, default=_threshold_default, changed=_temperature),
    Feature.ERROR_RECOVERY: Row(bits=0x1_FFFF, changed=_dulbe, scope=NAMESPACE_SPECIFIC),
    Feature.VOLATILE_WRITE_CACHE: Row(bits=1, default=lambda c, _: 1, changed=_write_cache,
                                      there=lambda c: bool(c.config.write_cache)),
    Feature.NUMBER_OF_QUEUES: Row(default=_queues_default, changed=_queues),
    Feature.INTERRUPT_COALESCING: Row(bits=0xFFFF, default=_coalescing_default, changed=_coalescing),
    Feature.INTERRUPT_VECTOR: Row(bits=0x1_FFFF, default=lambda c, cdw11: cdw11 & 0xFFFF, changed=_vector),
    Feature.WRITE_ATOMICITY: Row(bits=1),
    Feature.ASYNC_EVENTS: Row(default=lambda c, _: SMART_WARNING_BITS),
    Feature.SOFTWARE_PROGRESS: Row(bits=0xFF, persistent=True),
    Feature.MEDIA_FEEDBACK: Row(bits=3, changed=_feedback, scope=NAMESPACE_SPECIFIC),
}


def data_bytes(fid: int) -> int:
    """Length of the data buffer that a Set Features of *fid* brings."""
    row = FEATURES.get(fid)
    return row.data_bytes if row else 0


def _targets(controller: Controller, row: Row, nsid: int) -> list[int] | None:
    """The namespaces that a set is for ([0]: the controller), or None when there is no such namespace."""
    if not row.scope:
        return [0]
    if nsid == BROADCAST_NSID:
        return sorted(controller.namespaces)
    return [nsid] if nsid in controller.namespaces else None


def _row(controller: Controller, fid: int) -> Row | None:
    row = FEATURES.get(fid)
    return row if row is not None and row.there(controller) else None


def get_features(controller: Controller, command: Record) -> Answer:
    body = commands.GetFeatures.parse(command.dwords)
    row = _row(controller, body.fid)
    if row is None or body.select > Select.CAPABILITIES:
        return fail(Status.INVALID_FIELD)
    if body.select == Select.CAPABILITIES:
        return Answer(dw0=row.scope | CHANGEABLE)
    if body.fid == Feature.INTERRUPT_VECTOR and body.cdw11 & 0xFFFF >= controller.config.vectors:
        return fail(Status.INVALID_FIELD)
    targets = _targets(controller, row, command.nsid)
    if not targets or (row.scope and command.nsid == BROADCAST_NSID):
        return fail(Status.INVALID_NAMESPACE)
    return _value(controller, row, body, targets[0])


def _value(controller: Controller, row: Row, body: Record, nsid: int) -> Answer:
    default = row.default(controller, body.cdw11)
    if body.select != Select.CURRENT:
        return Answer(dw0=default, data=bytes(row.data_bytes))
    if body.fid == Feature.NUMBER_OF_QUEUES:
        return Answer(dw0=default)
    key = _key(body.fid, nsid, body.cdw11)
    return Answer(dw0=controller.feature_values.get(key, default),
                  data=controller.feature_data.get(key, bytes(row.data_bytes)))


def value_of(controller: Controller, fid: int, cdw11: int = 0) -> int:
    """The current value of a feature of the controller as a whole."""
    return controller.feature_values.get(_key(fid, 0, cdw11), FEATURES[fid].default(controller, cdw11))


def _key(fid: int, nsid: int, cdw11: int) -> tuple[int, int, int]:
    """Values of one feature that exist several times: per vector, and per temperature direction."""
    selector = {Feature.INTERRUPT_VECTOR: cdw11 & 0xFFFF, Feature.TEMPERATURE_THRESHOLD: cdw11 >> 20 & 3}
    return fid, nsid, selector.get(Feature(fid), 0)


def set_features(controller: Controller, command: Record, data: bytes) -> Answer:
    body = commands.SetFeatures.parse(command.dwords)
    row = _row(controller, body.fid)
    if row is None:
        return fail(Status.INVALID_FIELD)
    if body.save:
        return fail(Status.FEATURE_NOT_SAVEABLE)
    if body.cdw11 & ~row.bits:
        return fail(Status.INVALID_FIELD)
    targets = _targets(controller, row, command.nsid)
    if targets is None:
        return fail(Status.INVALID_NAMESPACE)
    return _assign(controller, row, body, targets, data)


def _assign(controller: Controller, row: Row, body: Record, targets: list[int], data: bytes) -> Answer:
    answer = OK
    for nsid in targets:
        answer = row.changed(controller, nsid, body.cdw11)
        if answer.status != Status.SUCCESS:
            return answer
        key = _key(body.fid, nsid, body.cdw11)
        controller.feature_values[key] = body.cdw11
        if row.data_bytes:
            controller.feature_data[key] = data
    return answer


def reset_features(controller: Controller, *, all_of_them: bool = False) -> None:
    """Defaults again, in the queues too. A host waits for it: only what was changed is told to them."""
    queues, config = controller.queues, controller.config
    kept = set() if all_of_them else {fid for fid, row in FEATURES.items() if row.persistent}
    for fid, nsid, selector in list(controller.feature_values):
        if fid in kept:
            continue
        del controller.feature_values[fid, nsid, selector]
        controller.feature_data.pop((fid, nsid, selector), None)
        if fid in _OF_NAMESPACES:
            _OF_NAMESPACES[fid](queues, nsid)
    queues.set_write_cache(config.write_cache)
    queues.set_coalescing(config.coalesce_commands, config.coalesce_100us * COALESCING_UNIT_NS)


_OF_NAMESPACES: dict[int, Callable[[Any, int], None]] = {
    Feature.ERROR_RECOVERY: lambda queues, nsid: queues.set_dulbe(nsid, False),
    Feature.MEDIA_FEEDBACK: lambda queues, nsid: queues.set_media_feedback(nsid, 0),
}
