"""Owns the state machine of one vhost-user session, as a table from request to rule.

Theory of operation (vhost-user protocol, "Communication", "Starting and stopping rings", "Multiple queue
support")

Rule 1: this module and its handlers see messages and opaque descriptor numbers, never a socket. Bytes come in
through `Session.receive`, an `Answer` comes out; what happens to rings and memory happens through `Backend`.

Rule 2: the table is the truth. A protocol feature is offered exactly if a rule needs it or, where it has no
message of its own, `MESSAGELESS_FEATURES` names it. To implement a message is to add a rule; nothing else has to
be told.

*Negotiation.* GET_FEATURES shows what the rings can do, plus bit 30, which opens GET/SET_PROTOCOL_FEATURES. A
message whose protocol feature was not negotiated is refused. A feature that was not offered is refused. While
a ring is started only LOG_ALL may change, because the rings' layout depends on the others.

*Answers.* A rule either replies with data of its own, or (REPLY_ACK negotiated and need_reply set) is
acknowledged with 0. A refused message is answered with 1 if an acknowledgement was asked for; if not, the
front end believes that it was obeyed, so the only honest answer is to end the connection. GET_CONFIG has its
own refusal: no data.

*Rings.* A ring is started by SET_VRING_KICK and stopped by GET_VRING_BASE or by a reset. A started ring runs
while it is enabled; without bit 30 there is no SET_VRING_ENABLE and it runs at once. A kick that
arrives before the enable is remembered by the backend. SET_VRING_ENABLE and GET_VRING_BASE come for rings
that the driver never set up, too: both are no errors.

*Reset.* RESET_DEVICE drops the rings, the negotiated features, the status and the inflight region. Memory,
error descriptors, protocol features and the back-end channel stay: the front end does not send them again.
A status of 0 alone drops nothing: some front ends send it before they ask where the rings stood.

*Configuration.* A front end that starts a ring without having read the configuration is one that reconnected: it
goes by what it read before, in the session before, maybe with a daemon that was killed since. So the write cache mode
that its driver chose, which the host keeps (`Host.keep_wce`), is put back
(`continue_configuration`), and what else changed meanwhile is announced (`config_is_news`). Changes are news only
while rings run; QEMU ignores them before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

from ocssd_daemon.protocol.vhost_user import configuration, memory, migration, negotiation, rings
from ocssd_daemon.protocol.vhost_user.backend import Backend, Host
from ocssd_daemon.protocol.vhost_user.messages import (
    U64,
    Empty,
    Enclosing,
    Header,
    MemTable,
    Message,
    Refusal,
    VringAddr,
    VringFd,
    VringState,
    decode_payload,
    encode_reply,
)
from ocssd_daemon.protocol.vhost_user.wire import Feature, ProtocolFeature, Request, request_name

Handler = Callable[["Session", Any, Sequence[int]], "Message | Enclosing | None"]

NOTHING = ProtocolFeature(0)
NO_FEATURE = Feature(0)
# GET_VRING_BASE_INFLIGHT permits to leave requests in flight when a ring stops; a ring that is drained leaves none.
MESSAGELESS_FEATURES = (
    ProtocolFeature.REPLY_ACK | ProtocolFeature.GPA_ADDRESSES | ProtocolFeature.GET_VRING_BASE_INFLIGHT
)
ACCEPTED, REFUSED = U64(0), U64(1)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a request needs, and who carries it out."""

    handle: Handler
    needs: ProtocolFeature = NOTHING
    replies: bool = False  # with data of its own; all others are acknowledged on demand
    fds: int = 0  # that must come along; SET_MEM_TABLE and SET_VRING_* say how many in the message itself
    refusal: Message | None = None  # reply to a refused message, where the message has a way to say so


@dataclass(frozen=True, slots=True)
class Answer:
    """What the transport is to do: send *data* with *fds* (then close them), log *refused*, hang up."""

    data: bytes = b""
    fds: tuple[int, ...] = ()
    refused: str = ""
    close: bool = False


@dataclass(slots=True)
class Ring:
    """What the protocol remembers of a ring; its addresses and indices are the backend's."""

    num: int = 0
    started: bool = False
    enabled: bool = False


@dataclass
class Session:
    """One front end's view of the device."""

    backend: Backend
    num_queues: int
    host: Host
    known_config: bytes | None = None  # what the front end of this socket read last, in any session
    known_wce: int = 1  # the write cache mode that it was told or chose last, in any session
    config_read: bool = False  # in this session
    features: Feature = NO_FEATURE
    protocol_features: ProtocolFeature = NOTHING
    status: int = 0
    transfer: migration.Transfer = migration.Transfer.NONE
    regions: list[tuple[int, int, int]] = field(default_factory=list)  # (gpa, size_bytes, user_addr)
    rings: list[Ring] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rings = [Ring() for _ in range(self.num_queues)]

    @property
    def started(self) -> bool:
        return any(ring.started for ring in self.rings)

    @property
    def running(self) -> bool:
        always_enabled = Feature.PROTOCOL_FEATURES not in self.features
        return any(ring.started and (ring.enabled or always_enabled) for ring in self.rings)

    @property
    def offered_protocol_features(self) -> ProtocolFeature:
        return OFFERED_PROTOCOL_FEATURES

    def continue_configuration(self) -> None:
        """A ring starts: if that is after a reconnect, take up the write cache mode of the session before."""
        if not self.config_read and self.backend.device_features & Feature.CONFIG_WCE:
            self.backend.set_wce(self.known_wce)
        self.config_read = True

    def choose_wce(self, wce: int) -> None:
        """The driver, or the daemon that this device comes from, wants this mode."""
        self.backend.set_wce(wce)
        self.wce_is_known(wce)

    def wce_is_known(self, wce: int) -> None:
        """The front end knows the mode: it holds until it is changed, whatever happens to us."""
        self.config_read = True
        self.known_wce = wce
        self.host.keep_wce(wce)

    def config_is_news(self) -> bool:
        """Whether the front end must be told that the configuration changed; true once per change."""
        if not self.running:
            return False
        config = self.backend.config()
        is_news, self.known_config = config != self.known_config, config
        return is_news

    def receive(self, header: Header, payload: bytes, fds: Sequence[int]) -> Answer:
        """Carry out one message. *fds* are borrowed: the caller closes them afterwards."""
        rule = RULES.get(header.request)
        try:
            reply = self._carry_out(rule, header, payload, fds)
        except ValueError as why:
            return self._refuse(rule, header, str(why))
        return self._reply(header, reply)

    def _carry_out(
        self, rule: Rule | None, header: Header, payload: bytes, fds: Sequence[int]
    ) -> Message | Enclosing | None:
        if rule is None:
            raise Refusal("not supported")
        missing = rule.needs & ~self.protocol_features
        if missing:
            raise Refusal(f"protocol feature {missing.name} was not negotiated")
        message = decode_payload(header, payload)
        self._check_index(message)
        _check_fds(rule, message, fds)
        return rule.handle(self, message, fds)

    def _check_index(self, message: Message) -> None:
        if isinstance(message, (VringState, VringAddr, VringFd)) and message.index >= self.num_queues:
            raise Refusal(f"ring {message.index} does not exist, there are {self.num_queues}")

    def _wants_ack(self, header: Header) -> bool:
        return header.need_reply and ProtocolFeature.REPLY_ACK in self.protocol_features

    def _reply(self, header: Header, reply: Message | Enclosing | None) -> Answer:
        if isinstance(reply, Enclosing):
            return Answer(encode_reply(header.request, reply.message), fds=(reply.fd,))
        if reply is not None:
            return Answer(encode_reply(header.request, reply))
        return Answer(encode_reply(header.request, ACCEPTED)) if self._wants_ack(header) else Answer()

    def _refuse(self, rule: Rule | None, header: Header, why: str) -> Answer:
        sentence = f"{request_name(header.request)}: {why}"
        if rule is not None and rule.refusal is not None:
            return Answer(encode_reply(header.request, rule.refusal), refused=sentence)
        if self._wants_ack(header) and not (rule is not None and rule.replies):
            return Answer(encode_reply(header.request, REFUSED), refused=sentence)
        return Answer(refused=sentence, close=True)


def _check_fds(rule: Rule, message: Message, fds: Sequence[int]) -> None:
    # Surplus descriptors on a message that takes none are ignored: QEMU's own bugs have sent them.
    match message:
        case MemTable():
            expected = len(message.regions)
        case VringFd():
            expected = int(message.has_fd)
        case _:
            expected = rule.fds
    if expected and len(fds) != expected:
        raise Refusal(f"{len(fds)} descriptors came along, must be {expected}")


_F = ProtocolFeature

RULES: dict[int, Rule] = {
    Request.GET_FEATURES: Rule(negotiation.get_features, replies=True),
    Request.SET_FEATURES: Rule(negotiation.set_features),
    Request.SET_OWNER: Rule(negotiation.set_owner),
    Request.RESET_OWNER: Rule(negotiation.reset_owner),
    Request.GET_PROTOCOL_FEATURES: Rule(negotiation.get_protocol_features, replies=True),
    Request.SET_PROTOCOL_FEATURES: Rule(negotiation.set_protocol_features),
    Request.GET_QUEUE_NUM: Rule(negotiation.get_queue_num, _F.MQ, replies=True),
    Request.SET_BACKEND_REQ_FD: Rule(negotiation.set_backend_req_fd, _F.BACKEND_REQ, fds=1),
    Request.RESET_DEVICE: Rule(negotiation.reset_device, _F.RESET_DEVICE),
    Request.SET_STATUS: Rule(negotiation.set_status, _F.STATUS),
    Request.GET_STATUS: Rule(negotiation.get_status, _F.STATUS, replies=True),
    Request.SET_MEM_TABLE: Rule(memory.set_mem_table),
    Request.GET_MAX_MEM_SLOTS: Rule(memory.get_max_mem_slots, _F.CONFIGURE_MEM_SLOTS, replies=True),
    Request.ADD_MEM_REG: Rule(memory.add_mem_reg, _F.CONFIGURE_MEM_SLOTS, fds=1),
    # Old front ends send a descriptor with REM_MEM_REG; it means nothing.
    Request.REM_MEM_REG: Rule(memory.rem_mem_reg, _F.CONFIGURE_MEM_SLOTS),
    Request.SET_LOG_BASE: Rule(memory.set_log_base, _F.LOG_SHMFD, replies=True, fds=1),
    Request.GET_INFLIGHT_FD: Rule(memory.get_inflight_fd, _F.INFLIGHT_SHMFD, replies=True),
    Request.SET_INFLIGHT_FD: Rule(memory.set_inflight_fd, _F.INFLIGHT_SHMFD, fds=1),
    Request.SET_VRING_NUM: Rule(rings.set_vring_num),
    Request.SET_VRING_ADDR: Rule(rings.set_vring_addr),
    Request.SET_VRING_BASE: Rule(rings.set_vring_base),
    Request.GET_VRING_BASE: Rule(rings.get_vring_base, replies=True),
    Request.SET_VRING_KICK: Rule(rings.set_vring_kick),
    Request.SET_VRING_CALL: Rule(rings.set_vring_call),
    Request.SET_VRING_ERR: Rule(rings.set_vring_err),
    Request.SET_VRING_ENABLE: Rule(rings.set_vring_enable),
    Request.SET_DEVICE_STATE_FD: Rule(migration.set_device_state_fd, _F.DEVICE_STATE, replies=True, fds=1),
    Request.CHECK_DEVICE_STATE: Rule(migration.check_device_state, _F.DEVICE_STATE, replies=True),
    Request.GET_CONFIG: Rule(configuration.get_config, _F.CONFIG, replies=True, refusal=Empty()),
    Request.SET_CONFIG: Rule(configuration.set_config, _F.CONFIG),
}

OFFERED_PROTOCOL_FEATURES = reduce(or_, (rule.needs for rule in RULES.values()), MESSAGELESS_FEATURES)
