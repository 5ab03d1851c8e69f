"""Owns one decision: is a program or condition that a test needs there, and if not, skip or fail?

With ``OCSSD_REQUIRE_ALL=1`` a missing requirement is a failure, so that a green run means that every test
ran.
"""

from __future__ import annotations

import os
import shutil

import pytest


def missing(what: str, install: str) -> None:
    """Skip the running test with one line that says what to install; under OCSSD_REQUIRE_ALL=1, fail."""
    line = f"needs {what}: {install}"
    if os.environ.get("OCSSD_REQUIRE_ALL") == "1":
        pytest.fail(line, pytrace=False)
    pytest.skip(line)


def requires(program: str, package: str) -> str:
    """Path of *program*, or skip (fail under OCSSD_REQUIRE_ALL=1) saying which Debian *package* has it."""
    path = shutil.which(program)
    if path is None:
        missing(program, f"apt-get install {package}")
        raise AssertionError("unreachable")
    return path
