"""Owns how the bench runs other programs: compile a C client, run it for a result, start and end a server.

A peer is ready when its socket exists (ours says so itself, see ``daemon``); it is ended by its own pid.
Knows no case and no goal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", HERE.parent / ".cache")) / "ocssd-bench"
CFLAGS = ("-O2", "-Wall", "-Wextra", "-std=gnu11")

Result = dict[str, Any]


class Unavailable(Exception):
    """A program that a measurement needs is not there; the text says what to install."""


def find(program: str, package: str) -> str:
    """Path of *program*; raises Unavailable naming the Debian *package*."""
    path = shutil.which(program)
    if path is None:
        raise Unavailable(f"needs {program}: apt-get install {package}")
    return path


def compiled(name: str) -> str:
    """Path of the C program bench/*name*.c, compiled unless the cache has it from the same sources."""
    compiler = find("gcc", "gcc")
    sources = [HERE / f"{name}.c", HERE / "common.h"]
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + repr((CFLAGS, platform.machine())).encode())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *CFLAGS, "-o", scratch, sources[0]], check=True)
        scratch.replace(target)
    return str(target)


def run_json(command: Sequence[str], timeout_s: float = 900) -> Result:
    """Run *command* and return the JSON object that ends its output; a failure raises with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    result: Result = json.loads(done.stdout[done.stdout.index("{") :])
    return result


def options(**values: object) -> list[str]:
    """``block_bytes=4096`` → ``["--block-bytes", "4096"]``; None leaves the option out."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None)
    return [word for pair in pairs for word in pair]


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.is_socket():
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r}: no socket {path}")
        time.sleep(0.005)


def end(process: subprocess.Popen[bytes], timeout_s: float = 20) -> None:
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server(command: Sequence[str], socket: Path, **popen: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A peer server, ready on *socket*; ended when the block is left."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **popen)
    try:
        wait_for_socket(socket, process)
        yield process
    finally:
        end(process)
        socket.unlink(missing_ok=True)


def cpu_seconds(pid: int) -> float:
    """CPU time that process *pid* has used in all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
