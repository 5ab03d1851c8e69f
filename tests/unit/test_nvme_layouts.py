"""NVMe and OCSSD layouts at the byte offsets that the specifications give."""

import pytest

from ocssd_daemon.protocol.nvme import commands, identify, logs, ocssd12, ocssd20
from ocssd_daemon.protocol.nvme.status import Status, describe, status_field


def offset_of(layout, name, fields):
    """Where *name* lies: the one place where a build with its lowest bit set differs from a build of
    zeroes.
    """
    low = layout.build(fields)
    high = layout.build({**fields, name: 1})
    return next(i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b)


def zeroes(layout):
    return {k: v for k, v in layout.parse(bytes(layout.sizeof())).items() if not k.startswith("_")}


@pytest.mark.parametrize(("name", "offset"), [
    ("vid", 0), ("ieee", 73), ("mdts", 77), ("ver", 80), ("oaes", 92), ("cntrltype", 111), ("oacs", 256),
    ("aerl", 259),
    ("lpa", 261), ("wctemp", 266), ("tnvmcap", 280), ("sanicap", 328), ("sqes", 512), ("nn", 516), ("oncs",
                                                                                                    520),
    ("fuses", 522), ("vwc", 525), ("acwu", 532), ("sgls", 536),
])
def test_identify_controller_fields_lie_where_the_base_specification_puts_them(name, offset):
    fields = zeroes(identify.IdentifyController)
    if isinstance(fields[name], bytes):
        assert identify.IdentifyController.build({**fields, name: b"\1\0\0"}).index(1) == offset
    else:
        assert offset_of(identify.IdentifyController, name, fields) == offset


@pytest.mark.parametrize(("name", "offset"), [
    ("nsze", 0), ("nsfeat", 24), ("flbas", 26), ("mc", 27), ("dlfeat", 33), ("noiob", 46), ("nvmcap", 48),
    ("npwg", 64),
    ("vs0", identify.LIGHTNVM_MARK_OFFSET),
])
def test_identify_namespace_fields_lie_where_the_base_specification_puts_them(name, offset):
    assert offset_of(identify.IdentifyNamespace, name, zeroes(identify.IdentifyNamespace)) == offset


@pytest.mark.parametrize(("name", "offset"), [
    ("major", 0), ("mccap", 16), ("wit", 32), ("num_grp", 64), ("num_pu", 66), ("num_chk", 68), ("clba", 72),
    ("ws_min", 128), ("ws_opt", 132), ("mw_cunits", 136), ("maxoc", 140), ("maxocpu", 144), ("trdt_ns", 192),
    ("tcrsm_ns", 212),
])
def test_geometry_fields_lie_where_ocssd_20_puts_them(name, offset):
    assert offset_of(ocssd20.Geometry, name, zeroes(ocssd20.Geometry)) == offset


@pytest.mark.parametrize(("name", "offset"), [
    ("mtype", 0), ("num_ch", 4), ("num_pln", 6), ("num_blk", 8), ("num_pg", 10), ("fpg_sz", 12), ("csecs",
                                                                                                  14),
    ("sos", 16), ("trdt_ns", 20), ("tbem_ns", 40), ("mpos", 44), ("mccap", 48), ("cpar", 52),
])
def test_group_fields_lie_where_ocssd_12_puts_them(name, offset):
    assert offset_of(ocssd12.Group, name, zeroes(ocssd12.Group)) == offset


@pytest.mark.parametrize(("layout", "size"), [
    (commands.SubmissionEntry, 64), (commands.CompletionEntry, 16), (commands.SglDescriptor, 16),
    (commands.DsmRange, 16), (identify.IdentifyController, 4096), (identify.IdentifyNamespace, 4096),
    (identify.NamespaceIndependent, 4096), (logs.ErrorEntry, 64), (logs.SmartLog, 512), (logs.FirmwareLog,
                                                                                         512),
    (logs.EffectsLog, 4096), (ocssd20.Geometry, 4096), (ocssd20.ChunkDescriptor, 32),
    (ocssd20.NotificationEntry, 64), (ocssd12.Identity, 4096), (ocssd12.Group, 960),
    (ocssd12.BadBlockHeader, 64),
])
def test_structures_have_the_size_of_the_specification(layout, size):
    assert layout.sizeof() == size


@pytest.mark.parametrize("layout", [
    commands.DeleteQueue, commands.CreateSq, commands.CreateCq, commands.Abort, commands.IdentifyCommand,
    commands.GetLogPage, commands.GetFeatures, commands.SetFeatures, commands.FormatNvm, commands.ReadWrite,
    commands.DatasetManagement, commands.Vector, commands.SetBadBlocks, commands.GetBadBlocks, commands.GetL2p,
])
def test_the_dwords_of_every_command_are_24_bytes(layout):
    assert layout.sizeof() == 24


def test_a_submission_entry_is_read_from_literal_bytes():
    raw = bytes.fromhex(
        "92" "41" "3412"            # opcode 92h, PSDT 1 and FUSE 1, CID 1234h
        "01000000" "00000000" "00000000"
        "0000002000000000"          # MPTR
        "0010000000000000" "0020000000000000"
        "8877665544332211"          # LBAL
        "3f00" "0080"               # 64 addresses, LR
        "00000000" "0000000000000000")
    entry = commands.SubmissionEntry.parse(raw)
    assert (entry.opcode, entry.fuse, entry.psdt, entry.cid, entry.nsid) == (0x92, 1, 1, 0x1234, 1)
    assert (entry.mptr, entry.prp1, entry.prp2) == (0x20000000, 0x1000, 0x2000)
    vector = commands.Vector.parse(entry.dwords)
    assert (vector.lbal, vector.nlb_0, vector.control) == (0x1122334455667788, 63, 0x8000)


def test_a_log_page_command_has_a_64_bit_offset_and_a_32_bit_dword_count():
    log = commands.GetLogPage.parse(bytes.fromhex("ca80" "ffff" "0100" "0000" "0000000001000000" + "00" * 8))
    assert (log.lid, log.retain, log.length_bytes, log.offset_bytes) == (0xCA, 1, 0x20000 * 4, 1 << 32)


@pytest.mark.parametrize(("status", "wire"), [
    (Status.EMPTY_PAGE, 0x42FF),            # the value that pblk's recovery scans for
    (Status.OUT_OF_ORDER, 0x42F2), (Status.INVALID_FIELD, 0x4002), (Status.WRITE_FAILED_12, 0x40FF),
    (Status.UNRECOVERED_READ, 0x4281), (Status.WRITE_FAILED_CLOSED, 0x2F1), (Status.SUCCESS, 0),
])
def test_do_not_retry_goes_with_every_error_that_a_retry_cannot_mend(status, wire):
    assert status_field(status) == wire


def test_a_status_describes_itself():
    assert describe(0x42F2) == "0x2f2 OUT_OF_ORDER: not at the write pointer of the chunk"
    assert describe(0x7FF) == "0x7ff"
