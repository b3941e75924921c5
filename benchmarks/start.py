"""A warm start: seconds from `make run` to ready, memory at rest, and whether any compiler ran.

    python -m benchmarks.start [--rounds 5] [--fresh]

Warm: packages installed, model prepared, steps compiled, as from the second start on. For the proof, programs named
like the compilers stand first in PATH; each writes its name down, unless it is only asked its version, and then runs
the real one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record, table
from benchmarks.load import Target, run
from benchmarks.record import Record
from benchmarks.servers import (
    PATIENCE,
    Server,
    answers,
    data_folder,
    service_settings,
    signed_in,
    this_service,
    until_compiled,
)
from benchmarks.worker import ROOT
from ops.stack import free_port
from settings import Settings

COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "cc1plus", "ld", "as", "nvcc")
REST = 5.0  # seconds without a request before memory is read


def spies(folder: Path, log: Path) -> str:
    """A PATH in which every compiler that has something to compile first writes its name into `log`."""
    folder.mkdir()
    for name in COMPILERS:
        if real := shutil.which(name):
            spy = folder / name
            asked = 'case "$*" in -v|--version) ;; *)'
            spy.write_text(f'#!/bin/sh\n{asked} echo {name} >> "{log}" ;; esac\nexec "{real}" "$@"\n')
            spy.chmod(spy.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def turn(settings: Settings, folder: Path) -> dict[str, Any]:
    """One `make run`, from the command on. Seconds, bytes, and how often which compiler ran."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        log = Path(name) / "compilers"
        path = spies(Path(name) / "bin", log)
        environment = os.environ | service_settings(port, data_folder(settings, folder)) | {"PATH": path}
        with (folder / "make.log").open("ab") as output:
            begin = time.perf_counter()
            make = subprocess.Popen(
                ["make", "run"], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            seen = _watched(Server("make run", f"http://127.0.0.1:{port}", "", psutil.Process(make.pid)), make, begin)
        finally:
            os.killpg(make.pid, signal.SIGTERM)
            make.wait(60)
        return seen | {"compilers": log.read_text().split() if log.exists() else []}


def _watched(server: Server, make: subprocess.Popen[bytes], begin: float) -> dict[str, float]:
    while not answers(f"{server.url}/readyz"):
        if make.poll() is not None or time.perf_counter() - begin > PATIENCE:
            raise ConnectionError("make run did not become ready")
        time.sleep(0.05)
    ready = time.perf_counter() - begin
    server = signed_in(server)
    first = run(Target(server.url, server.model, server.key), 1, 16, 0).first
    until_compiled(server, 60)
    compiled = time.perf_counter() - begin
    time.sleep(REST)
    return {"ready": ready, "first token": first, "all compiled steps": compiled, "memory": server.memory}


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet, after a start that is not counted: it makes what a warm start finds."""
    if kept.has(["make run"], chosen.rounds):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with this_service(free_port(), data_folder(settings, folder), folder / "service.log") as server:
            run(Target(server.url, server.model, server.key), 1, 8, 0)
            until_compiled(server, chosen.patience)
        for number in range(chosen.rounds):
            kept.turn("make run", number, partial(turn, settings, folder))


def shown(turns: Mapping[str, Any]) -> str:
    """The table of this row."""
    found = turns.get("make run", [])
    lines = [
        [label, table.median([value[key] * scale for value in found], form)]
        for label, key, scale, form in (
            ("`make run` to ready, s", "ready", 1.0, ".1f"),
            ("first token of the first request after that, s", "first token", 1.0, ".2f"),
            (
                "from `make run` until every compiled step is in use, that request included, s",
                "all compiled steps",
                1.0,
                ".1f",
            ),
            ("memory at rest, MB", "memory", 2.0**-20, ".0f"),
        )
    ]
    ran = [name for value in found for name in value["compilers"]]
    lines.append(["compilers that ran", ", ".join(sorted(set(ran))) or "none" if found else table.NONE])
    return table.markdown(["warm start", ""], lines)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"medians of {chosen.rounds} rounds", shown(kept.turns)


def main() -> None:
    record.run("start", record.options(__doc__, rounds=5, minutes=15), measure, _told)


if __name__ == "__main__":
    main()
