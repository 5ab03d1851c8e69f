"""Write amplification of the daemon's own FTL against closed forms and against an independent simulation."""

from __future__ import annotations

from typing import Any

import pytest

from ocssd_daemon import settings as sets
from ocssd_daemon.sim import run, workloads
from tests.kit import waf

LINES = 256
LINE_SECTORS = 2048  # 4 PUs x 512
TWO_PERCENT = 0.02


def outcome(workload: str, overwrites: float, warmup: float, **assignments: object) -> dict[str, Any]:
    texts = [f"{key.replace('__', '.')}={value}" for key, value in assignments.items()]
    settings = sets.build(sets.from_assignments(texts))
    plan = run.Plan(workload=workloads.parse(workload), overwrites=overwrites, warmup=warmup)
    return run.simulate(settings, plan)


def few_large_lines(workload: str = "randwrite", **assignments: object) -> dict[str, Any]:
    shape = {"geometry__groups": 1, "geometry__pus": 4, "geometry__chunks": LINES, "geometry__sectors": 512}
    return outcome(workload, 6, 6, **shape, **assignments)


def many_small_lines(op: float, victim: str, d: int) -> float:
    """2048 lines of 128 sectors, one frontier, four free lines: the set-up of the independent simulation."""
    done = outcome(
        "randwrite",
        8,
        12,
        geometry__groups=1,
        geometry__pus=2,
        geometry__chunks=2048,
        geometry__sectors=64,
        geometry__mw_cunits=0,
        ftl__op=op,
        ftl__frontiers=1,
        ftl__reserve_lines=4,
        ftl__victim=victim,
        ftl__d_choices=d,
        ftl__wear_spread=0,
    )
    return float(done["waf"])


def closed_form(done: dict[str, Any], frontiers: int) -> float:
    a = LINES * LINE_SECTORS / done["capacity_sectors"]
    return waf.greedy(waf.effective(a, LINES, 2, frontiers), LINE_SECTORS)


@pytest.mark.slow
@pytest.mark.parametrize("op", [0.11, 0.20, 0.28, 0.50])
@pytest.mark.parametrize("frontiers", [1, 2])
def test_greedy_under_uniform_writes_agrees_with_the_closed_form(op: float, frontiers: int) -> None:
    done = few_large_lines(ftl__op=op, ftl__victim="greedy", ftl__frontiers=frontiers)
    assert done["waf"] == pytest.approx(closed_form(done, frontiers), rel=TWO_PERCENT)


# An independent C program, same set-up: policy, d, then WAF at OP 0.11, 0.28, 0.50.
INDEPENDENT = [
    ("greedy", 1, (5.119, 2.458, 1.704)),
    ("d-choices", 8, (5.352, 2.549, 1.758)),
    ("d-choices", 4, (5.827, 2.744, 1.878)),
    ("d-choices", 2, (7.152, 3.289, 2.217)),
    ("random", 1, (10.250, 4.599, 3.004)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "d", "expected"), INDEPENDENT)
def test_policies_agree_with_an_independent_simulation(
    victim: str, d: int, expected: tuple[float, ...]
) -> None:
    measured = [many_small_lines(op, victim, d) for op in (0.11, 0.28, 0.50)]
    assert measured == [pytest.approx(value, rel=TWO_PERCENT) for value in expected]


@pytest.mark.slow
@pytest.mark.parametrize("op", [0.11, 0.28])
def test_random_victims_agree_with_a_over_a_minus_one(op: float) -> None:
    a = waf.effective(1 + op, 2048, 4, 1)
    assert many_small_lines(op, "random", 1) == pytest.approx(waf.random_victim(a), rel=TWO_PERCENT)


SKEW = "hotcold:0.05/0.95"
SKEWED = {"geometry__groups": 1, "geometry__pus": 4, "geometry__chunks": LINES, "geometry__sectors": 256}


def skewed(overwrites: float, warmup: float, **assignments: object) -> float:
    return float(outcome(SKEW, overwrites, warmup, **{**SKEWED, **assignments})["waf"])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [64, 256, 1024])
@pytest.mark.parametrize("op", [0.11, 0.28])
def test_under_skew_the_default_policy_beats_plain_greedy_by_a_quarter(op: float, chunks: int) -> None:
    shape = {"geometry__chunks": chunks, "geometry__sectors": 65536 // chunks, "ftl__op": op}
    plain = skewed(6, 20, **shape, ftl__victim="greedy", ftl__frontiers=1)
    assert skewed(6, 20, **shape) <= 0.75 * plain


@pytest.mark.slow
@pytest.mark.parametrize("op", [0.11, 0.28])
def test_under_skew_cost_benefit_does_so_too(op: float) -> None:
    plain = skewed(6, 20, ftl__op=op, ftl__victim="greedy", ftl__frontiers=1)
    assert skewed(6, 20, ftl__op=op, ftl__victim="cost-benefit") <= 0.75 * plain


def test_a_quick_run_under_skew_shows_what_settling_is_for() -> None:
    shape = {"geometry__sectors": 64, "ftl__op": 0.28}
    plain = skewed(3, 5, **shape, ftl__victim="greedy", ftl__frontiers=1)
    assert skewed(3, 5, **shape) <= 0.6 * plain
    assert skewed(3, 5, **shape, ftl__settle=0) > 0.6 * plain


def test_settling_changes_nothing_under_uniform_writes_and_with_one_frontier() -> None:
    shape = {**SKEWED, "geometry__chunks": 128, "geometry__sectors": 64, "ftl__op": 0.28}

    def counts(workload: str, **assignments: object) -> int:
        return int(outcome(workload, 2, 2, **{**shape, **assignments})["gc_sectors_moved"])

    assert counts("randwrite") == counts("randwrite", ftl__settle=0)
    assert counts(SKEW, ftl__frontiers=1) == counts(SKEW, ftl__frontiers=1, ftl__settle=0)
    assert counts(SKEW) < counts(SKEW, ftl__settle=0)


def test_a_quick_run_is_within_five_percent_of_the_closed_form() -> None:
    done = outcome(
        "randwrite",
        3,
        3,
        geometry__groups=1,
        geometry__pus=4,
        geometry__chunks=LINES,
        geometry__sectors=128,
        ftl__op=0.28,
        ftl__victim="greedy",
        ftl__frontiers=1,
    )
    n = LINE_SECTORS // 4
    a = waf.effective(LINES * n / done["capacity_sectors"], LINES, 2, 1)
    assert done["waf"] == pytest.approx(waf.greedy(a, n), rel=0.05)


@pytest.mark.parametrize(
    ("op", "n", "expected"), [(0.11, 256, 5.126), (0.20, 128, 3.119), (0.28, 32, 2.328), (0.50, 1024, 1.714)]
)
def test_the_closed_form_gives_the_published_values(op: float, n: int, expected: float) -> None:
    assert waf.greedy(1 + op, n) == pytest.approx(expected, abs=0.001)
