"""`.env.example` and README's table against the real settings: documentation that cannot go stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from settings import Settings

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^# (?P<text>.+)\n#(?P<name>[A-Z][A-Z_]*)=(?P<value>.*)$", re.MULTILINE)
ENTRIES = [match.groupdict() for match in ENTRY.finditer((ROOT / ".env.example").read_text())]


def test_it_lists_exactly_the_settings_in_their_order() -> None:
    assert [entry["name"] for entry in ENTRIES] == [name.upper() for name in Settings.model_fields]


def test_every_assignment_has_its_line_of_explanation() -> None:
    assignments = re.findall(r"^#?[A-Z_]+=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert len(assignments) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_its_values_are_the_defaults(entry: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = entry["name"].lower()
    monkeypatch.setenv(entry["name"], entry["value"])
    assert getattr(Settings.from_environment(), name) == Settings.model_fields[name].default


def test_the_readme_has_the_same_table() -> None:
    rows = [f"| `{e['name']}` | {f'`{value}`' if (value := e['value']) else ''} | {e['text']} |" for e in ENTRIES]
    assert "\n".join(rows) in (ROOT / "README.md").read_text()
