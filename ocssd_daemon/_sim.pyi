from typing import Any

import numpy as np
import numpy.typing as npt

from ocssd_daemon._fast import Disk

OPS: dict[str, int]
PATTERNS: dict[str, int]

class Workload:
    def __init__(
        self,
        pattern: str,
        span: int,
        reads: float = 0.0,
        skew: float = 1.0,
        hot: float = 0.2,
        heat: float = 0.8,
        seed: int = 1,
    ) -> None: ...
    def sample(self, n: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]: ...

class Host:
    disk: Disk
    now_ns: int
    ios: int
    def __init__(self, disk: Disk, depth: int = 32) -> None: ...
    def record(self) -> None: ...
    def run(self, workload: Workload, ios: int) -> int: ...
    def replay(
        self,
        at_ns: npt.NDArray[np.uint64],
        ops: npt.NDArray[np.uint8],
        lbas: npt.NDArray[np.uint32],
        sectors: npt.NDArray[np.uint32],
        open_loop: bool = True,
    ) -> int: ...
    def latency(self, op: str) -> dict[str, Any] | None: ...
