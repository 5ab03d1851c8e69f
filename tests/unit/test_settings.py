"""Settings: what is taken, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ocssd_daemon import settings as sets
from ocssd_daemon.settings import SettingsError


def build(*assignments: str) -> sets.Settings:
    return sets.build(sets.from_assignments(assignments))


def refusal(*assignments: str) -> str:
    with pytest.raises(SettingsError) as caught:
        build(*assignments)
    return str(caught.value)


def test_the_default_device_is_4_gib_raw() -> None:
    assert build().geometry.raw_bytes == 4 << 30


@pytest.mark.parametrize(
    ("size", "raw_bytes"),
    [("4G", 4 << 30), ("64M", 64 << 20), ("1.5GiB", 3 << 29), ("1T", 1 << 40), (4096, None)],
)
def test_size_makes_at_least_that_much_raw_flash(size: str | int, raw_bytes: int | None) -> None:
    made = build(f"size={size}").geometry.raw_bytes
    assert made == raw_bytes if raw_bytes else made >= 4096


def test_small_sizes_get_smaller_chunks_so_that_there_are_enough_of_them() -> None:
    geometry = build("size=64M").geometry
    assert geometry.chunks >= sets.MIN_CHUNKS_FOR_SIZE
    assert geometry.sectors % geometry.ws_opt == 0


def test_an_explicit_chunk_size_is_kept_by_size() -> None:
    assert build("size=64M", "geometry.sectors=1024").geometry.sectors == 1024


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("geometry.groups=none", "geometry.groups=none (--set): must be an integer"),
        ("geometry.groups=0", "geometry.groups=0 (--set): must be between 1 and 256"),
        ("geometry.groupz=3", "geometry.groupz=3 (--set): no such setting; did you mean geometry.groups?"),
        ("chunks=4", "chunks=4 (--set): no such setting; did you mean geometry.chunks?"),
        ("ftl.victim=best", "must be one of cost-benefit, d-choices, fifo, greedy, random"),
        ("ftl.op=nan", "ftl.op=nan (--set): must be a number from 0.02 to 9.0"),
        ("read_only=perhaps", "read_only=perhaps (--set): must be true or false"),
        ("size=4X", "size=4X (--set): must be a size such as 512M or 4G"),
        ("store=", "store= (--set): must be a path"),
        ("seed=-1", "seed=-1 (--set): must be an integer from 0 to"),
        ("geometry=3", "geometry=3 (--set): no such setting; it is a table with geometry.groups,"),
        ("geometry.ws_opt=7", "geometry.ws_opt=7 (--set): must be a multiple of ws_min (4)"),
        ("no equals sign", "--set=no equals sign: must be key=value"),
        (
            "vhost.serial=" + "x" * 21,
            "vhost.serial=" + "x" * 21 + " (--set): must be text of at most 20 characters",
        ),
    ],
)
def test_a_refusal_names_key_value_source_and_rule_in_one_line(assignment: str, line: str) -> None:
    said = refusal(assignment)
    assert line in said
    assert "\n" not in said


@pytest.mark.parametrize("field", ["groups", "pus", "sectors", "sector_bytes", "ws_opt"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_shape_that_cannot_be_is_named_also_when_a_size_is_given(field: str, value: int) -> None:
    assert refusal("size=1G", f"geometry.{field}={value}").startswith(f"geometry.{field}={value} (--set): must be ")


def test_size_and_chunks_together_are_refused() -> None:
    assert "geometry.chunks is set too" in refusal("size=4G", "geometry.chunks=64")


def test_later_layers_win() -> None:
    preset = sets.from_preset("tiny")
    assert sets.build(preset, sets.from_assignments(["geometry.pus=2"])).geometry.pus == 2


@pytest.mark.parametrize("preset", sets.PRESETS)
def test_every_preset_is_a_sound_device(preset: str) -> None:
    sets.build(sets.from_preset(preset))


def test_an_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(SettingsError, match="preset=huge: no such preset; there are default, tiny"):
        sets.from_preset("huge")


def test_a_toml_file_means_the_same_as_assignments(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('size = "1G"\n[ftl]\nop = 0.2\n[nbd]\nlisten = ["unix:/a", "tcp:localhost:1"]\n')
    assert sets.build(sets.from_toml(str(path))) == build(
        "size=1G", "ftl.op=0.2", "nbd.listen=unix:/a,tcp:localhost:1"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[geometry]\nchunks = 'many'\n", "geometry.chunks=many ({path}): must be an integer"),
        ("[geometry]\nchunks = 1.5\n", "geometry.chunks=1.5 ({path}): must be an integer"),
        (
            "[geometri]\nchunks = 4\n",
            "geometri.chunks=4 ({path}): no such setting; did you mean geometry.chunks?",
        ),
        ("[geometry\n", "config={path}: Expected ']'"),
        ("\xff", "config={path}: "),
    ],
)
def test_a_bad_toml_file_is_named_with_the_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "device.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as caught:
        sets.build(sets.from_toml(str(path)))
    assert said.format(path=path) in str(caught.value)


def test_a_missing_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config=.*none\.toml: No such file or directory"):
        sets.from_toml(str(tmp_path / "none.toml"))


def test_asking_for_a_shape_is_noticed() -> None:
    assert sets.names_geometry(sets.named(sets.from_assignments(["size=1G"])))
    assert sets.names_geometry(sets.named(sets.from_preset("tiny")))
    assert not sets.names_geometry(sets.named(sets.from_preset("default"), sets.from_assignments(["seed=1"])))


def test_every_key_is_in_the_json_schema() -> None:
    schema = msgspec.json.encode(sets.json_schema()).decode()
    assert [key for key in sets.KEYS if f'"{key.rpartition(".")[2]}"' not in schema] == []
