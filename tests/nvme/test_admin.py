"""Admin commands, registers, and what a hostile host may try with them."""

from __future__ import annotations

import struct

import pytest

from ocssd_daemon.protocol.nvme import identify, logs
from tests.kit.nvme_host import ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CSTS, PAGE, VS, NvmeHost
from tests.kit.nvme_target import serving
from tests.kit.vfio_user_client import BAR0, VfioUserClient


@pytest.fixture
def host(start):
    return start(("ocssd20", "block", "ocssd12"), early_reset=True)[1]


def read_identify(host, cns, nsid=0):
    at = host.allocate(PAGE)
    done = host.admin(0x06, nsid, data=at, dwords=bytes([cns]))
    return done.status, host.get(at, PAGE)


def test_identify_controller_offers_what_is_implemented(host):
    _, raw = read_identify(host, 1)
    found = identify.IdentifyController.parse(raw)
    assert (found.vid, found.nn, found.sqes, found.cqes, found.mdts, found.fuses) == (0x1D1D, 3, 0x66, 0x44, 7, 1)
    assert found.oacs == 1 << 1 | 1 << 8                        # Format NVM, Doorbell Buffer Config
    assert found.oncs == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 7      # Compare, DSM, Write Zeroes, Verify
    assert found.sgls == 2 | 1 << 19                            # aligned, also for metadata; a bit bucket is refused
    assert found.lpa & 1 << 2                                   # extended log page data: lightnvm needs it


def test_only_raw_namespaces_carry_the_mark_of_lightnvm(host):
    marks = [read_identify(host, 0, nsid)[1][identify.LIGHTNVM_MARK_OFFSET] for nsid in (1, 2, 3)]
    assert marks == [1, 0, 1]


@pytest.mark.parametrize(("cns", "nsid", "status"), [
    (0, 0, 0x400B), (0, 9, 0x400B), (0, 0xFFFF_FFFF, 0), (1, 77, 0), (2, 0, 0), (2, 0xFFFF_FFFE, 0x400B), (3, 1, 0),
    (3, 9, 0x400B), (5, 1, 0), (6, 0, 0), (8, 1, 0), (0x10, 0, 0), (0x11, 2, 0), (0x7F, 0, 0x4002),
])
def test_identify_answers_each_structure_or_refuses(host, cns, nsid, status):
    assert read_identify(host, cns, nsid)[0] == status


@pytest.mark.parametrize(("cns", "csi", "status"), [(5, 0, 0), (6, 0, 0), (7, 0, 0), (5, 2, 0x4002), (6, 2, 0x4002),
                                                    (7, 1, 0x4002)])
def test_there_is_one_command_set(host, cns, csi, status):
    at = host.allocate(PAGE)
    assert host.admin(0x06, 0 if cns == 7 else 1, data=at, dwords=struct.pack("<II", cns, csi << 24)).status == status


def test_a_namespace_says_its_identity_in_descriptors_that_last(host):
    """CNS 03h: NGUID, UUID, and the command set; the same at every start with the same serial."""
    raw, found = read_identify(host, 3, 2)[1], {}
    while raw[0]:
        found[raw[0]] = raw[4:4 + raw[1]]
        raw = raw[4 + raw[1]:]
    assert {kind: len(value) for kind, value in found.items()} == {2: 16, 3: 16, 4: 1}
    assert found[4] == b"\0"


def test_the_list_of_namespaces_starts_after_the_given_one(host):
    assert struct.unpack_from("<4I", read_identify(host, 2, 1)[1]) == (2, 3, 0, 0)


def features(host, opcode, fid, value=0, *, nsid=0, select=0, save=0, data=0):
    return host.admin(opcode, nsid, data=data, dwords=struct.pack("<II", fid | select << 8 | save << 31, value))


@pytest.mark.parametrize("fid", [1, 2, 4, 5, 6, 7, 8, 9, 0x0A, 0x0B, 0x80, 0xCA])
def test_every_feature_answers_current_default_saved_and_capabilities(host, fid):
    nsid = 1 if fid in (5, 0xCA) else 0
    for select in (0, 1, 2, 3):
        assert features(host, 0x0A, fid, nsid=nsid, select=select).status == 0
    assert features(host, 0x0A, fid, nsid=nsid, select=4).status == 0x4002
    assert features(host, 0x09, fid, nsid=nsid, save=1).status == 0x410D


def test_a_feature_keeps_its_value_per_namespace_and_per_vector(host):
    assert features(host, 0x09, 5, 1 << 16, nsid=2).status == 0
    assert [features(host, 0x0A, 5, nsid=n).result for n in (1, 2)] == [0, 1 << 16]
    assert features(host, 0x09, 9, 1 << 16 | 3).status == 0
    assert [features(host, 0x0A, 9, vector).result for vector in (2, 3)] == [2, 1 << 16 | 3]


@pytest.mark.parametrize(("fid", "value", "status"), [
    (0x77, 0, 0x4002), (2, 1, 0x4002), (6, 2, 0x4002), (9, 9, 0x4002), (8, 1 << 16, 0x4002), (7, 0x10001, 0x400C),
])
def test_feature_values_that_cannot_be_are_refused(host, fid, value, status):
    assert features(host, 0x09, fid, value).status == status


def test_a_temperature_threshold_below_the_temperature_raises_an_event_until_the_log_is_read(host):
    admin = host.queues[0]
    admin.submit(host.entry(0x0C, 0))
    admin.submit(host.entry(0x09, 0, dwords=struct.pack("<II", 4, 290)))
    done = admin.wait(2)
    assert sorted(d.result for d in done) == [0, 1 | 1 << 8 | 2 << 16]  # SMART event, temperature, log page 2


def test_more_event_requests_than_aerl_are_refused_and_one_can_be_aborted(host):
    admin = host.queues[0]
    cids = list(range(100, 104))
    admin.submit(*[_aer(cid) for cid in [*cids, 104]])
    assert (admin.wait()[0].status, len(cids)) == (0x4105, 4)
    assert host.admin(0x08, dwords=struct.pack("<HH", 0, 102)).result == 0
    assert admin.wait()[0].status == 0x0007
    assert host.admin(0x08, dwords=struct.pack("<HH", 0, 102)).result == 1


def _aer(cid):
    from ocssd_daemon.protocol.nvme.commands import sqe
    return sqe(0x0C, cid)


@pytest.mark.parametrize(("case", "opcode", "prp1", "dwords", "status"), [
    ("CQ 0", 0x05, PAGE, (0, 63, 3, 0), 0x4101),
    ("CQ in use", 0x05, PAGE, (1, 63, 3, 1), 0x4101),
    ("CQ beyond", 0x05, PAGE, (9, 63, 3, 1), 0x4101),
    ("CQ of 1 entry", 0x05, PAGE, (2, 0, 3, 1), 0x4102),
    ("CQ too large", 0x05, PAGE, (2, 256, 3, 1), 0x4102),
    ("CQ not contiguous", 0x05, PAGE, (2, 63, 2, 1), 0x4002),
    ("CQ vector", 0x05, PAGE, (2, 63, 3, 9), 0x4108),
    ("CQ not aligned", 0x05, PAGE + 8, (2, 63, 3, 1), 0x4013),
    ("CQ outside memory", 0x05, 1 << 40, (2, 63, 3, 1), 0x4013),
    ("CQ that runs out of memory", 0x05, (64 << 20) - PAGE, (2, 255 + 0, 3, 1), 0),
    ("SQ without a CQ", 0x01, PAGE, (2, 63, 1, 2), 0x4100),
    ("SQ on the admin CQ", 0x01, PAGE, (2, 63, 1, 0), 0x4100),
    ("SQ that runs out of memory", 0x01, (64 << 20) - PAGE, (2, 255, 1, 1), 0x4013),
    ("delete SQ 0", 0x00, 0, (0, 0, 0, 0), 0x4101),
    ("delete absent SQ", 0x00, 0, (5, 0, 0, 0), 0x4101),
    ("delete CQ in use", 0x04, 0, (1, 0, 0, 0), 0x410C),
    ("delete absent CQ", 0x04, 0, (5, 0, 0, 0), 0x4101),
])
def test_queues_that_cannot_be_are_refused(host, case, opcode, prp1, dwords, status):
    assert host.admin(opcode, data=prp1, dwords=struct.pack("<HHHH", *dwords)).status == status, case


def test_a_queue_pair_is_deleted_and_made_again(host):
    assert host.admin(0x00, dwords=struct.pack("<H", 1)).status == 0
    assert host.admin(0x04, dwords=struct.pack("<H", 1)).status == 0
    host.create_queue()
    assert host.read_blocks(0, 1, nsid=2)[0].status == 0


@pytest.mark.parametrize(("lid", "length", "status"), [
    (1, 64, 0), (2, 512, 0), (3, 512, 0), (4, 4096, 0), (5, 4096, 0), (0x77, 64, 0x4109), (2, 1 << 20, 0x4002),
])
def test_log_pages(host, lid, length, status):
    at = host.allocate(max(length, PAGE))
    dwords = struct.pack("<HHHHQ", lid, (length // 4 - 1) & 0xFFFF, (length // 4 - 1) >> 16, 0, 0)
    done = host.admin(0x02, 0xFFFF_FFFF, data=at, dwords=dwords)
    assert done.status == status


def test_errors_are_logged_newest_first_and_smart_counts_units(host):
    host.read_blocks(1 << 40, 1, nsid=2)
    at = host.allocate(PAGE)
    host.admin(0x02, 0, data=at, dwords=struct.pack("<HHHHQ", 1, 31, 0, 0, 0))
    entry = logs.ErrorEntry.parse(host.get(at, 64))
    assert (entry.error_count, entry.sqid, entry.nsid, entry.lba) == (1, 1, 2, 1 << 40)
    assert entry.status_phase >> 1 == 0x4080
    host.read_blocks(0, 1, nsid=2)
    host.admin(0x02, 0xFFFF_FFFF, data=at, dwords=struct.pack("<HHHHQ", 2, 127, 0, 0, 0))
    smart = logs.SmartLog.parse(host.get(at, 512))
    assert (smart.critical_warning, smart.available_spare, smart.data_units_read) == (0, 100, 1)


def test_format_empties_the_namespace_and_takes_only_format_0(host):
    assert host.write_blocks(0, b"x" * PAGE, nsid=2).status == 0
    assert host.admin(0x80, 2, dwords=struct.pack("<I", 1)).status == 0x410A
    assert host.admin(0x80, 9).status == 0x400B
    assert host.admin(0x80, 2).status == 0
    assert host.read_blocks(0, 1, nsid=2)[1] == bytes(PAGE)


@pytest.mark.parametrize("opcode", [0x03, 0x0D, 0x10, 0x11, 0x18, 0x7F, 0x81, 0xC0, 0xC1, 0xE3, 0xFF])
def test_admin_opcodes_that_do_not_exist_are_refused(host, opcode):
    assert host.admin(opcode).status == 0x4001


def test_identify_into_memory_that_is_not_there_is_a_transfer_error(host):
    assert host.admin(0x06, data=1 << 40, dwords=b"\1").status == 0x4004
    assert host.admin(0x06, data=0x10001, dwords=b"\1").status == 0x4013


# ---- registers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path):
    with serving(str(tmp_path / "s"), ("block",)), VfioUserClient(str(tmp_path / "s")) as client:
        client.negotiate()
        client.map_memory()
        yield NvmeHost(client)


def test_cc_is_kept_while_the_controller_is_disabled(raw):
    """Newer kernels write CC, read it back, and only then set EN."""
    raw.write32(CC, CC_ENABLE & ~1)
    assert raw.read32(CC) == CC_ENABLE & ~1


def test_registers_have_their_widths_and_read_only_ones_stay(raw):
    cap = int.from_bytes(raw.client.read(BAR0, CAP, 8), "little")
    assert (cap & 0xFFFF, cap >> 16 & 1, cap >> 37 & 1) == (255, 1, 1)
    raw.write64(CAP, 0)
    raw.write32(VS, 0)
    assert raw.read32(VS) == 0x10300
    raw.write64(ASQ, 0x1234_5678_9ABC_DEF0)
    assert raw.client.read(BAR0, ASQ, 8) == (0x1234_5678_9ABC_D000).to_bytes(8, "little")
    raw.write32(ASQ + 4, 1)
    assert raw.client.read(BAR0, ASQ, 8) == (0x1_9ABC_D000).to_bytes(8, "little")


@pytest.mark.parametrize(("case", "aqa", "asq", "acq", "cc"), [
    ("no queue", 0, 0, 0, CC_ENABLE), ("one entry", 0, PAGE, 2 * PAGE, CC_ENABLE),
    ("ASQ 0", 0x1F001F, 0, PAGE, CC_ENABLE), ("outside memory", 0x1F001F, 1 << 40, PAGE, CC_ENABLE),
    ("page size", 0x1F001F, PAGE, 2 * PAGE, CC_ENABLE | 5 << 7), ("command set", 0x1F001F, PAGE, 2 * PAGE,
                                                                  CC_ENABLE | 3 << 4),
    ("arbitration", 0x1F001F, PAGE, 2 * PAGE, CC_ENABLE | 7 << 11),
])
def test_an_enable_that_cannot_be_is_a_fatal_state_until_the_next_reset(raw, case, aqa, asq, acq, cc):
    raw.write32(AQA, aqa)
    raw.write64(ASQ, asq)
    raw.write64(ACQ, acq)
    raw.write32(CC, cc)
    assert raw.read32(CSTS) & 3 == 2, case
    raw.write32(CC, 0)
    raw.enable()


def test_shutdown_completes_at_once(raw):
    raw.enable()
    raw.write32(CC, CC_ENABLE | 1 << 14)
    assert raw.read32(CSTS) >> 2 & 3 == 2


def test_doorbells_before_the_controller_is_enabled_are_ignored(raw):
    raw.doorbell(0, 0, 5)
    raw.doorbell(3, 1, 5)
    assert raw.read32(CSTS) == 0


def test_c_and_python_agree_on_do_not_retry():
    from ocssd_daemon import _nvme
    from ocssd_daemon.protocol.nvme.status import Status, status_field
    assert {s.name: _nvme.status_field(s) for s in Status} == {s.name: status_field(s) for s in Status}
