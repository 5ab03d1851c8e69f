"""Traces: what each format's lines become, and how a line that cannot be read is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from ocssd_daemon.sim import traces
from ocssd_daemon.sim.traces import FLUSH, READ, TRIM, WRITE, TraceError
from tests.kit.requires import missing

FIO = """fio version 2 iolog
/dev/sda add
/dev/sda open
/dev/sda write 0 8192
/dev/sda wait 150
/dev/sda read 4096 4096
/dev/sda sync 0 0
/dev/sda trim 8192 4096
/dev/sda close
"""

BLKPARSE = """  8,0    1        1     0.000000000  1234  Q   W 16 + 8 [fio]
  8,0    1        2     0.000001000  1234  G   W 16 + 8 [fio]
  8,0    1        3     0.000002000  1234  D   W 16 + 8 [fio]
  8,0    0        4     0.000500000  1234  Q  RA 0 + 16 [fio]
  8,0    0        5     0.000600000  1234  Q FWS [fio]
  8,0    0        6     0.000700000  1234  Q   D 64 + 8 [fio]
  8,0    0        7     0.000800000     0  C   W 16 + 8 [0]
CPU0 (8,0):
 Reads Queued:           1,        8KiB  Writes Queued:           1,        4KiB
Total (8,0):
 Reads Queued:           1,        8KiB  Writes Queued:           1,        4KiB

Throughput (R/W): 1KiB/s / 1KiB/s
Events (8,0): 7 entries
Skips: 0 forward (0 -   0.0%)
"""

MSR = """128166372003061629,usr,0,Read,7014609920,24576,41286
128166372016382155,usr,0,Write,1317441536,8192,1963
"""


def load(tmp_path: Path, text: str, name: str = "trace") -> traces.Trace:
    path = tmp_path / name
    path.write_text(text)
    return traces.load(str(path))


def rows(trace: traces.Trace) -> list[tuple[int, ...]]:
    columns = (trace.at_ns, trace.ops, trace.offsets, trace.sizes)
    return [tuple(int(v) for v in row) for row in zip(*columns, strict=True)]


def test_a_fio_iolog_becomes_its_requests_with_waits_as_time(tmp_path: Path) -> None:
    assert rows(load(tmp_path, FIO)) == [
        (0, WRITE, 0, 8192),
        (150_000, READ, 4096, 4096),
        (150_000, FLUSH, 0, 0),
        (150_000, TRIM, 8192, 4096),
    ]


def test_fio_version_3_lines_begin_with_milliseconds(tmp_path: Path) -> None:
    text = "fio version 3 iolog\n5 f add\n7 f read 0 4096\n9 f write 0 4096\n"
    assert rows(load(tmp_path, text)) == [(0, READ, 0, 4096), (2_000_000, WRITE, 0, 4096)]


def test_blkparse_text_gives_queue_events_and_ignores_the_summary(tmp_path: Path) -> None:
    assert rows(load(tmp_path, BLKPARSE)) == [
        (0, WRITE, 8192, 4096),
        (500_000, READ, 0, 8192),
        (600_000, FLUSH, 0, 0),
        (700_000, TRIM, 32768, 4096),
    ]


def test_blkparse_text_without_queue_events_gives_issue_events(tmp_path: Path) -> None:
    assert rows(load(tmp_path, "8,0 1 1 0.000002000 12 D R 8 + 8 [fio]\n")) == [(0, READ, 4096, 4096)]


def test_an_msr_csv_counts_time_in_100_ns_from_its_first_request(tmp_path: Path) -> None:
    assert rows(load(tmp_path, MSR)) == [
        (0, READ, 7014609920, 24576),
        (1_332_052_600, WRITE, 1317441536, 8192),
    ]


def test_a_trace_without_times_is_not_timed(tmp_path: Path) -> None:
    assert not load(tmp_path, "fio version 2 iolog\nf add\nf read 0 4096\nf read 0 4096\n").timed
    assert load(tmp_path, FIO).timed


def test_a_gz_file_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(FIO.encode()))
    assert len(traces.load(str(path)).ops) == 4


def test_a_zst_file_is_unpacked(tmp_path: Path) -> None:
    zstandard = requires_zstandard()
    path = tmp_path / "trace.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(FIO.encode()))
    assert len(traces.load(str(path)).ops) == 4


def requires_zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        missing("zstandard", "pip install zstandard")
    return zstandard


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "trace: empty"),
        ("hello\n", "trace:1: line is 'hello': expected a fio iolog, blkparse text or MSR Cambridge CSV"),
        ("fio version 1 iolog\n", "trace:1: version is '1': expected fio iolog version 2 or 3"),
        (
            "fio version 2 iolog\nf reed 0 1\n",
            "trace:2: action is 'reed': expected one of add, open, close, wait, read",
        ),
        (
            "fio version 2 iolog\nf read 0\n",
            "trace:2: offset and length is '0': expected two numbers in bytes",
        ),
        ("fio version 2 iolog\nf read -1 4096\n", "trace:2: offset is '-1': expected a whole number"),
        ("fio version 2 iolog\nf add\n", "trace: holds no request"),
        (MSR + "1,usr,0,Reed,0,1,1\n", "trace:3: type is 'Reed': expected Read or Write"),
        (MSR + "1,usr,0\n", "trace:3: line is '1,usr,0': expected 7 fields"),
        (MSR.replace("24576", "24576.5"), "trace:1: size is '24576.5': expected a whole number"),
        ("8,0 1 1 0.0 12 Q R 8 8 [fio]\n", "trace:1: sectors is '8 8 [fio]': expected SECTOR + COUNT"),
        ("8,0 1 1 zero 12 Q R 8 + 8 [fio]\n", "trace:1: time is 'zero': expected a whole number"),
        ("8,0 1 1 0.0 12 Q R 8 + 8 [fio]\nwhat?\n", "trace:2: line is 'what?': expected a blkparse event"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_field_and_expectation(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(TraceError) as caught:
        load(tmp_path, text)
    assert complaint in str(caught.value)


def test_a_trace_that_reaches_beyond_the_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"reaches to byte 7014634496, the disk has 4096000; .* --set size="):
        traces.to_sectors(load(tmp_path, MSR), "trace", 4096, 1000)


def test_requests_cover_every_sector_they_touch(tmp_path: Path) -> None:
    text = "fio version 2 iolog\nf add\nf write 4095 2\nf read 0 4096\nf read 512 512\n"
    at = traces.to_sectors(load(tmp_path, text), "trace", 4096, 1000)
    assert list(zip(at.lbas.tolist(), at.counts.tolist(), strict=True)) == [(0, 2), (0, 1), (0, 1)]


def test_a_missing_file_and_a_broken_archive_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        traces.load(str(tmp_path / "none"))
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(FIO.encode())[:20])
    with pytest.raises(TraceError, match=r"broken\.gz: "):
        traces.load(str(broken))


def test_archives_that_are_damaged_or_cut_short_are_refused_and_never_read_in_part(tmp_path: Path) -> None:
    zstandard = requires_zstandard()
    text = "fio version 2 iolog\n" + "".join(f"f write {4096 * i} 4096\n" for i in range(50_000))
    packed = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(text.encode())
    lines = text.encode().splitlines(keepends=True)
    first = zstandard.ZstdCompressor().compress(b"".join(lines[:1000]))  # cut at its end the lines would look whole
    damaged = bytearray(gzip.compress(text.encode()))
    damaged[len(damaged) // 2] ^= 0xFF
    for name, content in (
        ("cut.zst", packed[: len(packed) // 2]),
        ("cut-tail.zst", packed[:-1]),
        ("junk.zst", b"hello world " * 100),
        ("cut-second.zst", first + packed[:20]),
        ("damaged.gz", bytes(damaged)),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TraceError, match=name):
            traces.load(str(path))
    both = tmp_path / "two-frames.zst"
    rest = zstandard.ZstdCompressor().compress(b"".join(lines[1000:]))
    both.write_bytes(first + rest)
    assert len(traces.load(str(both)).ops) == 50_000
