"""Owns reading recorded I/O: which format a file has, and what each line means.

    fio iolog, versions 2 and 3     fio's documentation, "Trace file format"
    blkparse text                   blkparse(1), default output; queue events, or issue events when there are none
    MSR Cambridge CSV               timestamp (100 ns), host, disk, Read/Write, offset, size, response time

Files that end in .gz or .zst are unpacked on the way. A line that cannot be read is refused with file, line, field and
what was expected; nothing is skipped silently. Results: nanoseconds from the first request, bytes.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

READ, WRITE, TRIM, FLUSH = range(4)  # as _sim.OPS


class TraceError(ValueError):
    """A trace that cannot be used; one line."""


class Request(NamedTuple):
    at_ns: int
    op: int
    offset_bytes: int
    size_bytes: int


class Trace(NamedTuple):
    """Requests in order. ``timed``: they carry the times at which they were made."""

    at_ns: npt.NDArray[np.uint64]
    ops: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    timed: bool

    @property
    def end_bytes(self) -> int:
        return int((self.offsets + self.sizes).max()) if len(self.ops) else 0


class Place(NamedTuple):
    """Where a line stands, for messages."""

    path: str
    line: int

    def refusal(self, field: str, value: str, expected: str) -> TraceError:
        return TraceError(f"{self.path}:{self.line}: {field} is {value!r}: expected {expected}")

    def number(self, field: str, text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise self.refusal(field, text, "a whole number")
        return int(text)


# fio iolog

_FIO_OPS = {"read": READ, "write": WRITE, "trim": TRIM, "sync": FLUSH, "datasync": FLUSH}
_FIO_FILE_ACTIONS = ("add", "open", "close")


def _fio(lines: Iterator[tuple[Place, str]], version: int) -> Iterator[Request]:
    now_ns = 0
    for place, line in lines:
        words = line.split()
        if version == 3 and words:
            now_ns = place.number("timestamp", words.pop(0)) * 1_000_000
        if not words:
            continue
        if len(words) < 2:
            raise place.refusal("action", "", "FILE ACTION, such as /dev/sda read 0 4096")
        action, *numbers = words[1:]
        if action in _FIO_FILE_ACTIONS:
            continue
        if action == "wait":
            now_ns += place.number("wait", "".join(numbers[:1])) * 1000
        elif action in _FIO_OPS:
            numbers = [*numbers, "0", "0"] if _FIO_OPS[action] == FLUSH else numbers
            if len(numbers) < 2:
                raise place.refusal("offset and length", " ".join(numbers), "two numbers in bytes")
            yield Request(
                now_ns,
                _FIO_OPS[action],
                place.number("offset", numbers[0]),
                place.number("length", numbers[1]),
            )
        else:
            raise place.refusal(
                "action", action, f"one of {', '.join((*_FIO_FILE_ACTIONS, 'wait', *_FIO_OPS))}"
            )


# blkparse

_BLK_EVENT = re.compile(r"\s*\d+,\d+\s")
_BLK_SUMMARY = re.compile(
    r"\s*(CPU\s*\d|CPU\d|Total|Throughput|Events|Skips|Input file|Reads |Writes |Read |IO unplugs|PC )"
)
_BLK_ACTIONS = ("Q", "D")
_BLK_OP = {"R": READ, "W": WRITE, "D": TRIM}
_BLK_SECTOR_BYTES = 512


def _blk_op(rwbs: str) -> int | None:
    """The operation of an RWBS field; None for what moves nothing ("N")."""
    for letter in rwbs.removeprefix("F") or "F":
        if letter in _BLK_OP:
            return _BLK_OP[letter]
    return FLUSH if rwbs.startswith("F") else None


def _blk_event(place: Place, words: list[str]) -> tuple[str, Request | None]:
    if len(words) < 7:
        raise place.refusal("event", " ".join(words), "device, CPU, sequence, time, PID, action, RWBS ...")
    seconds, _, fraction = words[3].partition(".")
    at_ns = place.number("time", seconds) * 10**9 + place.number("time", fraction.ljust(9, "0")[:9])
    action, op = words[5], _blk_op(words[6])
    if action not in _BLK_ACTIONS or op is None:
        return action, None
    sized = len(words) >= 10 and words[8] == "+"
    if words[6].startswith("F") and not sized:
        return action, Request(at_ns, FLUSH, 0, 0)
    if not sized:
        raise place.refusal("sectors", " ".join(words[7:]), "SECTOR + COUNT")
    first, count = place.number("sector", words[7]), place.number("count", words[9])
    return action, Request(at_ns, op, first * _BLK_SECTOR_BYTES, count * _BLK_SECTOR_BYTES)


def _blkparse(lines: Iterator[tuple[Place, str]]) -> Iterator[Request]:
    found: dict[str, list[Request]] = {action: [] for action in _BLK_ACTIONS}
    for place, line in lines:
        if _BLK_EVENT.match(line):
            action, request = _blk_event(place, line.split())
            if request is not None:
                found[action].append(request)
        elif line.strip() and not _BLK_SUMMARY.match(line):
            raise place.refusal(
                "line", line.strip()[:40], "a blkparse event such as 8,0 1 1 0.000000000 12 Q R 0 + 8 [fio]"
            )
    return iter(found["Q"] or found["D"])


# MSR Cambridge

_MSR_FIELDS = 7
_MSR_OPS = {"read": READ, "write": WRITE}
_MSR_TICK_NS = 100


def _msr(lines: Iterator[tuple[Place, str]]) -> Iterator[Request]:
    for place, line in lines:
        fields = line.strip().split(",")
        if fields == [""]:
            continue
        if len(fields) != _MSR_FIELDS:
            raise place.refusal(
                "line", line.strip()[:40], f"{_MSR_FIELDS} fields: time,host,disk,type,offset,size,response"
            )
        op = _MSR_OPS.get(fields[3].strip().lower())
        if op is None:
            raise place.refusal("type", fields[3], "Read or Write")
        yield Request(
            place.number("timestamp", fields[0]) * _MSR_TICK_NS,
            op,
            place.number("offset", fields[4]),
            place.number("size", fields[5]),
        )


# Files.


class _Zstd(io.RawIOBase):
    """The content of all frames of a file. Raises EOFError if the last one is cut short, OSError if one is damaged."""

    PIECE_BYTES = 1 << 17

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None  # the one being unpacked
        self._packed, self._unpacked = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(self.PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("compressed file ends in the middle of a frame")
                return 0
            self._unpack()
        n = min(len(target), len(self._unpacked))
        target[:n], self._unpacked = self._unpacked[:n], self._unpacked[n:]
        return n

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except self._zstandard.ZstdError as error:
            raise OSError(f"damaged: {error}") from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zst(path: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise TraceError(
            f"{path}: .zst needs the package zstandard (pip install 'ocssd-daemon[sim]')"
        ) from None
    return io.BufferedReader(_Zstd(open(path, "rb"), zstandard))


def _open_gz(path: str) -> IO[bytes]:
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _open_plain(path: str) -> IO[bytes]:
    return open(path, "rb")


_OPENERS: dict[str, Callable[[str], IO[bytes]]] = {".gz": _open_gz, ".zst": _open_zst}


def _numbered(path: str, text: IO[str]) -> Iterator[tuple[Place, str]]:
    for number, line in enumerate(text, 1):
        yield Place(path, number), line


def _reader(place: Place, first: str, lines: Iterator[tuple[Place, str]]) -> Iterator[Request]:
    """The requests of the format that the first line shows."""
    version = re.fullmatch(r"fio version (\d+) iolog", first.strip())
    if version:
        if version[1] not in ("2", "3"):
            raise place.refusal("version", version[1], "fio iolog version 2 or 3")
        return _fio(lines, int(version[1]))

    def again() -> Iterator[tuple[Place, str]]:
        yield place, first
        yield from lines

    if _BLK_EVENT.match(first):
        return _blkparse(again())
    if first.count(",") == _MSR_FIELDS - 1:
        return _msr(again())
    raise place.refusal("line", first.strip()[:40], "a fio iolog, blkparse text or MSR Cambridge CSV")


def _arrays(requests: list[Request]) -> Trace:
    columns = list(zip(*requests, strict=True)) or [(), (), (), ()]
    at_ns = np.array(columns[0], np.uint64)
    order = np.argsort(at_ns, kind="stable")  # per-CPU buffers interleave
    at_ns = at_ns[order] - at_ns.min() if len(at_ns) else at_ns
    timed = bool(len(at_ns)) and int(at_ns[-1]) > 0
    return Trace(
        at_ns,
        np.array(columns[1], np.uint8)[order],
        np.array(columns[2], np.uint64)[order],
        np.array(columns[3], np.uint64)[order],
        timed,
    )


def load(path: str) -> Trace:
    """The requests of the file at *path*. Raises TraceError."""
    try:
        with _OPENERS.get(Path(path).suffix, _open_plain)(path) as raw:
            lines = _numbered(path, io.TextIOWrapper(raw, encoding="utf-8"))
            try:
                place, first = next(lines)
            except StopIteration:
                raise TraceError(f"{path}: empty") from None
            trace = _arrays(list(_reader(place, first, lines)))
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise TraceError(
            f"{path}: is not text; expected a fio iolog, blkparse text or MSR Cambridge CSV"
        ) from None
    if len(trace.ops) == 0:
        raise TraceError(f"{path}: holds no request")
    return trace


class Sectors(NamedTuple):
    """A trace in sectors of the disk, as ``Host.replay`` takes it."""

    at_ns: npt.NDArray[np.uint64]
    ops: npt.NDArray[np.uint8]
    lbas: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.uint32]


def to_sectors(trace: Trace, path: str, sector_bytes: int, capacity_sectors: int) -> Sectors:
    """*trace* on a disk of that size: whole sectors that each request touches. Raises TraceError if it does not fit."""
    disk_bytes = capacity_sectors * sector_bytes
    if trace.end_bytes > disk_bytes:
        raise TraceError(
            f"{path}: reaches to byte {trace.end_bytes}, the disk has {disk_bytes}; make it larger with --set size=..."
        )
    first = trace.offsets // sector_bytes
    last = (trace.offsets + trace.sizes + (sector_bytes - 1)) // sector_bytes
    return Sectors(trace.at_ns, trace.ops, first.astype(np.uint32), (last - first).astype(np.uint32))
