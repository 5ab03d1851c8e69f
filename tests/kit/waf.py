"""Closed forms of write amplification under uniform random writes, at the effective over-provisioning.

Desnoyers (SYSTOR 2012, ToS 2014): greedy cleaning with erase units of *n* pages; random victims: a / (a - 1). A drive
with few large lines works with less spare space than its capacity says: free lines in reserve, and open lines that are
on average half full, hold no garbage that could be collected.
"""

from __future__ import annotations

from math import exp


def lambert_w(x: float) -> float:
    """Principal branch, for -1/e < x < 0."""
    w = -0.3
    for _ in range(200):
        e = exp(w)
        w -= (w * e - x) / (e * (w + 1) - (w + 2) * (w * e - x) / (2 * w + 2))
    return w


def effective(a: float, lines: int, reserve: float, frontiers: int) -> float:
    """Physical / user space without what lies in free and open lines."""
    return a * (1 - (reserve + frontiers / 2) / lines)


def greedy(a: float, n: int) -> float:
    k = 1 + 1 / (2 * n)
    x0 = 0.5 - (n / a) * lambert_w(-k * a * exp(-k * a))
    return n / (n - (x0 - 1))


def random_victim(a: float) -> float:
    return a / (a - 1)
