"""Owns the answers to Identify (NVM Express Base 1.3, 5.15): one entry of ``CNS`` per structure.

What the controller says it can do is computed from what is registered: OACS and the effects log from the
admin table, ONCS from the I/O table. Nothing is claimed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..protocol.nvme import identify as layout
from ..protocol.nvme.commands import BROADCAST_NSID, AdminOpcode, IdentifyCommand, IoOpcode, Record
from ..protocol.nvme.identify import Cns, DescriptorType
from ..protocol.nvme.status import Status
from .answers import Answer, fail, to_host
from .features import WARNING_KELVIN
from .registers import VERSION_1_3

if TYPE_CHECKING:
    from .controller import Controller

# data blocks and segments, no bit buckets (bit 16); the metadata pointer may be an SGL (bit 19)
SGLS_DWORD_ALIGNED = 2 << 0 | 1 << 19
LPA_EFFECTS, LPA_EXTENDED = 1 << 1, 1 << 2          # log offset and 32-bit length
CRITICAL_KELVIN = 353
CNTRLTYPE_IO = 1
FUSED_COMPARE_WRITE = 1 << 0
VWC_PRESENT = 1 << 0

_OACS = {AdminOpcode.FORMAT_NVM: 1 << 1, AdminOpcode.DOORBELL_BUFFER: 1 << 8}
_ONCS = {IoOpcode.COMPARE: 1 << 0, IoOpcode.DSM: 1 << 2, IoOpcode.WRITE_ZEROES: 1 << 3,
         IoOpcode.VERIFY: 1 << 7}


def _text(value: str, length: int) -> bytes:
    return value.encode("ascii", "replace")[:length].ljust(length, b" ")


def controller_data(controller: Controller) -> bytes:
    """CNS 01h."""
    config = controller.config
    zero = layout.IdentifyController.parse(bytes(layout.IDENTIFY_BYTES))
    return layout.IdentifyController.build({
        **zero, "vid": config.vid, "ssvid": config.ssvid, "sn": _text(config.serial, 20),
        "mn": _text(config.model, 40),
        "fr": _text(config.firmware, 8), "rab": 6, "ieee": b"\x00\x02\xb3", "mdts": config.mdts,
        "ver": VERSION_1_3,
        "cntrltype": CNTRLTYPE_IO,
        "subnqn": f"nqn.2024-01.io.ocssd-daemon:{config.serial}".encode().ljust(256, b"\0"),
        "sqes": 0x66, "cqes": 0x44, "sgls": SGLS_DWORD_ALIGNED, **_limits(controller),
        **_abilities(controller),
    })


def _limits(controller: Controller) -> dict[str, Any]:
    config = controller.config
    return {"acl": config.acl, "aerl": config.aerl, "elpe": config.error_entries - 1,
            "nn": len(controller.namespaces),
            "wctemp": WARNING_KELVIN, "cctemp": CRITICAL_KELVIN, "tnvmcap": controller.capacity_bytes,
            "frmw": 0x03}


def _abilities(controller: Controller) -> dict[str, Any]:
    admin, io = controller.admin_opcodes, controller.io_opcodes
    return {"oacs": sum(bit for opcode, bit in _OACS.items() if opcode in admin),
            "oncs": sum(bit for opcode, bit in _ONCS.items() if opcode in io),
            "fuses": FUSED_COMPARE_WRITE if IoOpcode.COMPARE in io else 0,
            "vwc": VWC_PRESENT if controller.config.write_cache else 0, "lpa": LPA_EFFECTS | LPA_EXTENDED}


def _namespace(controller: Controller, nsid: int, _command: Record) -> Answer:
    if nsid == BROADCAST_NSID:      # what namespaces have in common: nothing beyond the LBA format of none
        return to_host(bytes(layout.IDENTIFY_BYTES))
    namespace = controller.namespaces.get(nsid)
    return to_host(namespace.identify()) if namespace else fail(Status.INVALID_NAMESPACE)


def _controller(controller: Controller, _nsid: int, _command: Record) -> Answer:
    return to_host(controller_data(controller))


def _list(controller: Controller, nsid: int, _command: Record) -> Answer:
    if nsid >= BROADCAST_NSID - 1:
        return fail(Status.INVALID_NAMESPACE)
    above = [n for n in sorted(controller.namespaces) if n > nsid][:1024]
    return to_host(layout.NamespaceList.build(above + [0] * (1024 - len(above))))


def _descriptors(controller: Controller, nsid: int, _command: Record) -> Answer:
    namespace = controller.namespaces.get(nsid)
    if namespace is None:
        return fail(Status.INVALID_NAMESPACE)
    found = ((DescriptorType.NGUID, namespace.identity.bytes), (DescriptorType.UUID,
                                                                namespace.identity.bytes),
             (DescriptorType.CSI, b"\0"))
    raw = b"".join(layout.NamespaceDescriptor.build({"nidt": kind, "nidl": len(value)}) + value
                   for kind, value in found)
    return to_host(raw.ljust(layout.IDENTIFY_BYTES, b"\0"))


def _nvm_only(controller: Controller, nsid: int, command: Record) -> Answer:
    """CNS 05h, 06h: the NVM command set has nothing to add to the older structures."""
    if command.cns == Cns.NAMESPACE_CSI and nsid not in controller.namespaces:
        return fail(Status.INVALID_NAMESPACE)
    return to_host(bytes(layout.IDENTIFY_BYTES))


def _independent(controller: Controller, nsid: int, _command: Record) -> Answer:
    namespace = controller.namespaces.get(nsid)
    if namespace is None:
        return fail(Status.INVALID_NAMESPACE)
    zero = layout.NamespaceIndependent.parse(bytes(layout.IDENTIFY_BYTES))
    return to_host(layout.NamespaceIndependent.build({**zero, "nsattr": int(namespace.read_only),
                                                      "nstat": 1}))


CNS: dict[int, Callable[[Any, int, Record], Answer]] = {
    Cns.NAMESPACE: _namespace,
    Cns.CONTROLLER: _controller,
    Cns.ACTIVE_NAMESPACES: _list,
    Cns.DESCRIPTORS: _descriptors,
    Cns.NAMESPACE_CSI: _nvm_only,
    Cns.CONTROLLER_CSI: _nvm_only,
    Cns.ACTIVE_NAMESPACES_CSI: _list,
    Cns.NAMESPACE_INDEPENDENT: _independent,
    Cns.ALLOCATED_NAMESPACES: _list,
    Cns.ALLOCATED_NAMESPACE: _namespace,
}


_OF_A_COMMAND_SET = frozenset({Cns.NAMESPACE_CSI, Cns.CONTROLLER_CSI, Cns.ACTIVE_NAMESPACES_CSI})


def identify(controller: Controller, command: Record) -> Answer:
    """There is one command set, NVM (CSI 0)."""
    body = IdentifyCommand.parse(command.dwords)
    handler = CNS.get(body.cns)
    if body.cns in _OF_A_COMMAND_SET and body.csi:
        return fail(Status.INVALID_FIELD)
    return handler(controller, command.nsid, body) if handler else fail(Status.INVALID_FIELD)

