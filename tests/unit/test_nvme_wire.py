"""The same bytes, the same fields, both ways: construct's definitions, the C structs, the specifications' offsets.

C knows what lies in queues; there construct is held against it. Geometry, identity, tables and logs exist in construct
only (and one in numpy); those are held against offsets that are written out here.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocssd_daemon import _nvme
from ocssd_daemon.nvme.raw20 import DESCRIPTOR
from ocssd_daemon.protocol.nvme import commands, logs, ocssd12, ocssd20

# C struct, construct, and for construct's fields that C spells otherwise: what they are in C's fields.
C_STRUCTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sqe": (commands.SubmissionEntry, {
        "dptr": lambda c: struct.pack("<QQ", c["prp1"], c["prp2"]),
        "dwords": lambda c: struct.pack("<6I", *(c[f"cdw{i}"] for i in range(10, 16))),
        "fuse": lambda c: c["flags"] & 3, "psdt": lambda c: c["flags"] >> 6,
        "cdw": lambda c: [c[f"cdw{i}"] for i in range(10, 16)],
    }),
    "cqe": (commands.CompletionEntry, {}),
    "sgl": (commands.SglDescriptor, {"type": lambda c: c["identifier"] >> 4,
                                     "subtype": lambda c: c["identifier"] & 15}),
    "dsm_range": (commands.DsmRange, {}),
    "chunk_descriptor": (ocssd20.ChunkDescriptor, {}),
}

HAVE_PADDING = {"sgl", "chunk_descriptor"}


def fields_of(parsed: Any) -> dict[str, Any]:
    return {name: value for name, value in parsed.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", C_STRUCTS)
@given(data=st.data())
def test_construct_reads_what_c_reads_and_each_builds_the_others_bytes(name: str, data: st.DataObject) -> None:
    layout, derived = C_STRUCTS[name]
    raw = data.draw(st.binary(min_size=layout.sizeof(), max_size=layout.sizeof()))
    in_c, parsed = _nvme.wire_parse(name, raw), layout.parse(raw)
    for field, value in fields_of(parsed).items():
        assert value == (derived[field](in_c) if field in derived else in_c[field]), field
    built = _nvme.wire_build(name, in_c)
    assert layout.build(fields_of(parsed)) == built
    assert _nvme.wire_parse(name, built) == in_c
    assert built == raw or name in HAVE_PADDING


@pytest.mark.parametrize("name", C_STRUCTS)
def test_sizes_agree(name: str) -> None:
    assert C_STRUCTS[name][0].sizeof() == _nvme.WIRE_BYTES[name]


@given(st.binary(min_size=32 * 3, max_size=32 * 3))
def test_numpys_chunk_descriptor_is_constructs(raw: bytes) -> None:
    for i, row in enumerate(np.frombuffer(raw, DESCRIPTOR)):
        parsed = fields_of(ocssd20.ChunkDescriptor.parse(raw[32 * i:32 * i + 32]))
        assert {name: int(row[name]) for name in parsed} == parsed


# Offsets and widths from the specifications: name, byte offset, struct code.
GEOMETRY_20 = [
    ("major", 0, "B"), ("minor", 1, "B"), ("lbaf.grp_len", 8, "B"), ("lbaf.pu_len", 9, "B"), ("lbaf.chk_len", 10, "B"),
    ("lbaf.sec_len", 11, "B"), ("mccap", 16, "I"), ("wit", 32, "B"), ("num_grp", 64, "H"), ("num_pu", 66, "H"),
    ("num_chk", 68, "I"), ("clba", 72, "I"), ("ws_min", 128, "I"), ("ws_opt", 132, "I"), ("mw_cunits", 136, "I"),
    ("maxoc", 140, "I"), ("maxocpu", 144, "I"), ("trdt_ns", 192, "I"), ("trdm_ns", 196, "I"), ("twrt_ns", 200, "I"),
    ("twrm_ns", 204, "I"), ("tcrst_ns", 208, "I"), ("tcrsm_ns", 212, "I"),
]
PARTS_12 = ("ch", "lun", "pln", "blk", "pg", "sect")
IDENTITY_12 = [
    ("ver_id", 0, "B"), ("vmnt", 1, "B"), ("cgrps", 2, "B"), ("cap", 4, "I"), ("dom", 8, "I"),
    *((f"ppaf.{part}_{what}", 12 + 2 * i + j, "B") for i, part in enumerate(PARTS_12) for j, what in enumerate(
        ("off", "len"))),
    *((f"groups.0.{name}", 256 + at, code) for name, at, code in (
        ("mtype", 0, "B"), ("fmtype", 1, "B"), ("num_ch", 4, "B"), ("num_lun", 5, "B"), ("num_pln", 6, "B"),
        ("num_blk", 8, "H"), ("num_pg", 10, "H"), ("fpg_sz", 12, "H"), ("csecs", 14, "H"), ("sos", 16, "H"),
        ("trdt_ns", 20, "I"), ("trdm_ns", 24, "I"), ("tprt_ns", 28, "I"), ("tprm_ns", 32, "I"), ("tbet_ns", 36, "I"),
        ("tbem_ns", 40, "I"), ("mpos", 44, "I"), ("mccap", 48, "I"), ("cpar", 52, "H"))),
]
BAD_BLOCKS_12 = [("verid", 4, "H"), ("revid", 6, "H"), ("tblks", 12, "I"), ("tfact", 16, "I"), ("tgrown", 20, "I"),
                 ("tdresv", 24, "I"), ("thresv", 28, "I")]
NOTIFICATION = [("nc", 0, "Q"), ("lba", 8, "Q"), ("nsid", 16, "I"), ("state", 20, "H"), ("mask", 22, "B"),
                ("nlb", 32, "H")]
ERROR_ENTRY = [("error_count", 0, "Q"), ("sqid", 8, "H"), ("cid", 10, "H"), ("status_phase", 12, "H"),
               ("parameter_location", 14, "H"), ("lba", 16, "Q"), ("nsid", 24, "I"), ("vendor", 28, "B")]
TABLES: dict[str, tuple[Any, list[tuple[str, int, str]]]] = {
    "geometry": (ocssd20.Geometry, GEOMETRY_20), "identity": (ocssd12.Identity, IDENTITY_12),
    "bad blocks": (ocssd12.BadBlockHeader, BAD_BLOCKS_12), "notification": (ocssd20.NotificationEntry, NOTIFICATION),
    "error entry": (logs.ErrorEntry, ERROR_ENTRY),
}


def leaf(tree: Any, path: str) -> Any:
    for step in path.split("."):
        tree = tree[int(step)] if step.isdigit() else tree[step]
    return tree


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_a_structure_has_its_fields_where_the_specification_puts_them(name: str, data: st.DataObject) -> None:
    """Random bytes at the offsets, nothing beside them: the fields are read there, and built there again."""
    layout, table = TABLES[name]
    raw = bytearray(layout.sizeof())
    if name == "bad blocks":
        raw[:4] = b"BBLT"
    expected = {}
    for path, offset, code in table:
        expected[path] = data.draw(st.integers(0, (1 << 8 * struct.calcsize(code)) - 1))
        struct.pack_into(f"<{code}", raw, offset, expected[path])
    parsed = layout.parse(bytes(raw))
    assert {path: leaf(parsed, path) for path in expected} == expected
    assert layout.build(parsed) == bytes(raw)


@pytest.mark.parametrize("name", TABLES)
def test_no_field_is_left_out_of_the_tables(name: str) -> None:
    layout, table = TABLES[name]
    found = sorted(_paths(layout.parse(bytes(layout.sizeof()))))
    assert sorted({path for path, _, _ in table} | ({"tblid"} if name == "bad blocks" else set())) == found


def _paths(tree: Any, prefix: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [path for name, below in fields_of(tree).items() for path in _paths(below, f"{prefix}{name}.")]
    if isinstance(tree, list):
        return [path for i, below in enumerate(tree) for path in _paths(below, f"{prefix}{i}.")]
    return [prefix[:-1]]
