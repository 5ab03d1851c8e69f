"""Owns running a piece of code one machine instruction at a time in a process of its own.

What other processes share with it (guest memory, an in-flight region) can be looked at after every instruction: that
is all that a SIGKILL at that moment would leave behind. For x86-64: on machines with load-linked loops a single step
breaks them.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator

PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _child(prepare: Callable[[], Callable[[], object]]) -> None:
    ok = False
    try:
        run = prepare()
        _ptrace(PTRACE_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        run()
        ok = True
    finally:
        os._exit(0 if ok else 1)


def single_steps(prepare: Callable[[], Callable[[], object]], most: int = 2_000_000) -> Iterator[None]:
    """Fork; let the child call *prepare* at full speed; then step through what it returned, yielding after each step.

    Raises when the child fails. A generator that is closed early kills the child.
    """
    pid = os.fork()
    if pid == 0:
        _child(prepare)
    status = os.waitpid(pid, 0)[1]
    try:
        for _ in range(most):
            if not os.WIFSTOPPED(status):
                break
            _ptrace(PTRACE_SINGLESTEP, pid)
            status = os.waitpid(pid, 0)[1]
            yield
        assert not os.WIFSTOPPED(status), f"more than {most} instructions"
        assert os.waitstatus_to_exitcode(status) == 0, status
    finally:
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
