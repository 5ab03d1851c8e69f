"""Owns the control methods of fault rules. Each works while the reactor stands still, and answers with all rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ocssd_daemon.control import schema
from ocssd_daemon.control.server import Refused
from ocssd_daemon.device import Device
from ocssd_daemon.nand import faults


def handlers(device: Device) -> dict[str, Callable[[Any], msgspec.Struct]]:
    """The handler of each ``fault`` method."""

    def changed(change: Callable[[], object]) -> schema.FaultRules:
        try:
            with device.reactor.paused():
                change()
                return schema.FaultRules(device.physics.faults.list())
        except ValueError as error:
            raise Refused(str(error)) from None

    def fault_list(params: schema.NoParams) -> schema.FaultRules:
        return changed(lambda: None)

    def add(params: schema.FaultAdd) -> schema.FaultRules:
        return changed(lambda: device.physics.add_rule(faults.parse(params.rule)))

    def remove(params: schema.FaultId) -> schema.FaultRules:
        return changed(lambda: device.physics.remove_rule(params.id))

    def import_file(params: schema.FaultImport) -> schema.FaultRules:
        return changed(lambda: device.physics.import_file(params.kind, params.path))

    return {"fault.list": fault_list, "fault.add": add, "fault.remove": remove, "fault.import": import_file}
