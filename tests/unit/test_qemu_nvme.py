"""The reference emulator's command lines are taken as they were meant, and wrong ones refused by name."""

from __future__ import annotations

import pytest

from ocssd_daemon import settings as sets
from ocssd_daemon.cli.qemu_nvme import OPTIONS, translate


def settings(line, **extra):
    more = sets.from_assignments([f"{key}={value}" for key, value in extra.items()])
    return sets.build(sets.from_preset("default"), translate(line).layer(), more)


def test_a_line_of_the_12_branch_makes_its_device():
    line = ("serial=deadbeef,lver=1,lmtype=0,nlbaf=5,lba_index=3,mdts=10,namespaces=1,lnum_ch=1,lnum_lun=4,lnum_pln=2,"
            "lsec_size=4096,lsecs_per_pg=4,lpgs_per_blk=64,lbbtable=bb.qemu,lmetasize=16")
    made = settings(line, size="1G")
    g = made.geometry
    assert made.nvme.namespaces == ("ocssd12",)
    assert (g.groups, g.pus, g.ws_min, g.sectors, g.oob_bytes, made.nvme.planes) == (1, 4, 4, 256, 16, 2)
    assert (made.nvme.serial, made.nvme.mdts, made.nvme.bad_block_file) == ("deadbeef", 10, "bb.qemu")


def test_a_line_of_the_20_branch_makes_its_device():
    """lws_min and the like were documented and ignored; here they count."""
    made = settings("serial=deadbeef,num_queues=8,lws_min=8,lws_opt=16,lmw_cunits=48,learly_reset=0,dlfeat=2,dialect=1")
    assert (made.geometry.ws_min, made.geometry.ws_opt, made.geometry.mw_cunits) == (8, 16, 48)
    assert (made.nvme.early_reset, made.nvme.dlfeat, made.nvme.queues) == (False, 2, 8)
    assert made.nvme.namespaces == ("ocssd20",)


def test_lver_0_is_a_controller_with_a_block_namespace_only():
    assert settings("lver=0").nvme.namespaces == ("block",)


def test_fault_files_and_bad_blocks_become_the_one_set_of_fault_settings():
    made = settings("lwritefail=w,lresetfail=r,lchunkstate=c,lbbfrequency=50")
    assert (made.faults.write_failures, made.faults.reset_failures, made.faults.chunk_states) == ("w", "r", "c")
    assert made.faults.bad == "2.000000%"
    assert settings("lbbfrequency=0").faults.bad is None


def test_what_has_no_meaning_is_named():
    assert translate("drive=d0,bootindex=1,lstrict=1").notes == [
        "drive: use --store", "bootindex: QEMU's own affair", "lstrict: fixed here"]


@pytest.mark.parametrize(("line", "says"), [
    ("lchannels=1", "lchannels"), ("lnum_chs=1", "did you mean lnum_ch"), ("lmtype=1", "only NAND"), ("mdts=99",
                                                                                                      "from 0 to 16"),
    ("lver=7", "must be 0, 1 or 2"), ("namespaces=0", "from 1 to 256"), ("lnum_lun=x", "must be a number"),
    ("lpgs_per_blk=0", "must not be 0"), ("serial", "no option"),
])
def test_what_is_wrong_is_refused_by_name(line, says):
    with pytest.raises(sets.SettingsError, match=says):
        settings(line)


def test_every_setting_that_an_option_becomes_exists():
    for name in OPTIONS:
        text = {"serial": "x", "lmax_sec_per_rq": "64"}.get(name, "1")
        try:
            made = translate(f"{name}={text}")
        except sets.SettingsError:
            made = translate(f"{name}=0") if name not in ("lsec_size",) else translate("lsec_size=4096")
        assert made.values.keys() <= sets.KEYS.keys(), name
