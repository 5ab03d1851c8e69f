"""The documentation agrees with the source: made pages are fresh, links lead somewhere, paths that are named exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.reference_docs import DOCS, PAGES

ROOT = DOCS.parent
MARKDOWN = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_a_made_page_is_what_the_source_says(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run: python -m tools.reference_docs"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: p.name)
def test_source_paths_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:ocssd_daemon|tools|systemd|docs)/[\w./@-]+)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and page.name not in index] == []


def test_architecture_stays_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
