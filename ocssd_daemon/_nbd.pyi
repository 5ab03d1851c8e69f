from collections.abc import Iterable
from typing import Literal

from ocssd_daemon._fast import Disk, Reactor

Mode = Literal["simple", "structured", "extended"]

CONTEXTS: dict[str, int]
ENDS: dict[int, str]

class NbdStats:
    def as_dict(self) -> dict[str, int]: ...

class NbdConnection:
    def __init__(
        self,
        reactor: Reactor,
        disk: Disk,
        stats: NbdStats,
        fd: int,
        token: int,
        *,
        flags: int,
        structured: bool = False,
        extended: bool = False,
        context_ids: Iterable[int] = (),
        leftover: bytes = b"",
        max_payload_bytes: int = ...,
    ) -> None: ...
    def start(self) -> None: ...
    def shutdown(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def idle(self) -> bool: ...
    @property
    def buffered_bytes(self) -> int: ...

def decode_request(data: bytes, mode: Mode) -> dict[str, int] | None: ...
def encode_simple(cookie: int, error: int) -> bytes: ...
def encode_chunk(
    mode: Mode, cookie: int, offset_bytes: int, flags: int, type: int, length_bytes: int
) -> bytes: ...
