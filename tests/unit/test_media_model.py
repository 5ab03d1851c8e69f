"""The compiled flash rules against the plain model, driven by random commands."""

from __future__ import annotations

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ocssd_daemon._fast import Media

from ocssd_daemon.nand.geometry import Geometry, validate
from ocssd_daemon.nand.store import open_ram
from tests.reference.media import ReferenceMedia

CHUNK_RANDOM = 2
STATES = {1: "FREE", 2: "CLOSED", 4: "OPEN", 8: "OFFLINE"}
SMALL = {"groups": 2, "pus": 1, "chunks": 3, "sectors": 16, "sector_bytes": 512, "ws_min": 2, "ws_opt": 4}


class MediaAgainstModel(RuleBasedStateMachine):
    @initialize(
        mw_cunits=st.sampled_from([0, 2, 4, 16]),
        maxoc=st.integers(0, 3),
        maxocpu=st.integers(0, 2),
        early=st.booleans(),
        multi=st.booleans(),
        sector_bytes=st.sampled_from([512, 4096, 65536]),
        oob_bytes=st.sampled_from([0, 16, 64]),
        random_chunks=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=2),
    )
    def start(
        self,
        mw_cunits: int,
        maxoc: int,
        maxocpu: int,
        early: bool,
        multi: bool,
        sector_bytes: int,
        oob_bytes: int,
        random_chunks: set[tuple[int, int]],
    ) -> None:
        shape = {**SMALL, "sector_bytes": sector_bytes, "oob_bytes": oob_bytes}
        self.g = validate(Geometry(**shape, mw_cunits=mw_cunits, maxoc=maxoc, maxocpu=maxocpu))
        self.store = open_ram(self.g)
        self.fast = Media(self.store, early_reset=early, multi_reset=multi)
        self.model = ReferenceMedia(self.g, early, multi)
        for pu, chunk in random_chunks:
            self.store.chunks["type"][pu * self.g.chunks + chunk] = CHUNK_RANDOM
            self.model.chunks[pu, chunk].random = True
        self.stamp = 0

    def _payload(self, n: int) -> list[tuple[bytes, bytes]]:
        self.stamp += 1
        return [
            (
                bytes([self.stamp % 256, i]) * (self.g.sector_bytes // 2),
                bytes([i, self.stamp % 256]) * (self.g.oob_bytes // 2),
            )
            for i in range(n)
        ]

    @rule(pu=st.integers(0, 1), chunk=st.integers(0, 2), n=st.integers(1, 18), skew=st.sampled_from([0, 0, 0, 1, -2]))
    def write(self, pu: int, chunk: int, n: int, skew: int) -> None:
        sector = max(0, min(self.g.sectors - 1, self.model.chunks[pu, chunk].wp + skew))
        payload = self._payload(n)
        expected = self.model.write(pu, chunk, sector, payload)
        got = self.fast.write(
            self.fast.ppa(pu, 0, chunk, sector), b"".join(d for d, _ in payload), b"".join(o for _, o in payload)
        )
        assert got == expected, f"write of {n} at {pu}/{chunk}/{sector}: {got:#x}, model says {expected:#x}"

    @rule(
        pu=st.integers(0, 1),
        chunk=st.integers(0, 2),
        sources=st.lists(
            st.tuples(st.integers(0, 1), st.integers(0, 2), st.sampled_from([0, 0, 1, 2, 3, 7, 15])),
            min_size=1,
            max_size=4,
        ),
        skew=st.sampled_from([0, 0, 0, 1]),
    )
    def copy(self, pu: int, chunk: int, sources: list[tuple[int, int, int]], skew: int) -> None:
        """Vector copy: what may be copied is what may be read, where it may go is where a write may."""
        target = self.model.chunks[pu, chunk]
        assume(not target.random or not any(source[:2] == (pu, chunk) for source in sources))
        sector = min(self.g.sectors - 1, target.wp + skew)
        expected = self.model.copy(sources, pu, chunk, sector)
        addresses = [self.fast.ppa(p, 0, c, s) for p, c, s in sources]
        assert self.fast.copy(addresses, self.fast.ppa(pu, 0, chunk, sector)) == expected

    @rule(pu=st.integers(0, 1), chunk=st.integers(0, 2), sector=st.integers(0, 15), n=st.integers(1, 5))
    def write_anywhere(self, pu: int, chunk: int, sector: int, n: int) -> None:
        """Mostly refused, except by a random-write chunk."""
        payload = self._payload(n)
        expected = self.model.write(pu, chunk, sector, payload)
        data, oob = (b"".join(part) for part in zip(*payload, strict=True))
        assert self.fast.write(self.fast.ppa(pu, 0, chunk, sector), data, oob) == expected

    @rule(pu=st.integers(0, 1), chunk=st.integers(0, 2))
    def reset(self, pu: int, chunk: int) -> None:
        assert self.fast.reset(pu * self.g.chunks + chunk) == self.model.reset(pu, chunk)

    @rule(pu=st.integers(0, 1), chunk=st.integers(0, 2), what=st.sampled_from(["write", "reset"]))
    def arm(self, pu: int, chunk: int, what: str) -> None:
        self.fast.arm_fault(pu * self.g.chunks + chunk, what)
        setattr(self.model.chunks[pu, chunk], f"fail_{what}", True)

    @rule(pu=st.integers(0, 1), chunk=st.integers(0, 2), sector=st.integers(0, 15))
    def read(self, pu: int, chunk: int, sector: int) -> None:
        assert self.fast.read(self.fast.ppa(pu, 0, chunk, sector)) == self.model.read(pu, chunk, sector)

    @invariant()
    def chunk_table_agrees(self) -> None:
        for (pu, chunk), expected in self.model.chunks.items() if hasattr(self, "model") else ():
            entry = self.fast.chunks[pu * self.g.chunks + chunk]
            assert STATES[int(entry["state"])] == expected.state
            assert entry["pe_cycles"] == expected.pe_cycles
            if expected.state != "OFFLINE":
                assert entry["wp"] == expected.wp


TestMediaAgainstModel = MediaAgainstModel.TestCase
TestMediaAgainstModel.settings = settings(max_examples=120, stateful_step_count=60, deadline=None, print_blob=True)


@pytest.fixture
def media() -> Media:
    return Media(open_ram(validate(Geometry(**SMALL, mw_cunits=0))))


def sectors(n: int) -> bytes:
    return bytes(512 * n)


def test_ppa_packs_the_sector_below_the_chunk_index(media: Media) -> None:
    # chunk index = (group 1 * 1 pu + 0) * 3 chunks + chunk 2 = 5; 16 sectors take 4 bits
    assert media.ppa(1, 0, 2, 7) == (5 << 4) | 7


def test_address_outside_the_geometry_is_a_write_fault(media: Media) -> None:
    assert media.write(6 << 4, sectors(2)) == 0x280
    assert media.write(2**60, sectors(2)) == 0x280


def test_read_outside_the_geometry_is_unwritten(media: Media) -> None:
    assert media.read(2**60) == (0x287, None, None)


def test_reset_outside_the_geometry_is_invalid(media: Media) -> None:
    assert media.reset(6) == 0x2C1


def test_worn_out_chunk_goes_offline_at_its_limit(media: Media) -> None:
    media.chunks["pe_limit"][0] = 2
    assert media.write(0, sectors(2)) == 0
    assert media.reset(0) == 0
    assert media.chunks[0]["wear_index"] == 127
    assert media.write(0, sectors(2)) == 0
    assert media.reset(0) == 0x2C1
    assert media.chunks[0]["state"] == 8
    assert media.chunks[0]["wp"] == 0xFFFFFFFF


def test_random_chunk_is_written_anywhere_and_read_below_its_highest_write(media: Media) -> None:
    media.chunks["type"][0] = 2
    assert media.write(5, sectors(1)) == 0
    assert media.write(3, sectors(1)) == 0
    assert media.read(5)[0] == 0
    assert media.read(6)[0] == 0x287


def test_copy_moves_data_and_oob_and_obeys_the_write_rules(media: Media) -> None:
    assert media.write(0, b"\1" * 512 + b"\2" * 512, b"\3" * 32) == 0
    target = media.ppa(0, 0, 1)
    assert media.copy([1, 0], target) == 0
    assert media.read(target) == (0, b"\2" * 512, b"\3" * 16)
    assert media.copy([1], target + 2) == 0x002  # not a multiple of ws_min
    assert media.copy([9, 0], target + 2) == 0x287  # source not written
    assert media.copy([1, 0], target) == 0x2F2  # not at the write pointer
