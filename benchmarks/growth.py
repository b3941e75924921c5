"""How cost grows: with the context, with the number of clients, and whether memory stays flat over a mixed run.

    python -m benchmarks.growth [--contexts 128 ... 8192] [--clients 1 ... 64] [--minutes 5] [--fresh]

Context: a bare step of one row beside llama.cpp's, in turns. Clients: 1 to 64 over the service's slots. Memory: short
and long prompts, repeated ones, streams that are dropped and requests that are refused, for --minutes (60 by hand).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, table
from benchmarks.engines import OURS, THEIRS, side_by_side
from benchmarks.load import Target, ask, prompt, run
from benchmarks.record import Record
from benchmarks.servers import Server, data_folder, this_service, until_compiled
from benchmarks.worker import Worker
from ops.stack import free_port
from settings import Settings

EVERY = 5.0  # seconds between two readings of memory
CALM = 0.2  # of the mixed run: its first part, after which memory should not grow
FLAT = 0.02  # growth that still counts as flat


def contexts(kept: Record, settings: Settings, folder: Path, chosen: argparse.Namespace) -> None:
    """A step of one row with so many tokens before it, both engines in turns."""
    names = [f"{name}, {context}" for name in (OURS, THEIRS) for context in chosen.contexts]
    if kept.has(names, chosen.rounds):
        return
    with side_by_side(settings, folder, chosen.patience, kept) as engines:
        for context in chosen.contexts:
            for number in range(chosen.rounds):
                for name, engine in engines.items():
                    # The last context may be all that the model has: the steps fit before its end.
                    kept.turn(f"{name}, {context}", number, partial(_step, engine, context - 32))


def _step(engine: Worker, context: int) -> float:
    seconds: list[float] = engine.ask("decode", rows=1, context=context, steps=16)["seconds"]
    return statistics.median(seconds)


def clients(kept: Record, server: Server, chosen: argparse.Namespace) -> None:
    """The service with ever more clients, round by round."""
    target, fresh = Target(server.url, server.model, server.key), 0
    for number in range(chosen.rounds):
        for count in chosen.clients:
            kept.turn(f"{count} clients", number, partial(_clients, target, count, chosen.tokens, fresh))
            fresh += count


def _clients(target: Target, count: int, tokens: int, fresh: int) -> dict[str, float]:
    return asdict(run(target, count, tokens, fresh))


def memory(kept: Record, server: Server, chosen: argparse.Namespace) -> None:
    """Bytes of the service every few seconds of a mixed run; all slots have held a long prompt before it."""
    target = Target(server.url, server.model, server.key)

    def measure() -> list[int]:
        asyncio.run(_fill(target, chosen.longest))
        return asyncio.run(_mixed(target, server, chosen.minutes * 60, chosen.longest))

    kept.turn("memory", 0, measure)


async def _fill(target: Target, longest: int) -> None:
    """Every slot holds more than the mixed run will ask of it: what KV needs is committed before the first reading."""
    await asyncio.gather(*(ask(target, prompt(90_000 + n, longest + 60), 8) for n in range(16)))


async def _mixed(target: Target, server: Server, seconds: float, longest: int) -> list[int]:
    end, readings = time.monotonic() + seconds, []
    users = [asyncio.create_task(_user(target, random.Random(n), end, longest)) for n in range(12)]
    while time.monotonic() < end:
        await asyncio.sleep(min(EVERY, seconds / 10))
        readings.append(server.memory)
    await asyncio.gather(*users)
    return readings


async def _user(target: Target, chance: random.Random, end: float, longest: int) -> None:
    """Somebody who asks, repeats, gives up and makes mistakes until the time is over."""
    while time.monotonic() < end:
        kind = chance.random()
        number = chance.randrange(20) if kind < 0.3 else chance.randrange(1 << 40)
        text = prompt(number, chance.choice((0, 0, longest // 10, longest)))
        wanted = -1 if kind > 0.95 else chance.choice((8, 32, 96))  # the service refuses -1
        with suppress(ConnectionError, TimeoutError):
            # A client that gives up closes its connection.
            await asyncio.wait_for(ask(target, text, wanted), 0.5 if kind > 0.85 else 120)


def growth(readings: list[int]) -> float:
    """How much more memory the last tenth of a run holds than the tenth after its calming, as a share."""
    start, tenth = int(len(readings) * CALM), max(1, len(readings) // 10)
    return statistics.median(readings[-tenth:]) / statistics.median(readings[start : start + tenth]) - 1


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All that is not kept yet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contexts(kept, settings, folder, chosen)
        if kept.has([f"{n} clients" for n in chosen.clients], chosen.rounds) and kept.has(["memory"], 1):
            return
        with this_service(free_port(), data_folder(settings, folder), folder / "service.log") as server:
            run(Target(server.url, server.model, server.key), 1, 8, 80_000)
            until_compiled(server, chosen.patience)
            clients(kept, server, chosen)
            memory(kept, server, chosen)


def shown(turns: Mapping[str, Any], chosen: argparse.Namespace) -> str:
    """The three tables of this row."""
    lines = []
    for context in chosen.contexts:
        ours, theirs = (turns.get(f"{name}, {context}", []) for name in (OURS, THEIRS))
        cells = [table.median([value * 1e3 for value in values]) for values in (ours, theirs)]
        lines.append([str(context), *cells, table.ratio(theirs, ours)])
    by_context = table.markdown(["context", f"{OURS}, ms a step", f"{THEIRS}, ms a step", "times as fast"], lines)
    lines = []
    for count in chosen.clients:
        found = turns.get(f"{count} clients", [])
        lines.append([str(count), *(table.median([value[key] for value in found], form) for key, form in (
            ("tokens_per_second", ".1f"), ("first", ".2f"), ("slowest", ".1f")))])  # fmt: skip
    head = ["clients", "tokens/s", "time to first token, s", "p95 of whole answers, s"]
    return "\n\n".join([by_context, table.markdown(head, lines), _flatness(turns.get("memory"), chosen.minutes)])


def _flatness(kept: list[list[int]] | None, minutes: float) -> str:
    if not kept:
        return "Memory: not measured."
    grown = growth(kept[0])
    verdict = "flat" if abs(grown) <= FLAT else "not flat"
    return f"Memory over {minutes:g} minutes of mixed requests: {kept[0][-1] >> 20} MB, {grown:+.1%}: {verdict}."


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"medians of {chosen.rounds} rounds", shown(kept.turns, chosen)


def main() -> None:
    parser = record.options(__doc__, rounds=3, minutes=45)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request of the clients' part")
    parser.add_argument("--minutes", type=float, default=5, help="of the mixed run")
    parser.add_argument("--longest", type=int, default=500, help="words of the mixed run's longest prompts")
    record.run("growth", parser, measure, _told)


if __name__ == "__main__":
    main()
