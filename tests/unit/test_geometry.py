"""Geometry: every rule names its field, the value and what is wrong."""

from __future__ import annotations

import pytest

from ocssd_daemon.nand.geometry import Geometry, GeometryError, validate, with_size


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("groups", 0, "between 1 and 256"),
        ("chunks", 65537, "between 1 and 65536"),
        ("sector_bytes", 1000, "power of two"),
        ("sector_bytes", 256, "between 512 and 65536"),
        ("ws_opt", 6, "multiple of ws_min (4)"),
        ("sectors", 1020, "multiple of ws_opt (8)"),
        ("mw_cunits", 5, "multiple of ws_min (4)"),
        ("mw_cunits", 2048, "not be larger than a chunk"),
        ("maxocpu", -1, "between 0"),
    ],
)
def test_a_broken_rule_names_field_value_and_rule(field: str, value: int, rule: str) -> None:
    with pytest.raises(GeometryError) as caught:
        validate(Geometry(**{field: value}))
    assert f"geometry.{field} = {value}: " in str(caught.value)
    assert rule in str(caught.value)


def test_more_sectors_than_an_l2p_entry_can_name_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"2\^31"):
        validate(Geometry(groups=16, pus=16, chunks=65536, sectors=4096))


def test_default_is_4_gib_raw() -> None:
    assert validate(Geometry()).raw_bytes == 4 << 30


def test_size_changes_chunks_per_pu_and_never_rounds_down() -> None:
    assert with_size(Geometry(), 8 << 30).chunks == 256
    assert with_size(Geometry(), (8 << 30) + 1).chunks == 257
