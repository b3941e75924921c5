"""What a row measured, kept in benchmarks/NAME.json turn by turn, so that an interrupted row goes on where it was.

Kept figures serve only as long as machine, options and the measured code are the same: nothing stale is mixed in.
Makes no table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from benchmarks.worker import ROOT
from settings import Settings

HERE = ROOT / "benchmarks"
MEASURED = (
    "model",
    "api",
    "accounts",
    "audit",
    "cache",
    "quotas",
    "app.py",
    "crypto.py",
    "db.py",
    "settings.py",
    "telemetry.py",
    "gunicorn.conf.py",
)
MEASURING = ("engines", "ours", "llama", "load", "servers")  # besides the row itself
SOURCES = {".py", ".cpp", ".h"}
BUSY = 20.0  # percent of all cores that others may use before it is said
NOT_FIGURES = {"fresh", "limit", "rounds", "patience", "only"}  # options that change no single figure


class OutOfTime(Exception):
    """The row's time is used up between two turns."""


@dataclass(slots=True)
class Record:
    """One row's figures: turns[name] is a list, a value a round. facts: versions and what else is worth saying."""

    file: Path
    identity: dict[str, Any]
    turns: dict[str, list[Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    end: float = float("inf")

    @classmethod
    def open(cls, row: str, options: argparse.Namespace, folder: Path = HERE) -> Record:
        """Go on with what an earlier call of the same row kept, or begin anew."""
        figures = {name: value for name, value in vars(options).items() if name not in NOT_FIGURES}
        identity = {"machine": machine(), "options": figures, "code": code(row)}
        record = cls(folder / f"{row}.json", json.loads(json.dumps(identity)), end=time.monotonic() + options.limit)
        if not options.fresh and (kept := read(record.file)) and kept["identity"] == record.identity:
            record.turns, record.facts = kept["turns"], kept["facts"]
        return record

    def turn(self, name: str, number: int, measure: Callable[[], Any]) -> Any:
        """Round `number` of `name`: kept, or measured now and kept. Raises OutOfTime instead of beginning late."""
        done = self.turns.setdefault(name, [])
        if len(done) <= number:
            if time.monotonic() > self.end:
                raise OutOfTime
            done.append(measure())
            self.save()
        return done[number]

    def has(self, names: list[str], rounds: int) -> bool:
        """Whether nothing is left to measure, so that no server need be started."""
        return all(len(self.turns.get(name, ())) >= rounds for name in names)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Measure inside; when the time is used up, what was measured so far stands and the rest is said to miss.

        SIGTERM ends it as Ctrl-C does: whatever was started is stopped too.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if (busy := psutil.cpu_percent(0.5)) > BUSY:
            print(
                f"The processor is {busy:.0f} % busy with something else: these figures will tell little.",
                file=sys.stderr,
            )
        try:
            yield
        except OutOfTime:
            print("The time is up (--limit): run the same command again to go on from here.", file=sys.stderr)

    def save(self) -> None:
        """Whole or not at all."""
        made = {"date": date.today().isoformat(), "commit": commit(), "identity": self.identity, "facts": self.facts,
                "turns": self.turns}  # fmt: skip
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(made, indent=1) + "\n")
        os.replace(part, self.file)


def options(doc: str, *, rounds: int, minutes: float) -> argparse.ArgumentParser:
    """The options that every row has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each, in the order A B A B")
    parser.add_argument("--limit", type=float, default=minutes * 60, help="seconds after which no new turn begins")
    parser.add_argument("--patience", type=float, default=900, help="seconds to wait for the next compiled step")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier call kept")
    return parser


def run(
    row: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[Record, Settings, argparse.Namespace], None],
    told: Callable[[Record, argparse.Namespace], tuple[str, str]],
) -> None:
    """A row's command: measure what is not kept yet, then print the machine, `told`'s circumstances and its table."""
    chosen = parser.parse_args()
    kept = Record.open(row, chosen)
    with kept.bounded():
        measure(kept, Settings.from_environment(), chosen)
    circumstances, figures = told(kept, chosen)
    print(f"{machine()}; {circumstances}\n\n{figures}")


def read(file: Path) -> dict[str, Any] | None:
    """A kept record; None where there is none, or none that can be read."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept if {"date", "commit", "identity", "facts", "turns"} <= kept.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def machine() -> str:
    """What it runs on: cores, the instructions that matter here, the processor's name."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if kind in flags]
    name = fields.get("model name", platform.machine())
    return f"{psutil.cpu_count()} cores of {name} ({', '.join(kinds)}), {platform.system()}"


def commit() -> str:
    """The commit that is checked out, `?` outside a checkout; what is not committed is not told."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "?"


def code(row: str) -> str:
    """A digest of what is measured and of the row that measures it."""
    files = [file for place in MEASURED for file in [ROOT / place, *sorted((ROOT / place).glob("**/*.*"))]]
    files = [file for file in files if file.suffix in SOURCES]
    digest = hashlib.sha256()
    for file in [*files, *(HERE / f"{name}.py" for name in (*MEASURING, row))]:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:12]
