"""Owns the admin command table (NVM Express Base 1.3, section 5; OCSSD 1.2 and 2.0): which opcodes exist,
and what runs them.

Each row says what data the command brings (``source``) and which namespaces it may name; the handler gets
the decoded entry and that data, and returns an :class:`Answer`. ``None`` as an answer means: completed later
(Asynchronous Event).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..protocol.nvme import commands, ocssd12
from ..protocol.nvme.commands import BROADCAST_NSID, AdminOpcode, Record
from ..protocol.nvme.status import Status
from . import raw12, raw20
from .answers import OK, Answer, fail, to_host
from .features import data_bytes, get_features, set_features
from .identify import identify
from .logs import get_log_page
from .namespaces import KIND_OCSSD12, RawNamespace
from .ports import QueueShape

if TYPE_CHECKING:
    from .controller import Controller

LIST_ENTRY_BYTES = 8
NOT_MAPPED = b"\xff" * LIST_ENTRY_BYTES


@dataclass(frozen=True)
class Source:
    """Bytes that the command brings: through its data pointer, or (``address`` set) from a plain bus
    address.
    """

    length_bytes: int = 0
    address: int | None = None


NOTHING = Source()


@dataclass(frozen=True)
class AdminCommand:
    run: Callable[[Any, Record, bytes], Answer | None]
    source: Callable[[Record], Source] = lambda command: NOTHING


# Queues.


def _create_cq(controller: Controller, command: Record, _data: bytes) -> Answer:
    body = commands.CreateCq.parse(command.dwords)
    status = _queue_status(controller, body, command.prp1, controller.cqs)
    if status:
        return fail(status)
    if body.vector >= controller.config.vectors:
        return fail(Status.VECTOR_INVALID)
    shape = QueueShape(body.qid, command.prp1, body.qsize_0 + 1)
    if not controller.queues.create_cq(shape, body.vector, bool(body.interrupts)):
        return fail(Status.PRP_OFFSET_INVALID)
    controller.cqs[body.qid] = set()
    return OK


def _create_sq(controller: Controller, command: Record, _data: bytes) -> Answer:
    body = commands.CreateSq.parse(command.dwords)
    status = _queue_status(controller, body, command.prp1, controller.sqs)
    if status:
        return fail(status)
    if body.cqid not in controller.cqs or not body.cqid:
        return fail(Status.CQ_INVALID)
    if not controller.queues.create_sq(QueueShape(body.qid, command.prp1, body.qsize_0 + 1), body.cqid):
        return fail(Status.PRP_OFFSET_INVALID)
    controller.sqs[body.qid] = body.cqid
    controller.cqs[body.cqid].add(body.qid)
    return OK


def _queue_status(controller: Controller, body: Record, prp1: int, existing: Any) -> int:
    """What the two creations check alike: identifier, size, contiguity, entry sizes in CC (5.3, 5.4)."""
    config, cc = controller.config, controller.registers.values["cc"]
    if not 1 <= body.qid <= config.queue_pairs or body.qid in existing:
        return Status.QID_INVALID
    if not 1 <= body.qsize_0 < config.entries:
        return Status.QUEUE_SIZE_INVALID
    if not body.contiguous or cc >> 16 & 0xFF != 0x46:
        return Status.INVALID_FIELD
    return Status.PRP_OFFSET_INVALID if prp1 % controller.page_bytes else Status.SUCCESS


def _delete_sq(controller: Controller, command: Record, _data: bytes) -> Answer:
    qid = commands.DeleteQueue.parse(command.dwords).qid
    if not qid or qid not in controller.sqs:
        return fail(Status.QID_INVALID)
    controller.queues.delete_sq(qid)
    controller.cqs[controller.sqs.pop(qid)].discard(qid)
    return OK


def _delete_cq(controller: Controller, command: Record, _data: bytes) -> Answer:
    qid = commands.DeleteQueue.parse(command.dwords).qid
    if not qid or qid not in controller.cqs:
        return fail(Status.QID_INVALID)
    if controller.cqs[qid]:
        return fail(Status.QUEUE_DELETION_INVALID)
    controller.queues.delete_cq(qid)
    del controller.cqs[qid]
    return OK


def _abort(controller: Controller, command: Record, _data: bytes) -> Answer:
    """DW0 bit 0 is 0 when the command was aborted (5.1)."""
    body = commands.Abort.parse(command.dwords)
    if body.sqid and body.sqid not in controller.sqs:
        return fail(Status.INVALID_FIELD)
    done = controller.abort_event(body.cid) if not body.sqid else controller.queues.abort(body.sqid, body.cid)
    return Answer(dw0=0 if done else 1)


def _doorbell_buffer(controller: Controller, command: Record, _data: bytes) -> Answer:
    page = controller.page_bytes
    if command.prp1 % page or command.prp2 % page or not command.prp1 or not command.prp2:
        return fail(Status.INVALID_FIELD)
    accepted = controller.queues.set_shadow_doorbells(command.prp1, command.prp2)
    return OK if accepted else fail(Status.INVALID_FIELD)


# Information.


def _identify(controller: Controller, command: Record, _data: bytes) -> Answer:
    return identify(controller, command)


def _get_log_page(controller: Controller, command: Record, _data: bytes) -> Answer:
    return get_log_page(controller, command)


def _get_features(controller: Controller, command: Record, _data: bytes) -> Answer:
    return get_features(controller, command)


def _async_event(controller: Controller, command: Record, _data: bytes) -> Answer | None:
    return controller.expect_event(command.cid)


def _format(controller: Controller, command: Record, _data: bytes) -> Answer:
    """Only the one format that there is; the data are gone afterwards (5.23).

    On flash every chunk that holds something is reset, whatever its state; wear goes up by one. Cryptographic erase (2)
    is not offered.
    """
    body = commands.FormatNvm.parse(command.dwords)
    if body.lbaf or body.extended or body.protection:
        return fail(Status.FORMAT_INVALID)
    if body.erase > 1:
        return fail(Status.INVALID_FIELD)
    named = sorted(controller.namespaces) if command.nsid == BROADCAST_NSID else [command.nsid]
    if any(nsid not in controller.namespaces for nsid in named):
        return fail(Status.INVALID_NAMESPACE)
    if any(controller.namespaces[nsid].read_only for nsid in named):
        return fail(Status.WRITE_PROTECTED)
    statuses = [controller.queues.format(nsid) for nsid in named]
    return fail(max(statuses))


# Open-Channel.


def _ocssd_identify(controller: Controller, command: Record, _data: bytes) -> Answer:
    namespace = controller.namespaces.get(command.nsid)
    if namespace is None:
        return fail(Status.INVALID_NAMESPACE)
    if not isinstance(namespace, RawNamespace):
        return fail(Status.INVALID_OPCODE)
    times = controller.flash_times_ns
    if namespace.kind == KIND_OCSSD12:
        return to_host(raw12.identity(namespace, times_ns=dict(zip(_TIMES_12, times, strict=True))))
    return to_host(raw20.geometry(namespace, wear_threshold=controller.wear_threshold,
                                  times_ns=dict(zip(_TIMES_20, times, strict=True))))


_TIMES_12 = ("trdt_ns", "trdm_ns", "tprt_ns", "tprm_ns", "tbet_ns", "tbem_ns")
_TIMES_20 = ("trdt_ns", "trdm_ns", "twrt_ns", "twrm_ns", "tcrst_ns", "tcrsm_ns")


def _raw12(controller: Controller, nsid: int) -> RawNamespace | Answer:
    namespace = controller.namespaces.get(nsid)
    if namespace is None:
        return fail(Status.INVALID_NAMESPACE)
    if not isinstance(namespace, RawNamespace) or namespace.kind != KIND_OCSSD12:
        return fail(Status.INVALID_OPCODE)
    return namespace


def _get_l2p(controller: Controller, command: Record, _data: bytes) -> Answer:
    """OCSSD 1.2, Get L2P table: 8 bytes per sector. The host keeps the map (DOM bit 0 is clear), so none is mapped."""
    namespace = _raw12(controller, command.nsid)
    if isinstance(namespace, Answer):
        return namespace
    body = commands.GetL2p.parse(command.dwords)
    length_bytes = body.nlb * LIST_ENTRY_BYTES
    if not body.nlb or body.slba + body.nlb > namespace.size_lbas or controller.exceeds_mdts(length_bytes):
        return fail(Status.INVALID_FIELD)
    return to_host(NOT_MAPPED * body.nlb)


def _get_bad_blocks(controller: Controller, command: Record, _data: bytes) -> Answer:
    namespace = _raw12(controller, command.nsid)
    if isinstance(namespace, Answer):
        return namespace
    lun = raw12.lun_of(namespace, commands.GetBadBlocks.parse(command.dwords).ppa)
    if lun is None:
        return fail(Status.INVALID_FIELD)
    return to_host(raw12.bad_block_table(namespace, lun, controller.foreign_pus()))


def _set_bad_blocks(controller: Controller, command: Record, data: bytes) -> Answer:
    namespace = _raw12(controller, command.nsid)
    if isinstance(namespace, Answer):
        return namespace
    body = commands.SetBadBlocks.parse(command.dwords)
    listed = [int.from_bytes(data[i:i + LIST_ENTRY_BYTES], "little") for i in range(0, len(data),
                                                                                    LIST_ENTRY_BYTES)]
    ppas = listed or [body.ppa]
    indices, foreign = [raw12.block_of(namespace, ppa) for ppa in ppas], controller.foreign_pus()
    known = [index for index in indices if index is not None and not raw12.is_foreign(namespace, index, foreign)]
    if body.value not in raw12.SETTABLE or len(known) != len(indices):
        return fail(Status.INVALID_FIELD)
    controller.queues.mark_blocks(namespace, known, ocssd12.BlockState(body.value))
    return OK


def _bad_block_list(command: Record) -> Source:
    body = commands.SetBadBlocks.parse(command.dwords)
    return Source((body.nlb_0 + 1) * LIST_ENTRY_BYTES, body.ppa) if body.nlb_0 else NOTHING


def _feature_data(command: Record) -> Source:
    return Source(data_bytes(commands.SetFeatures.parse(command.dwords).fid))


ADMIN: dict[int, AdminCommand] = {
    AdminOpcode.DELETE_SQ: AdminCommand(_delete_sq),
    AdminOpcode.CREATE_SQ: AdminCommand(_create_sq),
    AdminOpcode.GET_LOG_PAGE: AdminCommand(_get_log_page),
    AdminOpcode.DELETE_CQ: AdminCommand(_delete_cq),
    AdminOpcode.CREATE_CQ: AdminCommand(_create_cq),
    AdminOpcode.IDENTIFY: AdminCommand(_identify),
    AdminOpcode.ABORT: AdminCommand(_abort),
    AdminOpcode.SET_FEATURES: AdminCommand(set_features, _feature_data),
    AdminOpcode.GET_FEATURES: AdminCommand(_get_features),
    AdminOpcode.ASYNC_EVENT: AdminCommand(_async_event),
    AdminOpcode.DOORBELL_BUFFER: AdminCommand(_doorbell_buffer),
    AdminOpcode.FORMAT_NVM: AdminCommand(_format),
    AdminOpcode.OCSSD_IDENTIFY: AdminCommand(_ocssd_identify),
    AdminOpcode.GET_L2P: AdminCommand(_get_l2p),
    AdminOpcode.SET_BAD_BLOCKS: AdminCommand(_set_bad_blocks, _bad_block_list),
    AdminOpcode.GET_BAD_BLOCKS: AdminCommand(_get_bad_blocks),
}

RAW_ONLY = frozenset({AdminOpcode.OCSSD_IDENTIFY, AdminOpcode.GET_L2P, AdminOpcode.SET_BAD_BLOCKS,
                      AdminOpcode.GET_BAD_BLOCKS})
