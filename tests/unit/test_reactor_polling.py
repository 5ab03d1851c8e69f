"""How long the reactor polls before it sleeps, by how long work had it wait before. Times in ns, 50 us at most."""

from __future__ import annotations

from ocssd_daemon._fast import poll_times_ns

POLL_US = 50
FULL = POLL_US * 1000


def polling(*waits_ns: int) -> list[int]:
    return poll_times_ns(POLL_US, waits_ns)


def test_work_that_comes_while_it_polls_keeps_it_polling() -> None:
    assert polling(*[30_000] * 1000) == [FULL] * 1000


def test_long_idle_times_stop_it_and_one_prompt_request_starts_it_again() -> None:
    idle = polling(*[10_000_000] * 20, 40_000)
    assert idle[19] == 0
    assert idle[20] == FULL


def test_work_that_always_comes_a_little_too_late_is_not_polled_for() -> None:
    """A guest that is emulated sends its next request 150 us after the last was done."""
    times = polling(*[150_000] * 20_000)
    assert sum(times[-10_000:]) < FULL * 10_000 // 50


def test_a_fast_client_after_a_slow_one_is_polled_for_soon() -> None:
    times = polling(*[150_000] * 5_000, *[30_000] * 2_000)
    assert times[-1] == FULL
    assert times[5_000:].index(FULL) <= 1024
