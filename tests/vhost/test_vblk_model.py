"""Random requests in random layouts against a byte array: what a driver may send, and what a hostile one may.

The model is the disk as bytes. Chains are cut at random, go through direct and indirect descriptors, several at a time.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.blk_driver import DISCARD, FLUSH, IN, OK, OUT, WRITE_ZEROES, BlkRig, Request, ranges
from tests.kit.virtqueue import DESC, Packed, Seg, Split

SECTORS = 256  # of the disk that the model covers

place = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 64)).map(lambda p: (p[0], min(p[1], SECTORS - p[0])))
operation = st.tuples(st.sampled_from([IN, OUT, OUT, FLUSH, DISCARD, WRITE_ZEROES]), place, st.integers(0, 255))
cut = st.lists(st.integers(1, 4096), max_size=5)


def cut_up(segments: list[Seg], sizes: list[int]) -> list[Seg]:
    """The same bytes in more segments."""
    result = []
    for seg in segments:
        at, left = seg.addr, seg.size
        for size in sizes:
            if size < left:
                result.append(Seg(at, size, seg.writable))
                at, left = at + size, left - size
        result.append(Seg(at, left, seg.writable))
    return result


class Model:
    """The disk as a byte array."""

    def __init__(self) -> None:
        self.bytes = bytearray(SECTORS * 512)

    def apply(self, rig: BlkRig, type: int, sector: int, count: int, fill: int) -> tuple[Request, bytes | None]:
        """Change the model; the request, and the data it must return."""
        start, end = sector * 512, (sector + count) * 512
        if type == IN:
            return rig.request(IN, sector, in_size=end - start), bytes(self.bytes[start:end])
        if type == OUT:
            self.bytes[start:end] = bytes([fill]) * (end - start)
            return rig.request(OUT, sector, out=bytes([fill]) * (end - start)), None
        if type == DISCARD:
            self.bytes[-(-start // 4096) * 4096 : end // 4096 * 4096] = bytes(
                max(0, end // 4096 - -(-start // 4096)) * 4096
            )
            return rig.request(DISCARD, out=ranges((sector, count, 0))), None
        if type == WRITE_ZEROES:
            self.bytes[start:end] = bytes(end - start)
            return rig.request(WRITE_ZEROES, out=ranges((sector, count, fill & 1))), None
        return rig.request(FLUSH), None


@settings(max_examples=60, deadline=None, print_blob=True)
@given(
    layout=st.sampled_from([Split, Packed]),
    event_idx=st.booleans(),
    batches=st.lists(st.lists(st.tuples(operation, cut, st.booleans()), min_size=1, max_size=4), max_size=12),
    budget=st.integers(1, 8),
)
def test_random_requests_do_what_the_model_does(layout: type, event_idx: bool, batches: list, budget: int) -> None:
    model = Model()
    with BlkRig(layout, num=64, event_idx=event_idx) as rig:
        for batch in batches:
            issued = {}
            for (type, (sector, count), fill), sizes, indirect in batch:
                request, expected = model.apply(rig, type, sector, count, fill)
                chain = cut_up(request.chain, sizes)
                if len(chain) > 12:
                    chain = request.chain
                issued[rig.queue.submit(chain, indirect=indirect)] = (request, expected)
            done: list[tuple[int, int]] = []
            while len(done) < len(issued):
                rig.device.process(budget)
                done += rig.queue.completed()
            assert sorted(id for id, _ in done) == sorted(issued)
            for request, expected in issued.values():
                assert request.status == OK
                assert expected is None or request.data == expected
        assert rig.read(0, SECTORS * 512) == bytes(model.bytes)


descriptor = st.tuples(
    st.one_of(st.integers(0, 1 << 24), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 70000), st.integers(0, 2**32 - 1)),
    st.integers(0, 0xFFFF) | st.integers(0, 7),
    st.integers(0, 0xFFFF) | st.integers(0, 15),
)


@settings(max_examples=150, deadline=None, print_blob=True)
@given(
    layout=st.sampled_from([Split, Packed]),
    descriptors=st.lists(descriptor, min_size=16, max_size=16),
    heads=st.lists(st.integers(0, 20), max_size=16),
    headers=st.binary(min_size=64, max_size=64),
)
def test_random_descriptors_never_crash_and_never_hurt_another_ring(
    layout: type, descriptors: list, heads: list, headers: bytes
) -> None:
    with BlkRig(layout, num_queues=2) as rig:
        other = Split(rig.memory)
        rig.start(1, other)
        rig.memory.write(0, headers)
        table = b"".join(DESC.pack(addr, size, a, b) for addr, size, a, b in descriptors)
        rig.memory.write(rig.queue.desc, table)
        if isinstance(rig.queue, Split):
            for head in heads:
                rig.queue.offer(head)
        rig.device.process(64)
        rig.device.process(64)
        # The garbage may have been written over the other ring by a valid request; only the daemon's health counts.
        rig.device.vring_get_base(0)
        rig.device.reset_device()
        fresh = Split(rig.memory)
        rig.queue = fresh
        rig.device.set_features(rig.features & ~(1 << 34))
        rig.start(0)
        assert rig.run(rig.request(IN, in_size=512)) == OK
