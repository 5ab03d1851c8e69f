"""Owns what a run can be told: how long, how often, how large, where. Knows no case."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """One run of the bench; *directory* is private to it and holds sockets only."""

    directory: Path
    rounds: int = 3
    seconds: float = 1.5
    size: str = "4G"

    def say(self, text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)
