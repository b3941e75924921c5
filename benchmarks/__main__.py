"""`make bench`: every row, a command each; then the goals beside what was measured.

    python -m benchmarks [ROW ...] [--fresh]

docs/benchmarks.md and README's table change only when all rows were asked for. A row that fails stops no other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import goals, peers, record, table
from benchmarks.record import HERE
from benchmarks.worker import ROOT

ROWS = {
    "decode": "The bare step",
    "http": "Over HTTP",
    "ttft": "Time to the first token",
    "cache": "Cached answers",
    "start": "A warm start",
    "growth": "How cost grows",
    "shared_core": "Beside busy processes",
    "speculation": "Guesses",
    "quality": "Quality",
}


def output(row: str, fresh: bool) -> str:
    """What a row's command prints; one line where it fails."""
    command = [sys.executable, "-m", f"benchmarks.{row}", *(["--fresh"] if fresh else [])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"failed with exit status {done.returncode}"


def records() -> dict[str, Mapping[str, Any]]:
    """What each row keeps in benchmarks/."""
    return {row: kept for row in ROWS if (kept := record.read(HERE / f"{row}.json"))}


def intro(records: goals.Records) -> str:
    """The machine, the versions measured, and when."""
    versions = {name: facts["version"] for kept in records.values() for name, facts in kept["facts"].items()
                if isinstance(facts, dict) and "version" in facts}  # fmt: skip
    said = [f"{name} {version}" for name, version in versions.items()]
    when = sorted({f"{kept['date']} at commit {kept['commit']}" for kept in records.values()})
    return f"{record.machine()}; {'; '.join(said)}. Measured {', '.join(when)}."


def report(records: goals.Records, printed: dict[str, str]) -> str:
    """The goals, then each row's own table. printed: what the rows' commands said."""
    tables = [f"**{ROWS[row]}** (`python -m benchmarks.{row}`): {text}" for row, text in printed.items()]
    return "\n\n".join([intro(records), goals.shown(records), *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--fresh", action="store_true", help="measure again what earlier calls kept")
    chosen = parser.parse_args()
    if unknown := set(chosen.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}")
    peers.install()
    printed = {row: output(row, chosen.fresh) for row in chosen.rows or ROWS}
    measured = records()
    text = report(measured, printed)
    print(text)
    if not chosen.rows:
        table.replace_block(ROOT / "docs/benchmarks.md", text)
        table.replace_block(ROOT / "README.md", f"{intro(measured)}\n\n{goals.shown(measured, goals.HEADLINES)}")


if __name__ == "__main__":
    main()
