"""Data pointers are followed twice: in C by the queues, in Python where memory is reached by messages. They agree."""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ocssd_daemon._nvme import MemoryFault

from ocssd_daemon.nvme.pointers import MAX_SGL_DESCRIPTORS, PointerError, pieces
from ocssd_daemon.protocol.nvme.commands import SubmissionEntry, sqe
from ocssd_daemon.protocol.nvme.status import Status, status_field
from tests.nvme.test_block import blocks, sgl
from tests.nvme.test_long_commands import LBA, RAM_BYTES, SQ, Still

PAGE = 4096
DATA, LISTS = 512 << 10, 256 << 10        # where data may lie, and lists
SECTORS = 12
BLOCK, BIT_BUCKET, SEGMENT, LAST = 0, 1, 2, 3


@pytest.fixture(scope="module")
def queues() -> Iterator[Still]:
    made = Still()
    made.disk.write(0, content(SECTORS))
    yield made
    made.close()


def content(sectors: int) -> bytes:
    return b"".join(struct.pack("<I", i) * (LBA // 4) for i in range(1, sectors + 1))


def by_c(queues: Still, entry: bytes) -> tuple[int, bytes]:
    """Status of the read, and all memory where data may lie, after it."""
    queues.ram[DATA:] = bytes(RAM_BYTES - DATA)
    queues.queues.reset()
    queues.interrupting()
    queues.tail = 0
    queues.ram[0:SQ] = bytes(SQ)
    queues.submit(entry)
    (found,) = queues.completions()
    return found[1], queues.ram[DATA:]


def by_python(queues: Still, entry: bytes, length: int) -> tuple[int, bytes]:
    """The same by the pieces that Python finds."""
    memory, data = bytearray(RAM_BYTES), content(length // LBA)
    walk = pieces(queues.memory, SubmissionEntry.parse(entry), length, PAGE)
    try:
        walk.send(None)
    except StopIteration as done:
        found = done.value
    except PointerError as error:
        return status_field(error.status), bytes(RAM_BYTES - DATA)
    except MemoryFault:
        return status_field(Status.DATA_TRANSFER_ERROR), bytes(RAM_BYTES - DATA)
    for address, count in found:
        if address + count > RAM_BYTES:
            return status_field(Status.DATA_TRANSFER_ERROR), bytes(RAM_BYTES - DATA)
        memory[address:address + count], data = data[:count], data[count:]
    return 0, bytes(memory[DATA:])


pages = st.integers(DATA // PAGE, RAM_BYTES // PAGE - 1).map(lambda page: page * PAGE)
prps = st.one_of(pages, pages, pages, st.sampled_from([LISTS, RAM_BYTES, 1 << 52, DATA + 8, DATA + 2]))
starts = st.one_of(pages, st.integers(DATA // 4, DATA // 4 + 3000).map(lambda word: word * 4), prps)
lists = st.sampled_from([LISTS, LISTS + 8, LISTS + PAGE - 8, LISTS + PAGE - 32, LISTS + 4, 1 << 52])


@settings(max_examples=300)
@given(st.integers(1, SECTORS), starts, lists, st.lists(prps, min_size=20, max_size=20),
       st.lists(prps, min_size=2, max_size=2))
def test_prps(queues: Still, count: int, first: int, where: int, entries: list[int], short: list[int]) -> None:
    queues.ram[LISTS:LISTS + 2 * PAGE] = struct.pack("<1024Q", *(entries * 52)[:1024])
    queues.ram[LISTS + PAGE - 8:LISTS + PAGE] = struct.pack("<Q", LISTS + PAGE)
    second = short[0] if count <= 2 else where
    entry = sqe(0x02, 1, 1, prp1=first, prp2=second, dwords=blocks(0, count))
    agree(queues, entry, count)


places = st.one_of(st.integers(DATA // 4, RAM_BYTES // 4 - 9000).map(lambda word: word * 4),
                   st.sampled_from([1 << 52, RAM_BYTES - 64]))
lengths = st.one_of(st.sampled_from([0, 4, LBA, 2 * LBA]), st.integers(0, 3 * LBA // 4).map(lambda words: words * 4))
data_blocks = st.tuples(places, lengths, st.just(BLOCK))
links = st.tuples(st.sampled_from([LISTS, LISTS + 64, LISTS + 256, 1 << 52]),
                  st.sampled_from([0, 8, 16, 32, 64, 128]), st.sampled_from([SEGMENT, SEGMENT, LAST]))
odd = st.tuples(places, lengths, st.sampled_from([BIT_BUCKET, 4, 15]))
descriptors = st.one_of(data_blocks, data_blocks, data_blocks, links, odd)


@settings(max_examples=400)
@given(st.integers(1, SECTORS), descriptors, st.lists(descriptors, min_size=24, max_size=24))
def test_sgls(queues: Still, count: int, first: tuple[int, int, int], rest: list[tuple[int, int, int]]) -> None:
    queues.ram[LISTS:LISTS + 384] = b"".join(sgl(*one) for one in rest)
    agree(queues, sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(*first), dwords=blocks(0, count)), count)


@settings(max_examples=200)
@given(st.integers(1, SECTORS), st.lists(st.integers(0, SECTORS * LBA // 4).map(lambda word: word * 4), max_size=20),
       st.integers(1, 8), st.randoms(use_true_random=False))
def test_sgls_that_fit(queues: Still, count: int, cuts: list[int], per_segment: int, chance: random.Random) -> None:
    """The transfer cut anywhere, its parts apart from each other in any order, over several segments."""
    ends = [0, *sorted(min(cut, count * LBA) for cut in cuts), count * LBA]
    parts = [b - a for a, b in itertools.pairwise(ends)]
    at = dict.fromkeys(chance.sample(range(len(parts)), len(parts)), 0)
    free = DATA
    for part in at:
        at[part], free = free, free + parts[part] + 4
    data = [sgl(at[i], length) for i, length in enumerate(parts)]
    segments = [data[i:i + per_segment] for i in range(0, len(data), per_segment)]
    starts = [LISTS + 16 * 9 * i for i in range(len(segments))]
    for i, (start, segment) in enumerate(zip(starts, segments, strict=True)):
        last = i == len(segments) - 1
        after = 0 if last else 16 * (len(segments[i + 1]) + (i + 1 < len(segments) - 1))
        raw = b"".join(segment) + (b"" if last else sgl(starts[i + 1], after, SEGMENT))
        queues.ram[start:start + len(raw)] = raw
    first = sgl(LISTS, 16 * (len(segments[0]) + (len(segments) > 1)), SEGMENT)
    entry = sqe(0x02, 1, 1, flags=1 << 6, dptr=first, dwords=blocks(0, count))
    assert by_python(queues, entry, count * LBA)[0] == 0
    assert agree(queues, entry, count)


def agree(queues: Still, entry: bytes, count: int) -> bool:
    """Both fail, or both succeed with the same bytes in the same places; whether the bytes were compared."""
    expected, scattered = by_python(queues, entry, count * LBA)
    overlapping = overlaps(queues, entry, count) if not expected else True
    status, memory = by_c(queues, entry)                        # last: its data may lie over the lists
    assert (status == 0) == (expected == 0), (status, expected)     # of several errors each may find another one first
    if not overlapping:
        assert memory == scattered
    return not overlapping


def overlaps(queues: Still, entry: bytes, count: int) -> bool:
    """Pieces over each other: the order in which they are written is nobody's promise."""
    walk = pieces(queues.memory, SubmissionEntry.parse(entry), count * LBA, PAGE)
    try:
        walk.send(None)
    except StopIteration as done:
        found = sorted(done.value)
    return any(a + n > b for (a, n), (b, _) in itertools.pairwise(found))


def test_a_chain_of_empty_descriptors_costs_no_time() -> None:
    """A segment may be as long as the guest has memory, and may link to itself: 2^22 descriptors, 256 times."""
    size, at = 64 << 20, 64 << 20
    large = Still(128 << 20)
    large.ram[at + size - 16:at + size] = sgl(at, size, SEGMENT)
    entry = sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(at, size, SEGMENT), dwords=blocks(0, 1))
    began = time.process_time()
    large.submit(entry)
    assert large.completions() == [(1, status_field(Status.SGL_SEGMENT_INVALID))]
    assert by_python(large, entry, LBA)[0] == status_field(Status.SGL_SEGMENT_INVALID)
    assert time.process_time() - began < 1
    large.close()


def test_as_many_descriptors_as_are_taken(queues: Still) -> None:
    size = 16 * MAX_SGL_DESCRIPTORS
    queues.ram[LISTS:LISTS + size] = sgl(DATA, 0) * (MAX_SGL_DESCRIPTORS - 1) + sgl(DATA, LBA)
    entry = sqe(0x02, 1, 1, flags=1 << 6, dptr=sgl(LISTS, size, LAST), dwords=blocks(0, 1))
    assert by_c(queues, entry)[0] == by_python(queues, entry, LBA)[0] == 0


def test_admin_commands_use_prps(queues: Still, start) -> None:
    _, host = start()
    at = host.allocate(PAGE)
    for psdt in (1, 2, 3):
        host.queues[0].submit(sqe(0x06, 9, flags=psdt << 6, dptr=sgl(at, PAGE), dwords=b"\1"))
        assert host.queues[0].wait()[0].status == 0x4002
    assert host.admin(0x06, data=at, dwords=b"\1").status == 0
