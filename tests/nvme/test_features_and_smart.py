"""What features do beyond keeping a value, what a reset leaves of them; SMART tells of the drive, not of a session."""

from __future__ import annotations

import struct

import pytest

from ocssd_daemon.nvme.config import ControllerConfig
from ocssd_daemon.nvme.lifetime import Lifetime
from ocssd_daemon.protocol.nvme import identify, logs
from tests.kit.nvme_host import CC, PAGE
from tests.kit.nvme_target import attached, serving
from tests.nvme.test_admin import features, read_identify
from tests.nvme.test_rules20 import CHUNK, FREE, OFFLINE, OPEN, chunk_log, fill, write

CURRENT, DEFAULT, SAVED, CAPABILITIES = 0, 1, 2, 3


def get(host, fid, value=0, **more):
    done = features(host, 0x0A, fid, value, **more)
    assert done.status == 0
    return done.result


def smart(host):
    at = host.allocate(PAGE)
    assert host.admin(0x02, 0xFFFF_FFFF, data=at, dwords=struct.pack("<HHHHQ", 2, 127, 0, 0, 0)).status == 0
    return logs.SmartLog.parse(host.get(at, 512))


# ---- features ----------------------------------------------------------------------------------------------------

# fid, namespace, CDW11 of a get, default, a value that may be set, the capabilities that SEL = 3 gives.
TABLE = [
    (0x01, 0, 0, 0, 0x0102_0304, 4), (0x02, 0, 0, 0, 0x20, 4), (0x04, 0, 0, 343, 350, 4),
    (0x04, 0, 1 << 20, 0, 1 << 20 | 250, 4), (0x05, 1, 0, 0, 1 << 16 | 5, 6), (0x06, 0, 0, 1, 0, 4),
    (0x07, 0, 0, 0x70007, None, 4), (0x08, 0, 0, 0, 2 << 8 | 3, 4), (0x09, 0, 3, 3, 1 << 16 | 3, 4),
    (0x0A, 0, 0, 0, 1, 4), (0x0B, 0, 0, 0x1F, 2, 4), (0x80, 0, 0, 0, 7, 4), (0xCA, 1, 0, 0, 3, 6),
]
PERSISTENT = {0x80}


@pytest.mark.parametrize(("fid", "nsid", "selector", "default", "value", "capabilities"), TABLE)
def test_a_feature_has_a_default_that_a_controller_reset_brings_back(
    start, fid, nsid, selector, default, value, capabilities
):
    _, host = start()
    assert get(host, fid, selector, nsid=nsid) == default
    assert get(host, fid, selector, nsid=nsid, select=CAPABILITIES) == capabilities
    if value is None:
        return
    assert features(host, 0x09, fid, value, nsid=nsid).status == 0
    assert get(host, fid, selector, nsid=nsid) == value
    assert get(host, fid, selector, nsid=nsid, select=DEFAULT) == default
    assert get(host, fid, selector, nsid=nsid, select=SAVED) == default         # nothing is saveable
    host.write32(CC, 0)
    host.enable()
    assert get(host, fid, selector, nsid=nsid) == (value if fid in PERSISTENT else default)


def test_lba_ranges_are_kept_over_a_controller_reset(start):
    _, host = start()
    table = bytes(range(256)) * 16
    assert features(host, 0x09, 3, nsid=1, data=host.put(table)).status == 0
    host.write32(CC, 0)
    host.enable()
    at = host.allocate(PAGE)
    assert features(host, 0x0A, 3, nsid=1, data=at).status == 0
    assert host.get(at, PAGE) == table


def test_dulbe_is_off_after_a_controller_reset_for_commands_too(start):
    _, host = start()
    assert features(host, 0x09, 5, 1 << 16, nsid=1).status == 0
    assert host.vector_read([0])[0].status == 0x4287
    host.write32(CC, 0)
    host.enable()
    host.create_queue()
    assert host.vector_read([0])[0].status == 0


@pytest.mark.parametrize(("value", "status"), [(350, 0), (0xF << 16 | 350, 0), (1 << 16 | 350, 0x4002),
                                               (2 << 20, 0x4002)])
def test_there_is_one_temperature_sensor(start, value, status):
    _, host = start()
    assert features(host, 0x09, 4, value).status == status


def test_a_temperature_warning_that_the_host_has_not_enabled_is_no_event_but_shows_in_smart(start):
    _, host = start()
    assert features(host, 0x09, 0x0B, 0x1F & ~2).status == 0
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    assert features(host, 0x09, 4, 290).status == 0
    assert smart(host).critical_warning == 1 << 1
    assert admin.nothing_more()


def test_without_a_write_cache_there_is_no_feature_and_writes_are_hard_from_the_start(start):
    target, host = start(("block",), config=ControllerConfig(queue_pairs=8, entries=256, write_cache=False))
    assert identify.IdentifyController.parse(read_identify(host, 1)[1]).vwc == 0
    assert features(host, 0x0A, 6).status == features(host, 0x09, 6, 1).status == 0x4002
    assert host.write_blocks(0, b"x" * PAGE).status == 0
    with target.reactor.paused():
        assert target.media.stats()["sectors_written"] >= 4              # programmed, with padding


def test_switching_the_cache_off_writes_what_it_holds(start):
    target, host = start(("block",))
    assert identify.IdentifyController.parse(read_identify(host, 1)[1]).vwc == 1
    assert host.write_blocks(0, b"x" * PAGE).status == 0
    with target.reactor.paused():
        assert target.media.stats()["sectors_written"] == 0
    assert features(host, 0x09, 6, 0).status == 0
    with target.reactor.paused():
        assert target.media.stats()["sectors_written"] > 0


def test_coalescing_that_is_set_for_the_device_holds_from_the_start(start):
    _, host = start(config=ControllerConfig(queue_pairs=8, entries=256, coalesce_commands=7, coalesce_100us=2))
    assert get(host, 8) == 2 << 8 | 7


def test_a_larger_memory_page_is_offered_and_taken(start):
    _, host = start(("block",), config=ControllerConfig(queue_pairs=8, entries=256, page_shift_max=2))
    assert int.from_bytes(host.client.read(0, 0, 8), "little") >> 52 & 0xF == 2
    for shift, ready in ((2, 1), (3, 2)):
        host.write32(CC, 0)
        host.write32(CC, 6 << 16 | 4 << 20 | shift << 7 | 1)
        assert host.read32(0x1C) & 3 == ready


# ---- SMART -------------------------------------------------------------------------------------------------------


def test_smart_counts_over_sessions_and_hours_by_the_clock_that_it_is_given(tmp_path):
    now = [1000.0]
    config = ControllerConfig(queue_pairs=8, entries=256, lifetime=Lifetime(lambda: now[0]))
    with serving(str(tmp_path / "s"), ("block",), config=config) as target:
        with attached(target) as host:
            host.create_queue()
            assert host.write_blocks(0, b"x" * PAGE).status == 0
            assert host.read_blocks(0, 1)[0].status == 0
            host.read_blocks(1 << 40, 1)
        now[0] += 7300
        with attached(target) as host:
            host.create_queue()
            assert host.read_blocks(0, 1)[0].status == 0
            found = smart(host)
    assert (found.host_reads, found.host_writes, found.error_entries) == (2, 1, 1)
    assert (found.data_units_read, found.data_units_written, found.power_on_hours) == (1, 1, 2)


def test_smart_tells_wear_and_spare_from_the_flash(start):
    target, host = start()
    with target.reactor.paused():
        chunks = target.media.chunks
        chunks["pe_limit"], chunks["pe_cycles"] = 100, 40
        chunks["state"][:30] = OFFLINE                                  # of 32
    found = smart(host)
    assert (found.percentage_used, found.available_spare, found.critical_warning) == (40, 6, 1)
    with target.reactor.paused():
        target.media.chunks["pe_cycles"] = 400
    assert (smart(host).percentage_used, smart(host).critical_warning) == (255, 1 | 4)


# ---- logs and format ---------------------------------------------------------------------------------------------


def test_the_effects_log_says_of_each_opcode_whether_it_is_supported(start):
    """And that is what happens: one that is not supported is an invalid opcode."""
    _, host = start(("ocssd20", "ocssd12", "block"))
    at = host.allocate(PAGE)
    assert host.admin(0x02, 0xFFFF_FFFF, data=at, dwords=struct.pack("<HHHHQ", 5, 1023, 0, 0, 0)).status == 0
    log = logs.EffectsLog.parse(host.get(at, PAGE))
    for opcode in range(256):
        if not log.admin[opcode] & 1:
            assert host.admin(opcode).status == 0x4001, hex(opcode)
        if not log.io[opcode] & 1:
            assert host.io(opcode).status == 0x4001, hex(opcode)
    io = {opcode for opcode in range(256) if log.io[opcode] & 1}
    assert io == {0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x0C, 0x90, 0x91, 0x92, 0x93}
    admin = {opcode for opcode in range(256) if log.admin[opcode] & 1}
    assert admin == {0, 1, 2, 4, 5, 6, 8, 9, 0x0A, 0x0C, 0x7C, 0x80, 0xE2, 0xEA, 0xF1, 0xF2}
    content = {opcode for opcode in io if log.io[opcode] & 2}
    assert content == {0x01, 0x08, 0x09, 0x90, 0x91, 0x93}


def test_a_format_of_flash_resets_what_holds_something_and_nothing_else(start):
    target, host = start(early_reset=False)
    fill(host, 0)
    assert write(host, CHUNK, 4).status == 0
    with target.reactor.paused():
        target.media.chunks["state"][2] = OFFLINE
    assert host.admin(0x80, 1).status == 0
    assert [int(s) for s in chunk_log(host)["state"][:4]] == [FREE, FREE, OFFLINE, FREE]
    assert [int(c) for c in target.media.chunks["pe_cycles"][:4]] == [1, 1, 0, 0]
    assert target.media.stats()["chunks_open"] == 0
    assert write(host, CHUNK, 4).status == 0
    assert int(chunk_log(host)["state"][1]) == OPEN


@pytest.mark.parametrize(("nsid", "cdw10", "status"), [
    (1, 0, 0), (0xFFFF_FFFF, 0, 0), (0, 0, 0x400B), (9, 0, 0x400B), (1, 1, 0x410A), (1, 1 << 4, 0x410A),
    (1, 1 << 5, 0x410A), (1, 1 << 9, 0), (1, 2 << 9, 0x4002),
])
def test_a_format_takes_the_one_format_that_there_is(start, nsid, cdw10, status):
    _, host = start(("ocssd20", "block"))
    assert host.admin(0x80, nsid, dwords=struct.pack("<I", cdw10)).status == status


def test_a_format_of_a_read_only_namespace_is_refused(start):
    target, host = start()
    target.server.device.namespaces[0].read_only = True
    assert host.admin(0x80, 1).status == 0x4020
    assert [int(s) for s in chunk_log(host)["state"]][:1] == [FREE]
