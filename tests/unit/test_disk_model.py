"""The FTL and the block view against a byte array, through garbage collection, faults, kills and restarts.

A kill is simulated where it hurts: the running FTL is thrown away and a new one starts on the same store, which is what
the page cache of a killed daemon holds. Nothing that was acknowledged may be missing afterwards.
"""

from __future__ import annotations

import random

import msgspec
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ocssd_daemon.ftl.target import Target, open_target
from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.store import open_ram

GEOMETRY = validate(
    Geometry(groups=2, pus=2, chunks=12, sectors=16, sector_bytes=1024, oob_bytes=16, ws_min=2, ws_opt=4, mw_cunits=8)
)
# (sector, out-of-band bytes, block): the smallest and the largest sectors, blocks from a part of a sector to all of it.
SHAPES = [(1024, 16, 512), (1024, 16, 1024), (1024, 16, 512), (512, 16, 512), (4096, 64, 512), (65536, 24, 512)]
LARGE_SECTOR = 65536


def check_consistency(target: Target) -> None:
    """What must hold between the L2P, the valid bitmap, the line table and the counters at any time."""
    arrays = target.ftl.arrays
    l2p = arrays["l2p"][: target.ftl.capacity_sectors]
    mapped = l2p[l2p != 0] - 1
    stats = target.ftl.stats()
    assert len(set(mapped.tolist())) == len(mapped) == stats["mapped_sectors"]
    bits = int(sum(int(word).bit_count() for word in arrays["valid"].ravel()))
    assert bits == len(mapped)
    geometry = target.store.geometry
    per_line = [0] * geometry.chunks
    for ppa in mapped.tolist():
        per_line[(ppa >> geometry.sector_bits) % geometry.chunks] += 1
    assert per_line == arrays["line_valid"].tolist()
    assert stats["lines"]["free"] == sum(1 for state in arrays["line_state"] if state == 0)


class DiskAgainstBytes(RuleBasedStateMachine):
    @initialize(
        victim=st.sampled_from(["greedy", "cost-benefit", "d-choices", "fifo", "random"]),
        frontiers=st.sampled_from([1, 2]),
        shape=st.sampled_from(SHAPES),
    )
    def start(self, victim: str, frontiers: int, shape: tuple[int, int, int]) -> None:
        self.sector, oob_bytes, self.block = shape
        self.options = {"victim": victim, "frontiers": frontiers, "block_bytes": self.block, "wear_spread": 3}
        geometry = msgspec.structs.replace(GEOMETRY, sector_bytes=self.sector, oob_bytes=oob_bytes)
        if self.sector == LARGE_SECTOR:  # few of them, to be quick
            geometry = msgspec.structs.replace(geometry, sectors=4, mw_cunits=4)
        self.store = open_ram(validate(geometry))
        self.target = open_target(self.store, op=1.0, **self.options)
        self.size = self.target.disk.size_bytes
        self.model = bytearray(self.size)
        self.stamp = 0
        self.failed_chunks = 0

    def _place(self, at: float, blocks: int) -> tuple[int, int]:
        offset = int(at * (self.size // self.block - 1)) * self.block
        return offset, min(blocks * self.block, self.size - offset)

    @rule(at=st.floats(0, 1), blocks=st.integers(1, 64), fua=st.booleans())
    def write(self, at: float, blocks: int, fua: bool) -> None:
        offset, length = self._place(at, blocks)
        self.stamp += 1
        data = random.Random(self.stamp).randbytes(length)
        assert self.target.disk.write(offset, data, fua) == 0
        self.model[offset : offset + length] = data

    @rule(seed=st.integers(0, 2**32), n=st.integers(20, 300))
    def write_many(self, seed: int, n: int) -> None:
        for i in range(n):
            place = (seed + i * 2654435761) % (self.size // self.sector) * self.sector
            data = (seed * 31 + i).to_bytes(8, "little") * (self.sector // 8)
            assert self.target.disk.write(place, data) == 0
            self.model[place : place + self.sector] = data

    @rule(at=st.floats(0, 1), blocks=st.integers(1, 200))
    def discard(self, at: float, blocks: int) -> None:
        offset, length = self._place(at, blocks)
        assert self.target.disk.discard(offset, length) == 0
        first, last = -(-offset // self.sector) * self.sector, (offset + length) // self.sector * self.sector
        if last > first:
            self.model[first:last] = bytes(last - first)

    @rule(at=st.floats(0, 1), blocks=st.integers(1, 100), unmap=st.booleans())
    def write_zeroes(self, at: float, blocks: int, unmap: bool) -> None:
        offset, length = self._place(at, blocks)
        assert self.target.disk.write_zeroes(offset, length, unmap) == 0
        self.model[offset : offset + length] = bytes(length)

    @rule()
    def flush(self) -> None:
        assert self.target.disk.flush() == 0

    @precondition(lambda self: self.failed_chunks < 4)
    @rule(chunk=st.integers(0, GEOMETRY.total_chunks - 1), what=st.sampled_from(["write", "reset"]))
    def fault(self, chunk: int, what: str) -> None:
        self.target.media.arm_fault(chunk, what)
        self.failed_chunks += 1

    @rule()
    def kill_and_recover(self) -> None:
        self.target = open_target(self.store, **self.options)
        assert self.target.how_started == "recovered"

    @rule()
    def stop_and_start(self) -> None:
        self.target.close()
        self.target = open_target(self.store, **self.options)
        assert self.target.how_started == "checkpoint"

    @rule(at=st.floats(0, 1), blocks=st.integers(1, 64))
    def read(self, at: float, blocks: int) -> None:
        offset, length = self._place(at, blocks)
        assert self.target.disk.read(offset, length) == self.model[offset : offset + length]

    @invariant()
    def structures_agree(self) -> None:
        if hasattr(self, "target"):
            check_consistency(self.target)

    def teardown(self) -> None:
        if hasattr(self, "target"):
            assert self.target.disk.read(0, self.size) == self.model


TestDiskAgainstBytes = DiskAgainstBytes.TestCase
# Shrinking a failure here takes minutes; the seed and the blob that a failure prints are enough to replay it.
TestDiskAgainstBytes.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
