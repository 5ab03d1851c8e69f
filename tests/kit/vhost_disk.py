"""Owns reads and writes through a started front end's ring, as a guest's block driver does them, over the real wire."""

from __future__ import annotations

import trio

from tests.kit.blk_driver import IN, OK, OUT, Request, lay_out
from tests.kit.vhost_frontend import Frontend
from tests.kit.virtqueue import Packed, Split

REPLY_S = 10.0


async def completed(queue: Split | Packed) -> list[int]:
    """Sleep until the device has completed something; the heads, in order."""
    with trio.fail_after(REPLY_S):
        while True:
            queue.want_calls(True)
            if done := queue.completed():
                return [head for head, _ in done]
            await trio.lowlevel.wait_readable(queue.call_fd)
            queue.calls()


async def run(frontend: Frontend, request: Request, ring: int = 0) -> int:
    """Submit a request, kick, sleep until the call, and return its status."""
    queue = frontend.rings[ring]
    head = queue.submit(request.chain)
    queue.kick()
    assert await completed(queue) == [head]
    return request.status


async def write(frontend: Frontend, sector: int, data: bytes, ring: int = 0) -> None:
    assert await run(frontend, lay_out(frontend.memory, OUT, sector, out=data), ring) == OK


async def read(frontend: Frontend, sector: int, size: int, ring: int = 0) -> bytes:
    request = lay_out(frontend.memory, IN, sector, in_size=size)
    assert await run(frontend, request, ring) == OK
    return request.data
