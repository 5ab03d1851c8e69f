"""Log lines: how they look, and that a peer cannot flood them. A counted clock instead of time."""

from __future__ import annotations

import logging

import pytest

from ocssd_daemon.log import PAIRS_REMEMBERED, RateLimit, Renderer, kv, per


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (kv("chunk.reset", pu=3, took_ms=1.25), "chunk.reset pu=3 took_ms=1.2"),
        (kv("peer.said", text="two words"), 'peer.said text="two words"'),
        (kv("peer.said", text='a"b\nc=d'), r'peer.said text="a\"b\nc=d"'),
        (kv("peer.said", text=""), 'peer.said text=""'),
    ],
)
def test_fields_are_quoted_when_they_need_it(message: str, line: str) -> None:
    assert message == line


def record(text: str = "x", peer: str = "p", reason: str = "r") -> logging.LogRecord:
    made = logging.LogRecord("ocssd", logging.WARNING, "", 0, text, (), None)
    made.__dict__.update(per(peer, reason))
    return made


def test_a_peers_line_is_written_once_and_the_others_are_counted() -> None:
    now = [0.0]
    limit = RateLimit(lambda: now[0])
    assert [limit.filter(record()) for _ in range(4)] == [True, False, False, False]
    assert limit.filter(record(reason="other"))
    now[0] = 5.0
    later = record("again")
    assert limit.filter(later)
    assert later.getMessage() == "again left_out=3"


def test_many_peers_take_bounded_memory() -> None:
    limit = RateLimit(lambda: 0.0)
    for number in range(2 * PAIRS_REMEMBERED):
        limit.filter(record(peer=str(number)))
    assert len(limit._seen) == PAIRS_REMEMBERED


def test_lines_nobody_can_provoke_are_never_held_back() -> None:
    limit = RateLimit(lambda: 0.0)
    plain = logging.LogRecord("ocssd", logging.INFO, "", 0, "x", (), None)
    assert all(limit.filter(plain) for _ in range(3))


def test_the_journal_gets_a_priority_and_no_time() -> None:
    assert Renderer(journal=True).format(record("ready")) == "<4>ready"
    assert Renderer(journal=False).format(record("ready")).endswith(" warning ready")
