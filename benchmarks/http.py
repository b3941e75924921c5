"""Tokens a second, time to first token, start and memory over HTTP, beside transformers' own server.

    python -m benchmarks.http [--rounds 2] [--tokens 128] [--clients 1 8 16]

Same weights (the NF4 checkpoint of the demo model), same prompts, same threads, one server at a time, in turns
A B A B; every prompt is new, greedy and uncached. Prints the table of README and writes benchmarks/http.json.
Asserts nothing: it is a measurement.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import psutil

from benchmarks.load import Load, run
from benchmarks.servers import ROOT, Server, this_service, transformers_serve
from model.loader import prepare
from model.registry import find
from ops.stack import free_port
from settings import Settings

Start = Callable[[int], AbstractContextManager[Server]]
MB = 1 << 20


@dataclass(slots=True)
class Seen:
    """Everything seen of one server, a value a round."""

    start: list[float] = field(default_factory=list)
    at_rest: list[int] = field(default_factory=list)
    at_most: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # processor seconds for 1,000 tokens, at the most clients
    loads: dict[int, list[Load]] = field(default_factory=lambda: defaultdict(list))


def measure(start: Start, seen: Seen, clients: list[int], tokens: int, numbers: list[int]) -> None:
    """One turn of one server: start it, warm it up, then each number of clients once."""
    with start(free_port()) as server:
        seen.start.append(server.start)
        for warm in (1, max(clients)):
            run(server.url, server.model, server.key, warm, 8, numbers[0])
            numbers[0] += warm
        _until_compiled(server)
        seen.at_rest.append(server.memory)
        for count in clients:
            before = server.cpu_seconds
            load = run(server.url, server.model, server.key, count, tokens, numbers[0])
            numbers[0] += count
            seen.loads[count].append(load)
            print(f"  {server.name}: {count} clients {load.tokens_per_second:.1f} tokens/s, first {load.first:.2f} s",
                  file=sys.stderr)  # fmt: skip
        seen.at_most.append(server.memory)
        seen.cpu.append((server.cpu_seconds - before) * 1000 / load.tokens)


def _until_compiled(server: Server, patience: float = 1800) -> None:
    """This service compiles in the background: wait until all is in use, as it is from the second start on."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(server.url.removesuffix("/v1") + "/readyz", timeout=5) as answer:
                compiled = str(json.load(answer)["details"]["compiled"])
        except (OSError, ValueError, KeyError):
            return  # another server
        done, _, wanted = compiled.partition("/")
        if done == wanted:
            return
        time.sleep(1)


def table(results: dict[str, Seen], clients: list[int]) -> str:
    """The Markdown table: one row a figure, one column a server, then the ratio of the first to each other."""
    names = list(results)
    lines = ["| | " + " | ".join(names) + " | ratio |", "|---" * (len(names) + 2) + "|"]

    def row(label: str, figure: Callable[[Seen], float], form: str) -> None:
        values = [figure(results[name]) for name in names]
        ratio = f"{values[0] / values[1]:.2f}" if len(values) > 1 and values[1] else ""
        lines.append(f"| {label} | " + " | ".join(format(value, form) for value in values) + f" | {ratio} |")

    median = statistics.median
    figures: list[tuple[str, Callable[[Load], float], str]] = [
        ("tokens/s", lambda load: load.tokens_per_second, ".1f"),
        ("gap between tokens, ms", lambda load: load.gap * 1e3, ".0f"),
        ("longest gap, ms", lambda load: load.longest_gap * 1e3, ".0f"),
        ("time to first token, s", lambda load: load.first, ".2f"),
    ]
    for label, figure, form in figures:
        for n in clients:
            row(f"{label}, {n} clients", partial(_median, n, figure), form)
    row("processor seconds for 1,000 tokens", lambda seen: median(seen.cpu), ".1f")
    row("start to ready, s", lambda seen: median(seen.start), ".1f")
    row("memory at rest, MB", lambda seen: median(seen.at_rest) / MB, ".0f")
    row(f"memory after {max(clients)} clients, MB", lambda seen: median(seen.at_most) / MB, ".0f")
    return "\n".join(lines)


def _median(clients: int, figure: Callable[[Load], float], seen: Seen) -> float:
    return statistics.median(figure(load) for load in seen.loads[clients])


def machine() -> str:
    """What it ran on."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].splitlines()[0]
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if kind in flags]
    return f"{psutil.cpu_count()} cores ({', '.join(kinds)}), {platform.system()}, {date.today().isoformat()}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    chosen = options.parse_args()
    settings = Settings.from_environment()
    checkpoint = prepare(find(settings), settings)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        starts: dict[str, Start] = {
            "this service": lambda port: this_service(port, _data(settings, logs), logs / "service.log"),
            "transformers serve": lambda port: transformers_serve(port, checkpoint, logs / "transformers.log"),
        }
        results = {name: Seen() for name in starts}
        numbers = [0]
        for _ in range(chosen.rounds):
            for name, start in starts.items():
                measure(start, results[name], chosen.clients, chosen.tokens, numbers)
    print(f"{machine()}; {chosen.tokens} tokens a request, medians of {chosen.rounds} rounds\n")
    print(table(results, chosen.clients))
    record = {"machine": machine(), "tokens": chosen.tokens, "results": {k: _plain(v) for k, v in results.items()}}
    (ROOT / "benchmarks" / "http.json").write_text(json.dumps(record, indent=1) + "\n")


def _data(settings: Settings, folder: Path) -> Path:
    """A data folder of the benchmark's own, but for the models and the compiled steps."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        for shared in ("models", "compiled"):
            (settings.data_dir / shared).mkdir(exist_ok=True)
            (data / shared).symlink_to((settings.data_dir / shared).resolve())
    return data


def _plain(seen: Seen) -> dict[str, object]:
    loads = {str(n): [[round(v, 4) for v in (x.tokens_per_second, x.first, x.gap, x.longest_gap)] for x in loads]
             for n, loads in seen.loads.items()}  # fmt: skip
    return {"start": seen.start, "at_rest": seen.at_rest, "at_most": seen.at_most, "cpu": seen.cpu,
            "loads [tokens/s, first, gap, longest gap]": loads}  # fmt: skip


if __name__ == "__main__":
    main()
