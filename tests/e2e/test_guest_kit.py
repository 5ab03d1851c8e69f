"""The guest runner itself: what it tells of a job that fails, of one that hangs, and that nothing stays behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kit import guest as kit
from tests.kit.guest import Guest, GuestFailure, run_guest


def test_a_failed_command_ends_the_job_and_is_named_with_its_words() -> None:
    with pytest.raises(GuestFailure, match=r"(?s)the job failed.*cat: can't open '/absent'.*rc=1"):
        run_guest("echo before; cat /absent; echo after")


def test_a_job_that_hangs_is_a_failure_in_time_and_its_qemu_is_gone() -> None:
    with Guest("echo hanging; sleep 1000") as guest:
        guest.wait_for("hanging")
        with pytest.raises(GuestFailure, match=r"(?s)did not say 'GUEST-DONE rc=' within 2 s.*hanging"):
            guest.finish(timeout_s=2)
        pid = guest.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_qemu_that_refuses_its_arguments_is_a_failure_with_its_words() -> None:
    with pytest.raises(GuestFailure, match="no-such-device"):
        run_guest("true", ["-device", "no-such-device"])


def test_a_named_guest_comes_first_and_where_there_is_none_one_is_made_from_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bzImage", "initrd.gz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("OCSSD_GUEST_DIR", str(tmp_path))
    assert kit.any_guest.__wrapped__().kernel == tmp_path / "bzImage"
    monkeypatch.setattr(kit, "_ready_directories", lambda: [tmp_path / "absent"])
    assert kit.any_guest.__wrapped__() == kit.stock_guest()
