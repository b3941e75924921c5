"""`.env.example` and docs/configuration.md against the real settings: documentation that cannot go stale."""

from __future__ import annotations

import re

import pytest

from settings import Settings
from tests.configuration import ENTRIES, NGINX, PAGE, ROOT, page

OURS = [entry for entry in ENTRIES if entry["name"] not in NGINX]


def test_it_lists_exactly_the_settings_in_their_order() -> None:
    assert [entry["name"] for entry in OURS] == [name.upper() for name in Settings.model_fields]


def test_every_assignment_has_its_line_of_explanation() -> None:
    assignments = re.findall(r"^#?[A-Z_]+=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert len(assignments) == len(ENTRIES)


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry["name"])
def test_its_values_are_the_defaults(entry: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = entry["name"].lower()
    monkeypatch.setenv(entry["name"], entry["value"])
    assert getattr(Settings.from_environment(), name) == Settings.model_fields[name].default


def test_the_configuration_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"
