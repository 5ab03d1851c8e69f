"""Owns the step from an image of the reference emulator's qemu-img to one of ours: what it must be, and the copy.

Every namespace becomes ``num_grp`` groups of one device, in order, so that as many ``ocssd20`` namespaces show the same
flash again. Carried over: chunk states, types, write pointers, wear, and data and OOB of the sectors that were written.
Nothing in the source is trusted: each number is checked before it is used, and named when it breaks a rule.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ocssd_daemon.nand.geometry import Geometry, GeometryError, validate
from ocssd_daemon.nand.store import Store, boot_id, reserve

from ..protocol.nvme import reference_image as layout
from ..protocol.nvme.ocssd20 import GEOMETRY_BYTES, ChunkState, ChunkType
from ..protocol.nvme.ocssd20 import Geometry as GeometryPage
from .namespaces import bits_for
from .raw20 import DESCRIPTOR

MAX_NAMESPACES = 256
SECTOR_BYTES = (4096, 65536)    # smaller ones: the emulator puts the data over its own chunk table
PIECE_BYTES = 1 << 20           # read at once
BLOCK_BYTES = 64 << 10          # of a piece: one that is all zeroes stays a hole
SPAN_BYTES = 64 << 20           # joined chunks, between two steps of the progress
NO_WP = 0xFFFF_FFFF
OVERRIDES = ("ws_min", "ws_opt", "mw_cunits", "maxoc", "maxocpu")   # what says nothing about where bytes lie

Progress = Callable[[float], None]


class ImageError(ValueError):
    """A source that cannot be imported: one sentence with field, value and rule."""


@dataclass
class Report:
    """What was carried over. ``notes``: what an operator should know."""

    namespaces: int
    sectors: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Span:
    """Sectors to copy: half-open, counted through the whole device."""

    first: int
    end: int


class ReferenceImage:
    """An image, open for reading. ``geometry`` is that of the device that holds all of its namespaces.

    *overrides* replace fields of the geometry that no layout depends on. Acquires a descriptor until ``close``, also by
    ``with``. Raises ImageError.
    """

    def __init__(self, path: str, overrides: dict[str, int] | None = None) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ImageError(f"{path}: is not a regular file")
            self._size_bytes = os.fstat(self._fd).st_size
            self._header = self._read_header()
            pages = [self._geometry_page(i) for i in range(self._header.num_namespaces)]
            self.mccap = pages[0].mccap
            self._groups = pages[0].num_grp
            self.geometry = self._device(pages, overrides or {})
            self._check_size()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> ReferenceImage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- what it is -----------------------------------------------------------------------------------------

    @property
    def namespaces(self) -> int:
        return int(self._header.num_namespaces)

    def _bad(self, what: str, value: object, rule: str) -> ImageError:
        return ImageError(f"{self.path}: {what} = {value}: {rule}")

    def _pread(self, count: int, offset: int, what: str) -> bytes:
        raw = os.pread(self._fd, count, offset)
        if len(raw) != count:
            raise ImageError(f"{self.path}: is cut short: {what} at {offset} needs {count} bytes")
        return raw

    def _read_header(self) -> layout.Record:
        header = layout.Header.parse(self._pread(layout.HEADER_BYTES, 0, "the header"))
        if header.magic != layout.MAGIC:
            raise ImageError(f"{self.path}: is no image of qemu-img's format ocssd (it begins otherwise)")
        low, high = SECTOR_BYTES
        size = header.sector_bytes
        rules = [
            (header.version == layout.VERSION, "version", header.version, f"must be {layout.VERSION}"),
            (1 <= header.num_namespaces <= MAX_NAMESPACES, "num_ns", header.num_namespaces,
             f"must be from 1 to {MAX_NAMESPACES}"),
            (size >= low, "sec_size", size, f"must be at least {low}: with smaller sectors the emulator wrote the data "
             "over its own chunk table, and nothing in such an image can be trusted"),
            (size <= high and size & (size - 1) == 0, "sec_size", size, f"must be a power of two up to {high}"),
            (header.md_bytes <= 4096, "md_size", header.md_bytes, "must be at most 4096"),
            (header.ns_bytes < 1 << 62, "ns_size", header.ns_bytes, "must be the size of a namespace"),
        ]
        for holds, what, value, rule in rules:
            if not holds:
                raise self._bad(what, value, rule)
        return header

    def _geometry_page(self, index: int) -> layout.Record:
        offset = self._header.sector_bytes + index * self._header.ns_bytes
        raw = self._pread(GEOMETRY_BYTES, offset, f"the geometry of namespace {index + 1}")
        page = GeometryPage.parse(raw)
        if page.major != 2:
            raise self._bad(f"version of namespace {index + 1}", page.major, "must be 2 (OCSSD 2.0)")
        return page

    def _device(self, pages: list[layout.Record], overrides: dict[str, int]) -> Geometry:
        """One device for all namespaces: they have one shape, and their groups lie behind each other."""
        names = ("num_grp", "num_pu", "num_chk", "clba", "ws_min", "ws_opt", "mw_cunits", "maxoc", "maxocpu", "mccap")
        first = pages[0]
        for index, page in enumerate(pages):
            for name in names:
                if page[name] != first[name]:
                    raise self._bad(f"{name} of namespace {index + 1}", page[name],
                                    f"differs from namespace 1 ({first[name]})")
        made = Geometry(
            groups=first.num_grp * len(pages), pus=first.num_pu, chunks=first.num_chk, sectors=first.clba,
            sector_bytes=self._header.sector_bytes, oob_bytes=self._header.md_bytes, ws_min=first.ws_min,
            ws_opt=first.ws_opt, mw_cunits=first.mw_cunits, maxoc=first.maxoc, maxocpu=first.maxocpu)
        try:
            return validate(msgspec.structs.replace(made, **overrides))
        except GeometryError as error:
            hint = f"; give another with --set geometry.{error.field}=" if error.field in OVERRIDES else ""
            raise ImageError(f"{self.path}: {error}{hint}") from None

    @property
    def _chunks_each(self) -> int:
        return self.geometry.total_chunks // self.namespaces

    def _check_size(self) -> None:
        g = self.geometry
        expected = layout.namespace_bytes(self._chunks_each, self._chunks_each * g.sectors, g.sector_bytes, g.oob_bytes)
        if self._header.ns_bytes != expected:
            raise self._bad("ns_size", self._header.ns_bytes, f"a namespace of this geometry has {expected}")
        needed = layout.HEADER_BYTES + self.namespaces * expected
        if self._size_bytes < needed:
            raise ImageError(f"{self.path}: is cut short, {self._size_bytes} of {needed} bytes")

    # ---- chunks ---------------------------------------------------------------------------------------------

    def descriptors(self) -> NDArray[Any]:
        """All chunk descriptors (``raw20.DESCRIPTOR``) in the order of the device, checked. Raises ImageError."""
        found = []
        for index in range(self.namespaces):
            at = self._places(index).chunks
            raw = self._pread(self._chunks_each * DESCRIPTOR.itemsize, at, f"chunk table of namespace {index + 1}")
            found.append(np.frombuffer(raw, DESCRIPTOR))
        table = np.concatenate(found)
        self._check_descriptors(table)
        return table

    def _places(self, index: int) -> layout.Places:
        return layout.places(self._header, index, self._chunks_each, self._size_bytes)

    def _check_descriptors(self, table: NDArray[Any]) -> None:
        sectors = self.geometry.sectors
        state, random = table["state"], (table["type"] & ChunkType.RANDOM) != 0
        moving = ~random & (state != ChunkState.OFFLINE)
        limit = np.select([state == ChunkState.FREE, state == ChunkState.OPEN], [0, sectors - 1], sectors)
        rules = [
            ("state", ~np.isin(state, list(ChunkState)), "must be 1 free, 2 closed, 4 open or 8 offline"),
            ("type", ~np.isin(table["type"], (ChunkType.SEQUENTIAL, ChunkType.RANDOM)), "must be 1 or 2"),
            ("cnlb", table["cnlb"] != sectors, f"must be the {sectors} sectors of a chunk"),
            ("slba", table["slba"] != self._slbas(), "is not the chunk's first address"),
            ("wp", moving & (table["wp"] > limit.astype(np.uint64)), "lies beyond what its state allows"),
        ]
        for name, broken, rule in rules:
            if broken.any():
                at = int(np.flatnonzero(broken)[0])
                raise self._bad(f"{name} of chunk {self._name(at)}", int(table[name][at]),
                                f"{rule} ({int(broken.sum())} such)")

    def _slbas(self) -> NDArray[np.uint64]:
        """First address of each chunk, counted from 0 in each namespace."""
        g = self.geometry
        index = np.arange(self._chunks_each, dtype=np.uint64)
        at_chunk = np.uint64(bits_for(g.sectors))
        at_pu = at_chunk + np.uint64(bits_for(g.chunks))
        at_group = at_pu + np.uint64(bits_for(g.pus))
        chunks, pus = np.uint64(g.chunks), np.uint64(g.pus)
        each = (index % chunks << at_chunk | index // chunks % pus << at_pu | index // (chunks * pus) << at_group)
        return np.tile(each, self.namespaces)

    def _name(self, index: int) -> str:
        """Namespace and place, as the emulator's user knows them."""
        g = self.geometry
        nsid_0, within = divmod(index, self._chunks_each)
        return (f"grp={within // (g.chunks * g.pus)} pu={within // g.chunks % g.pus} chk={within % g.chunks} "
                f"of namespace {nsid_0 + 1}")

    # ---- the copy -------------------------------------------------------------------------------------------

    def copy_to(self, store: Store, progress: Progress = lambda share: None) -> Report:
        """Fill *store*, fresh and of our geometry. Raises ImageError and OSError (no space); then it is half full."""
        table = self.descriptors()
        report = Report(self.namespaces, notes=self._notes())
        spans = self._spans(table)
        report.sectors = sum(span.end - span.first for span in spans)
        report.chunks = {state.name.lower(): int((table["state"] == state).sum()) for state in ChunkState}
        self._reserve_open(store, table)
        for done, span in enumerate(spans):
            self._copy_span(store, span)
            progress((done + 1) / len(spans))
        self._set_chunks(store, table)
        store.save_superblock(boot_id=boot_id())        # used flash: no factory marks, no ageing are put on it
        return report

    def _notes(self) -> list[str]:
        places, sectors = self._places(0), self._chunks_each * self.geometry.sectors
        short = sectors - (places.oob - places.data) // self.geometry.sector_bytes
        if short <= 0:
            return []
        return [f"the last {short} sectors of each namespace share bytes with its first OOB entries, as the emulator "
                "laid them out"]

    def _spans(self, table: NDArray[Any]) -> list[_Span]:
        """What was written, in order; neighbours of one namespace are joined up to a useful length."""
        sectors, longest = self.geometry.sectors, max(1, SPAN_BYTES // self.geometry.sector_bytes)
        counts = _written(table, sectors)
        spans: list[_Span] = []
        for index in np.flatnonzero(counts).tolist():
            first, end = index * sectors, index * sectors + int(counts[index])
            joins = spans and spans[-1].end == first and index % self._chunks_each
            if joins and end - spans[-1].first <= longest:
                spans[-1].end = end
            else:
                spans.append(_Span(first, end))
        return spans

    def _copy_span(self, store: Store, span: _Span) -> None:
        g, each = self.geometry, self._chunks_each * self.geometry.sectors
        index, within = divmod(span.first, each)
        places, count = self._places(index), span.end - span.first
        for source, target, width in ((places.data, store.layout.data.offset, g.sector_bytes),
                                      (places.oob, store.layout.oob.offset, g.oob_bytes)):
            _copy(self._fd, source + within * width, store.fd, target + span.first * width, count * width)

    def _reserve_open(self, store: Store, table: NDArray[Any]) -> None:
        """An open chunk has all its room on the host's disk, as if opened here (media.pxd, store_reserve)."""
        g = self.geometry
        for index in np.flatnonzero(table["state"] == ChunkState.OPEN).tolist():
            for region, width in ((store.layout.data, g.sector_bytes), (store.layout.oob, g.oob_bytes)):
                each = g.sectors * width
                if each:
                    reserve(store.fd, region.offset + index * each, each)

    def _set_chunks(self, store: Store, table: NDArray[Any]) -> None:
        """Wear is carried over as the emulator counts it: one per reset, modulo 256."""
        state, random = table["state"], (table["type"] & ChunkType.RANDOM) != 0
        # A random chunk may be read as a whole.
        wp = np.where(random, np.uint32(self.geometry.sectors), table["wp"].astype(np.uint32))
        for name in ("type", "wear_index", "state"):
            store.chunks[name] = table[name]
        store.chunks["pe_cycles"] = table["wear_index"]
        special = [state == ChunkState.OFFLINE, state == ChunkState.FREE]
        store.chunks["wp"] = np.select(special, [np.uint32(NO_WP), np.uint32(0)], wp)


def _written(table: NDArray[Any], sectors: int) -> NDArray[np.int64]:
    """Sectors from the start of each chunk that hold something. A random chunk has no write pointer; offline ones
    cannot be read.
    """
    state = table["state"]
    holds = (state == ChunkState.OPEN) | (state == ChunkState.CLOSED)
    random = (table["type"] & ChunkType.RANDOM) != 0
    return np.where(holds, np.where(random, sectors, table["wp"]), 0).astype(np.int64)


def _copy(source: int, at: int, target: int, to: int, count: int) -> None:
    """*count* bytes from one file to another. Holes, and blocks of zeroes, stay holes; what lies behind the end of the
    source is zeroes.
    """
    for offset, length in _pieces(source, at, at + count):
        piece = memoryview(os.pread(source, length, offset))
        for start in range(0, len(piece), BLOCK_BYTES):
            block = piece[start:start + BLOCK_BYTES]
            if np.frombuffer(block, np.uint8).any():
                _pwrite(target, block, to + offset - at + start)


def _pieces(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is no hole in [at, end), at most PIECE_BYTES each."""
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:              # nothing but holes from here on
                return
            raise
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        for at in range(start, stop, PIECE_BYTES):
            yield at, min(PIECE_BYTES, stop - at)
        at = max(stop, start)


def _pwrite(fd: int, block: memoryview, offset: int) -> None:
    while block:
        done = os.pwrite(fd, block, offset)
        block, offset = block[done:], offset + done

