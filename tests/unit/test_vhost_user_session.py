"""The vhost-user session: what each message needs, does, answers, and what a reset keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from ocssd_daemon.protocol.vhost_user import messages as m
from ocssd_daemon.protocol.vhost_user import wire
from ocssd_daemon.protocol.vhost_user.session import (
    MESSAGELESS_FEATURES,
    OFFERED_PROTOCOL_FEATURES,
    RULES,
    Answer,
    Session,
)
from ocssd_daemon.protocol.vhost_user.wire import Feature, ProtocolFeature, Request
from tests.kit.fake_backend import FEATURES, FakeBackend, blk_config

KICK, CALL, ERR, MEMORY = 100, 101, 102, 103  # descriptor numbers; the session only passes them on
NO_PAYLOAD = m.Empty()
F = ProtocolFeature


class FakeHost:
    """Remembers what the session asked of its transport; *pipe* is what a front end wrote for us to load."""

    def __init__(self) -> None:
        self.channels: list[int] = []
        self.saved: list[tuple[int, bytes]] = []
        self.held: list[int] = []
        self.pipe = b""
        self.kept_wce: list[int] = []

    def keep_wce(self, wce: int) -> None:
        self.kept_wce.append(wce)

    def open_channel(self, fd: int) -> None:
        self.channels.append(fd)

    def save_state(self, fd: int, data: bytes) -> None:
        self.saved.append((fd, data))

    def hold_state(self, fd: int) -> None:
        self.held.append(fd)

    def load_state(self) -> bytes:
        return self.pipe


class Driven:
    """A session with everything offered negotiated, fed with typed messages."""

    def __init__(self, *, num_queues: int = 2, protocol_features: int | None = None) -> None:
        self.backend = FakeBackend()
        self.host = FakeHost()
        self.session = Session(self.backend, num_queues, self.host)
        offered = OFFERED_PROTOCOL_FEATURES if protocol_features is None else protocol_features
        self.send(Request.SET_PROTOCOL_FEATURES, m.U64(offered))
        self.send(Request.SET_FEATURES, m.U64(int(FEATURES) | Feature.PROTOCOL_FEATURES))

    def send(self, request: int, message: m.Message, fds: Sequence[int] = (), *, need_reply: bool = False) -> Answer:
        payload = m.encode_payload(message)
        header = m.Header(request, 1 | (8 if need_reply else 0), len(payload))
        return self.session.receive(header, payload, fds)

    def ask(self, request: int, message: m.Message = NO_PAYLOAD) -> bytes:
        """Payload of the reply to *request*."""
        answer = self.send(request, message)
        assert not answer.refused
        assert answer.data[:8] == request.to_bytes(4, "little") + b"\5\0\0\0"  # version 1 | reply
        return answer.data[wire.HEADER_BYTES :]

    def number(self, request: int) -> int:
        return int.from_bytes(self.ask(request), "little")

    def start(self, index: int = 0, num: int = 128) -> None:
        self.send(Request.SET_VRING_NUM, m.VringState(index, num))
        self.send(Request.SET_VRING_BASE, m.VringState(index, 0))
        self.send(Request.SET_VRING_ADDR, m.VringAddr(index, 0, 0x1000, 0x3000, 0x2000, 0))
        self.send(Request.SET_VRING_KICK, m.VringFd(index, True), [KICK])
        self.send(Request.SET_VRING_ENABLE, m.VringState(index, 1))


def ack(request: int, value: int) -> bytes:
    return m.encode_reply(request, m.U64(value))


def test_what_is_offered_is_exactly_what_the_table_carries_out():
    needed = {feature for rule in RULES.values() for feature in rule.needs}
    assert set(OFFERED_PROTOCOL_FEATURES) == needed | set(MESSAGELESS_FEATURES)


@pytest.mark.parametrize(
    "bit",
    [F.PAGEFAULT, F.HOST_NOTIFIER, F.INBAND_NOTIFICATIONS, F.XEN_MMAP, F.SHARED_OBJECT, F.SHMEM],
)
def test_a_feature_without_a_rule_is_not_offered(bit):
    assert bit not in OFFERED_PROTOCOL_FEATURES


def test_features_are_those_of_the_rings_plus_the_door_to_protocol_features():
    assert Driven().number(Request.GET_FEATURES) == FEATURES | 1 << 30


@pytest.mark.parametrize("request_id", [Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES])
@pytest.mark.parametrize("bit", [40, 63])
def test_a_feature_that_was_not_offered_is_refused_by_name(request_id, bit):
    answer = Driven().send(request_id, m.U64(1 << bit), need_reply=True)
    assert answer.data == ack(request_id, 1)
    assert "not offered" in answer.refused


@pytest.mark.parametrize("request_id", sorted(r for r, rule in RULES.items() if rule.needs))
def test_a_message_whose_feature_was_not_negotiated_is_refused(request_id):
    rule = RULES[request_id]
    driven = Driven(protocol_features=F.REPLY_ACK)
    payload = bytes(m.PAYLOADS[request_id].min_bytes)
    answer = driven.session.receive(m.Header(request_id, 1 | 8, len(payload)), payload, [MEMORY])
    assert rule.needs.name is not None
    assert rule.needs.name in answer.refused
    assert driven.backend.calls == [("set_features", FEATURES | 1 << 30)]


def test_leaving_requests_in_flight_needs_a_region_that_records_them():
    answer = Driven().send(Request.SET_PROTOCOL_FEATURES, m.U64(F.GET_VRING_BASE_INFLIGHT | F.REPLY_ACK))
    assert "needs INFLIGHT_SHMFD" in answer.refused


def test_an_acknowledgement_is_sent_only_if_asked_for_and_negotiated():
    request, message = Request.SET_VRING_NUM, m.VringState(0, 128)
    assert Driven().send(request, message, need_reply=True).data == ack(request, 0)
    assert Driven().send(request, message).data == b""
    without = Driven(protocol_features=F.MQ)
    assert without.send(request, message, need_reply=True).data == b""


def test_a_refusal_that_cannot_be_told_ends_the_session():
    answer = Driven().send(Request.SET_VRING_NUM, m.VringState(0, 0))
    assert answer == Answer(refused="SET_VRING_NUM: ring of 0 descriptors, must be 1 to 32768", close=True)


def test_a_sentence_of_the_backend_becomes_a_nack():
    driven = Driven()
    driven.backend.refuse["vring_addr"] = "the descriptor table is outside guest memory"
    answer = driven.send(Request.SET_VRING_ADDR, m.VringAddr(0, 0, 1, 2, 3, 4), need_reply=True)
    assert answer.data == ack(Request.SET_VRING_ADDR, 1)
    assert answer.refused == "SET_VRING_ADDR: the descriptor table is outside guest memory"


@pytest.mark.parametrize("request_id", [0, Request.VRING_KICK, 45, 200, 0xFFFF_FFFF])
def test_an_unknown_request_is_refused(request_id):
    assert Driven().session.receive(m.Header(request_id, 1 | 8, 0), b"", []).data == ack(request_id, 1)
    assert Driven().session.receive(m.Header(request_id, 1, 0), b"", []).close


@pytest.mark.parametrize(
    ("request_id", "message"),
    [
        (Request.SET_VRING_NUM, m.VringState(2, 128)),
        (Request.SET_VRING_BASE, m.VringState(200, 0)),
        (Request.GET_VRING_BASE, m.VringState(0xFFFF_FFFF, 0)),
        (Request.SET_VRING_ENABLE, m.VringState(2, 1)),
        (Request.SET_VRING_ADDR, m.VringAddr(2, 0, 0, 0, 0, 0)),
        (Request.SET_VRING_KICK, m.VringFd(255, False)),
    ],
)
def test_a_ring_index_beyond_the_last_ring_is_refused(request_id, message):
    driven = Driven(num_queues=2)
    before = list(driven.backend.calls)
    assert "does not exist" in driven.send(request_id, message).refused
    assert driven.backend.calls == before


@pytest.mark.parametrize(
    ("request_id", "message", "sentence"),
    [
        (Request.SET_VRING_NUM, m.VringState(0, 100), "power of two"),
        (Request.SET_VRING_NUM, m.VringState(0, 32769), "1 to 32768"),
        (Request.SET_VRING_ENABLE, m.VringState(0, 2), "0 or 1"),
        (Request.SET_VRING_ADDR, m.VringAddr(0, 0x80, 0, 0, 0, 0), "unknown flags 0x80"),
        (Request.SET_STATUS, m.U64(0x100), "8 bits"),
        (Request.SET_LOG_BASE, m.Log(0, 0), "no bytes"),
        (Request.SET_LOG_BASE, m.Log(4096, 2**64 - 4096), "beyond any file"),
        (Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 0, 128), "0 queues"),
        (Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 65535, 128), "65535 queues"),
        (Request.SET_INFLIGHT_FD, m.Inflight(0, 0, 1, 0), "rings of 0"),
    ],
)
def test_a_value_outside_its_range_is_refused(request_id, message, sentence):
    driven = Driven()
    driven.send(Request.SET_FEATURES, m.U64(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES))
    assert sentence in driven.send(request_id, message, [MEMORY] if RULES[request_id].fds else []).refused


def test_a_packed_ring_may_have_any_size_and_its_base_must_lie_in_it():
    driven = Driven()
    assert not driven.send(Request.SET_VRING_NUM, m.VringState(0, 100)).refused
    assert not driven.send(Request.SET_VRING_BASE, m.VringState(0, 0x8000_8000)).refused  # fresh
    assert "ring size 100" in driven.send(Request.SET_VRING_BASE, m.VringState(0, 100)).refused
    assert "ring size 100" in driven.send(Request.SET_VRING_BASE, m.VringState(0, 100 << 16)).refused


def test_a_split_base_has_16_bits():
    driven = Driven()
    driven.send(Request.SET_FEATURES, m.U64(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES))
    assert not driven.send(Request.SET_VRING_BASE, m.VringState(0, 0xFFFF)).refused
    assert "16 bits" in driven.send(Request.SET_VRING_BASE, m.VringState(0, 0x10000)).refused


def test_a_kick_descriptor_must_come_exactly_if_bit_8_is_clear():
    driven = Driven()
    assert "must be 1" in driven.send(Request.SET_VRING_KICK, m.VringFd(0, True)).refused
    assert "must be 1" in driven.send(Request.SET_VRING_KICK, m.VringFd(0, True), [KICK, CALL]).refused
    driven.send(Request.SET_VRING_KICK, m.VringFd(0, False))
    assert driven.backend.called("vring_kick") == [(0, -1)]


def test_descriptors_on_a_message_that_takes_none_are_ignored():
    assert not Driven().send(Request.GET_FEATURES, m.Empty(), range(100, 108)).refused


def test_each_region_needs_its_own_descriptor():
    table = m.MemTable((m.Region(0, 4096, 0, 0), m.Region(4096, 4096, 4096, 0)))
    assert "must be 2" in Driven().send(Request.SET_MEM_TABLE, table, [MEMORY]).refused


def test_a_memory_table_replaces_the_one_before_and_a_bad_one_leaves_none():
    driven = Driven(protocol_features=F.REPLY_ACK | F.CONFIGURE_MEM_SLOTS)
    region = m.Region(0, 4096, 0x7000, 0)
    driven.send(Request.SET_MEM_TABLE, m.MemTable((region,)), [MEMORY])
    assert driven.backend.called("mem_add") == [(0, 4096, 0x7000, 0, MEMORY)]
    driven.backend.refuse["mem_add"] = "not a file"
    assert driven.send(Request.SET_MEM_TABLE, m.MemTable((region,)), [MEMORY], need_reply=True).refused
    assert driven.backend.called("mem_reset") == [(), (), ()]
    assert "no region" in driven.send(Request.REM_MEM_REG, m.MemRegion(region)).refused


def test_with_gpa_addresses_a_region_is_known_by_its_guest_physical_address():
    driven = Driven()
    region = m.Region(0x10_0000, 4096, user_addr=0, mmap_offset=0)
    driven.send(Request.ADD_MEM_REG, m.MemRegion(region), [MEMORY])
    driven.send(Request.REM_MEM_REG, m.MemRegion(region))
    assert driven.backend.called("mem_add") == [(0x10_0000, 4096, 0x10_0000, 0, MEMORY)]
    assert driven.backend.called("mem_remove") == [(0x10_0000, 4096, 0x10_0000)]


def test_there_are_as_many_memory_slots_as_promised_and_no_more():
    driven = Driven()
    slots = driven.number(Request.GET_MAX_MEM_SLOTS)
    *fitting, surplus = (m.MemRegion(m.Region(i << 12, 4096, 0, 0)) for i in range(slots + 1))
    for region in fitting:
        assert not driven.send(Request.ADD_MEM_REG, region, [MEMORY]).refused
    assert f"all {slots}" in driven.send(Request.ADD_MEM_REG, surplus, [MEMORY]).refused


def test_while_a_ring_is_started_only_dirty_logging_may_change():
    driven = Driven()
    driven.send(Request.SET_FEATURES, m.U64(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES))
    driven.start()
    log = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
    assert not driven.send(Request.SET_FEATURES, m.U64(log)).refused
    assert "EVENT_IDX" in driven.send(Request.SET_FEATURES, m.U64(log | Feature.EVENT_IDX)).refused


def test_a_started_ring_cannot_be_resized_until_it_is_stopped():
    driven = Driven()
    driven.start()
    assert "is started" in driven.send(Request.SET_VRING_NUM, m.VringState(0, 64)).refused
    assert driven.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == bytes(8)
    assert not driven.send(Request.SET_VRING_NUM, m.VringState(0, 64)).refused


def test_rings_that_were_never_set_up_may_be_enabled_and_stopped():
    driven = Driven()
    assert not driven.send(Request.SET_VRING_ENABLE, m.VringState(1, 1)).refused
    assert driven.ask(Request.GET_VRING_BASE, m.VringState(1, 0)) == bytes.fromhex("01000000 00000000")


def test_without_bit_30_a_ring_runs_as_soon_as_it_is_kicked():
    driven = Driven()
    driven.send(Request.SET_FEATURES, m.U64(Feature.VERSION_1))
    driven.send(Request.SET_VRING_KICK, m.VringFd(0, True), [KICK])
    assert driven.backend.called("set_features")[-1] == (Feature.VERSION_1,)  # tells the rings so
    assert driven.session.running


def test_a_status_of_0_leaves_the_rings_for_get_vring_base_which_qemu_7_sends_after_it():
    driven = Driven()
    driven.start()
    driven.send(Request.SET_STATUS, m.U64(0xF))
    driven.send(Request.SET_STATUS, m.U64(0))
    assert driven.number(Request.GET_STATUS) == 0
    assert driven.backend.called("reset_device") == []
    assert driven.session.running


def test_a_reset_drops_rings_features_and_status_and_keeps_memory_and_protocol_features():
    driven = Driven()
    region = m.MemRegion(m.Region(0, 4096, 0, 0))
    driven.send(Request.ADD_MEM_REG, region, [MEMORY])
    driven.start()
    driven.send(Request.SET_STATUS, m.U64(0xF))
    driven.send(Request.RESET_DEVICE, m.Empty())
    assert driven.backend.called("reset_device") == [()]
    assert not driven.session.running
    assert driven.session.features == 0
    assert driven.number(Request.GET_STATUS) == 0
    assert not driven.send(Request.REM_MEM_REG, region).refused


def test_a_broken_ring_shows_in_the_status():
    driven = Driven()
    driven.send(Request.SET_STATUS, m.U64(0xF))
    driven.backend.broken_rings[1] = "a loop"
    assert driven.number(Request.GET_STATUS) == 0x4F  # DEVICE_NEEDS_RESET


def test_the_configuration_is_read_in_windows_of_256_bytes():
    driven = Driven()
    reply = driven.ask(Request.GET_CONFIG, m.Config(0, 57, 0, bytes(57)))
    assert reply == bytes.fromhex("00000000 39000000 00000000") + blk_config(2048)[:57]
    assert driven.ask(Request.GET_CONFIG, m.Config(60, 196, 0, bytes(196)))[12:] == bytes(196)


@pytest.mark.parametrize(
    "payload",
    [
        m.encode_payload(m.Config(200, 57, 0, bytes(57))),  # ends beyond 256
        m.encode_payload(m.Config(0xFFFF_FFFF, 1, 0, b"\0")),
        bytes.fromhex("00000000 2c010000 00000000") + bytes(57),  # size field 300, 57 bytes follow
    ],
)
def test_a_bad_configuration_window_is_answered_with_no_data(payload):
    answer = Driven().session.receive(m.Header(Request.GET_CONFIG, 1, len(payload)), payload, [])
    assert answer.refused
    assert answer.data == bytes.fromhex("18000000 05000000 00000000")
    assert not answer.close


def test_wce_is_the_only_byte_that_can_be_written():
    driven = Driven()
    assert not driven.send(Request.SET_CONFIG, m.Config(32, 1, 0, b"\0")).refused
    assert driven.backend.called("set_wce") == [(0,)]
    assert "0 or 1" in driven.send(Request.SET_CONFIG, m.Config(32, 1, 0, b"\2")).refused
    for flags in (0, 1):
        assert "only wce" in driven.send(Request.SET_CONFIG, m.Config(0, 8, flags, bytes(8))).refused
    driven.backend.device_features &= ~Feature.CONFIG_WCE
    assert "not offered" in driven.send(Request.SET_CONFIG, m.Config(32, 1, 0, b"\0")).refused


def test_an_inflight_region_is_handed_out_with_its_descriptor():
    answer = Driven().send(Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 2, 128))
    assert answer.data[12:] == m.encode_payload(m.Inflight(4096, 0, 2, 128))
    (fd,) = answer.fds
    os.close(fd)


def test_the_back_end_channel_is_handed_on_and_a_bad_one_refused():
    driven = Driven()
    driven.send(Request.SET_BACKEND_REQ_FD, m.Empty(), [77])
    assert driven.host.channels == [77]

    def not_a_socket(fd: int) -> None:
        raise ValueError("not a socket")

    driven.host.open_channel = not_a_socket
    assert driven.send(Request.SET_BACKEND_REQ_FD, m.Empty(), [77], need_reply=True).data == ack(21, 1)


def test_a_resize_is_news_once_and_only_while_a_ring_runs():
    driven = Driven()
    driven.ask(Request.GET_CONFIG, m.Config(0, 57, 0, bytes(57)))
    driven.backend.capacity_sectors = 4096
    assert not driven.session.config_is_news()
    driven.start()
    assert driven.session.config_is_news()
    assert not driven.session.config_is_news()


def test_a_front_end_that_reconnects_hears_of_what_changed_meanwhile():
    driven = Driven()
    driven.session.known_config = blk_config(1024)  # read in the session before
    driven.start()
    assert driven.session.config_is_news()
    driven.session.known_config = driven.backend.config()
    assert not driven.session.config_is_news()


def test_a_front_end_that_reconnects_gets_the_write_cache_mode_back_and_a_new_one_does_not():
    again, new = Driven(), Driven()
    for driven in (again, new):
        driven.session.known_wce = 0
    new.ask(Request.GET_CONFIG, m.Config(0, 57, 0, bytes(57)))
    for driven in (again, new):
        driven.start()
    assert (again.backend.wce, new.backend.wce) == (0, 1)
    assert (again.host.kept_wce, new.host.kept_wce) == ([], [1])


def test_a_driver_that_sets_wce_hears_no_news_of_it():
    driven = Driven()
    driven.ask(Request.GET_CONFIG, m.Config(0, 57, 0, bytes(57)))
    driven.start()
    driven.send(Request.SET_CONFIG, m.Config(32, 1, 0, b"\0"))
    assert not driven.session.config_is_news()


SAVE, LOAD, STOPPED = 0, 1, 0


def move_state(driven: Driven, direction: int) -> int:
    """Reply to SET_DEVICE_STATE_FD."""
    answer = driven.send(Request.SET_DEVICE_STATE_FD, m.DeviceState(direction, STOPPED), [MEMORY])
    return int.from_bytes(answer.data[wire.HEADER_BYTES :], "little")


def test_device_state_carries_the_write_cache_mode_to_another_daemon():
    source, target = Driven(), Driven()
    source.backend.wce = 0
    assert move_state(source, SAVE) == 0x100  # no error, and we send no descriptor of our own
    ((fd, target.host.pipe),) = source.host.saved
    assert fd == MEMORY
    assert target.host.pipe == b"OCSSDVHB" + bytes.fromhex("01000000 00 000000")  # magic, version, wce, padding
    assert source.number(Request.CHECK_DEVICE_STATE) == 0
    assert move_state(target, LOAD) == 0x100
    assert target.number(Request.CHECK_DEVICE_STATE) == 0
    target.start()
    assert target.backend.wce == 0
    assert target.host.kept_wce == [0]


@pytest.mark.parametrize(
    "state", [b"", b"OCSSDVHB", b"x" * 16, b"OCSSDVHB" + bytes.fromhex("01000000 01 000000") + b"more"]
)
def test_device_state_that_is_not_ours_fails_the_check_and_changes_nothing(state):
    driven = Driven()
    driven.host.pipe = state
    move_state(driven, LOAD)
    assert driven.number(Request.CHECK_DEVICE_STATE) == 1
    assert driven.backend.called("set_wce") == []


def test_device_state_moves_only_while_rings_are_stopped_and_in_a_known_direction():
    driven = Driven()
    assert move_state(driven, 2) == 0x101
    driven.start()
    assert move_state(driven, SAVE) == 0x101
    assert driven.number(Request.CHECK_DEVICE_STATE) == 1


def test_a_check_without_a_transfer_fails():
    assert Driven().number(Request.CHECK_DEVICE_STATE) == 1
