"""The documents: every link leads somewhere, and README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)|src=\"([^\"]+)\"")


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as they are made on code hosts."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(file: Path) -> list[tuple[Path, str]]:
    """The files that a document links to, with their anchors."""
    found = LINK.findall(file.read_text())
    return [
        (file if not (path or picture) else file.parent / (path or picture), anchor)
        for path, anchor, picture in found
        if not path.startswith(("http:", "https:"))
    ]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target, anchor in links(file):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target.read_text()), (target, anchor)


def test_the_links_are_found() -> None:
    assert len(links(ROOT / "README.md")) > 15


def test_readme_is_short_and_shows_the_settings_that_matter_most() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 250
    section = text.partition("## Configuration")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| `", section, re.M)) == 10
