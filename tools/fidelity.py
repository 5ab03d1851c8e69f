"""``python -m tools.fidelity``: the table of write amplification in docs/fidelity.md, measured again."""

from __future__ import annotations

from typing import Any

from ocssd_daemon import settings as sets
from ocssd_daemon.sim import run, workloads
from tests.kit import waf

LINES, LINE_SECTORS = 256, 2048
FEW = {"geometry.groups": 1, "geometry.pus": 4, "geometry.chunks": LINES, "geometry.sectors": 512}
MANY = {"geometry.groups": 1, "geometry.pus": 2, "geometry.chunks": 2048, "geometry.sectors": 64,
        "geometry.mw_cunits": 0, "ftl.frontiers": 1, "ftl.reserve_lines": 4, "ftl.wear_spread": 0}  # fmt: skip
INDEPENDENT = {
    ("greedy", 1): (5.119, 2.458, 1.704),
    ("d-choices", 8): (5.352, 2.549, 1.758),
    ("d-choices", 4): (5.827, 2.744, 1.878),
    ("d-choices", 2): (7.152, 3.289, 2.217),
    ("random", 1): (10.250, 4.599, 3.004),
}


def measured(workload: str, overwrites: float, warmup: float, values: dict[str, Any]) -> dict[str, Any]:
    layer = {key: sets.Given(value, "fidelity") for key, value in values.items()}
    plan = run.Plan(workload=workloads.parse(workload), overwrites=overwrites, warmup=warmup)
    return run.simulate(sets.build(layer), plan)


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |",
        flush=True,
    )


def percent(value: float, expected: float) -> str:
    return f"{100 * (value / expected - 1):+.1f} %"


def few_large_lines() -> None:
    print("\n| OP | frontiers | measured | closed form | difference |\n|---|---|---|---|---|")
    for op in (0.11, 0.20, 0.28, 0.50):
        for frontiers in (1, 2):
            done = measured(
                "randwrite", 6, 6, {**FEW, "ftl.op": op, "ftl.victim": "greedy", "ftl.frontiers": frontiers}
            )
            a = LINES * LINE_SECTORS / done["capacity_sectors"]
            expected = waf.greedy(waf.effective(a, LINES, 2, frontiers), LINE_SECTORS)
            row(op, frontiers, done["waf"], expected, percent(done["waf"], expected))


def policies() -> None:
    print("\n| victim | OP | measured | independent simulation | difference |\n|---|---|---|---|---|")
    for (victim, d), values in INDEPENDENT.items():
        for op, expected in zip((0.11, 0.28, 0.50), values, strict=True):
            done = measured(
                "randwrite", 8, 12, {**MANY, "ftl.op": op, "ftl.victim": victim, "ftl.d_choices": d}
            )
            name = f"{victim} d={d}" if victim == "d-choices" else victim
            row(name, op, done["waf"], expected, percent(done["waf"], expected))


def skew() -> None:
    print("\n| workload | OP | greedy, one frontier | default | ratio | without settling | cost-benefit |")
    print("|---|---|---|---|---|---|---|")
    shape = {**FEW, "geometry.sectors": 256}
    for workload in ("hotcold:0.05/0.95", "hotcold:0.1/0.9", "hotcold:0.2/0.8", "zipf:1.1"):
        for op in (0.11, 0.28):

            def waf_of(op: float = op, workload: str = workload, **more: Any) -> float:
                values = {**shape, "ftl.op": op, **{f"ftl.{key}": value for key, value in more.items()}}
                return float(measured(workload, 6, 20, values)["waf"])

            plain, default = waf_of(victim="greedy", frontiers=1), waf_of()
            row(workload, op, plain, default, default / plain, waf_of(settle=0.0), waf_of(victim="cost-benefit"))


if __name__ == "__main__":
    few_large_lines()
    policies()
    skew()
