"""Writes docs/configuration.md from settings.py and .env.example: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from settings import Settings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/configuration.md"
_ENTRY = re.compile(r"^# (?P<text>.+)\n#(?P<name>[A-Z][A-Z_]*)=(?P<value>.*)$", re.MULTILINE)
ENTRIES = [match.groupdict() for match in _ENTRY.finditer((ROOT / ".env.example").read_text())]
NGINX = {"LOGIN_RATE", "API_RATE"}
_INTRODUCTION = """# Configuration

<!-- Written by `make docs` from settings.py and .env.example. -->

Settings are environment variables, or lines in `.env` (copy `.env.example`); `make` and `docker compose` read it, and a
variable of the environment wins over it. Lists are comma-separated. `DATABASE_URL`, `REDIS_URL` and `ADMIN_PASSWORD`
may come from files instead, as Docker and systemd hand secrets over: `ADMIN_PASSWORD_FILE=/run/secrets/admin_password`.

All of them are checked in the first second. A wrong one stops the start with one line that names the variable, the
problem and an example, and never the value of a secret; a name that nearly matches a setting (`MODLE`) is a warning.
"""


def page() -> str:
    """The whole text of docs/configuration.md."""
    ours = [entry for entry in ENTRIES if entry["name"] not in NGINX]
    theirs = [entry for entry in ENTRIES if entry["name"] in NGINX]
    return "\n".join(
        [
            _INTRODUCTION,
            *_table(ours),
            "\nThe rates of nginx, for `docker compose` and `make stack`:\n",
            *_table(theirs),
            "",
        ]
    )


def _table(entries: list[dict[str, str]]) -> list[str]:
    return ["| Setting | Default | What it is | Example |", "| --- | --- | --- | --- |", *map(_row, entries)]


def _row(entry: dict[str, str]) -> str:
    field = Settings.model_fields.get(entry["name"].lower())
    example = f"`{field.examples[0]}`" if field and field.examples else ""
    default = f"`{entry['value']}`" if entry["value"] else ""
    return f"| `{entry['name']}` | {default} | {entry['text']} | {example} |"


if __name__ == "__main__":
    PAGE.write_text(page())
