"""Time to the first token of a long prompt, alone and beside running streams; and of a chat's second turn.

    python -m benchmarks.ttft [--rounds 3] [--prompt 500] [--streams 8] [--fresh]

Over HTTP: a prompt of about 500 tokens on an idle server; the same while 8 streams decode, with the longest pause of
any of them; a second turn, whose first turn's tokens need not be computed again. Beside it both engines' bare prefill
of the same length, in turns. PEERS=all adds llama-server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, table
from benchmarks.engines import OURS as ENGINE
from benchmarks.engines import THEIRS, side_by_side
from benchmarks.http import OURS, Start, in_turns, starts
from benchmarks.load import Answer, Target, ask, prompt, run
from benchmarks.peers import LLAMA_SERVER, wanted_all
from benchmarks.record import Record
from benchmarks.servers import until_compiled
from ops.stack import free_port
from settings import Settings

SETTLE = 1.0  # seconds that the streams run before the long prompt comes, and again after its first token
ENDLESS = 1000  # tokens that a stream asks for: more than it is let run


def turn(start: Start, chosen: argparse.Namespace, number: int) -> dict[str, float]:
    """One turn of one server. Seconds; tokens where the name says so."""
    with start(free_port()) as server:
        target, words = Target(server.url, server.model, server.key), _words(chosen.prompt)
        numbers = itertools.count(1000 * (number + 1))
        for clients in (1, chosen.streams):
            run(target, clients, 8, next(numbers) * 100)
        until_compiled(server, chosen.patience)
        seen = asyncio.run(_alone(target, prompt(next(numbers), words)))
        seen |= asyncio.run(_beside(target, prompt(next(numbers), words), chosen.streams, next(numbers) * 100))
        return seen | asyncio.run(_second_turn(target, prompt(next(numbers), words)))


def _words(tokens: int) -> int:
    """Filling words that make a prompt of about so many tokens: `word42` is three, the rest about forty."""
    return max(0, (tokens - 40) // 3)


async def _alone(target: Target, text: str) -> dict[str, float]:
    answer = await ask(target, text, 8)
    return {"idle": answer.first, "prompt tokens": answer.prompt_tokens}


async def _beside(target: Target, text: str, streams: int, first: int) -> dict[str, float]:
    """The long prompt while others decode. Their pauses are looked at from its sending to its first token."""
    others = [Answer() for _ in range(streams)]
    running = [asyncio.create_task(ask(target, prompt(first + n), ENDLESS, other)) for n, other in enumerate(others)]
    while not all(other.times or task.done() for other, task in zip(others, running, strict=True)):
        await asyncio.sleep(0.05)
    begin = time.perf_counter()
    await asyncio.sleep(SETTLE)
    usual = longest(others, begin, time.perf_counter())
    answer = await ask(target, text, 8)
    pause = longest(others, answer.sent, answer.ended)
    for task in running:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return {"busy": answer.first, "pause": pause, "usual pause": usual}


def longest(answers: list[Answer], begin: float, end: float) -> float:
    """The longest time between two tokens of one answer that overlaps with begin to end, in seconds."""
    gaps = [later - earlier for answer in answers for earlier, later in itertools.pairwise(answer.times)
            if later > begin and earlier < end]  # fmt: skip
    return max(gaps, default=0.0)


async def _second_turn(target: Target, text: str) -> dict[str, float]:
    """A chat that goes on: what was said so far, and a short new question."""
    opening = await ask(target, text, 32)
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": opening.text},
            {"role": "user", "content": "And then?"}]  # fmt: skip
    answer = await ask(target, said, 8)
    return {"second": answer.first, "second prompt tokens": answer.prompt_tokens, "second cached": answer.cached_tokens}


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet."""
    servers = [OURS, *([LLAMA_SERVER.name] if wanted_all() else [])]
    if kept.has([*servers, ENGINE, THEIRS], chosen.rounds):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with side_by_side(settings, folder, chosen.patience, kept) as engines:
            for worker in engines.values():
                worker.ask("prefill", tokens=64)  # the first of all is slower
            left = starts(settings, folder, servers)
            for number in range(chosen.rounds):
                in_turns(kept, left, number, partial(turn, chosen=chosen, number=number))
                for engine, worker in engines.items():
                    kept.turn(engine, number, partial(worker.ask, "prefill", tokens=chosen.prompt))


def column(turns: Mapping[str, Any], name: str, key: str) -> list[float]:
    """A figure, a value a round. turns: a record's."""
    return [found[key] for found in turns.get(name, ()) if key in found]


# What the table shows: label, name in the record, scale.
LINES = (
    ("prompt, tokens", "prompt tokens", 1.0),
    ("time to first token, idle, ms", "idle", 1e3),
    ("the same beside running streams, ms", "busy", 1e3),
    ("longest pause of a running stream meanwhile, ms", "pause", 1e3),
    ("longest pause before, ms", "usual pause", 1e3),
    ("second turn, tokens", "second prompt tokens", 1.0),
    ("of those reused", "second cached", 1.0),
    ("second turn, time to first token, ms", "second", 1e3),
)


def shown(turns: Mapping[str, Any], tokens: int) -> str:
    """The tables of this row: servers, and the bare engines. tokens: of the engines' prompt."""
    servers = [name for name, found in turns.items() if found and "idle" in found[0]]
    lines = [
        [label, *(table.median([value * scale for value in column(turns, name, key)], ".0f") for name in servers)]
        for label, key, scale in LINES
    ]
    bare = {name: [value * 1e3 for value in column(turns, name, "seconds")] for name in turns if name not in servers}
    beside = [[name, table.beside(bare.get(ENGINE, []), values, ".0f")] for name, values in bare.items()]
    head = [f"bare prefill of {tokens} tokens and one step", f"ms ({ENGINE}'s ratio)"]
    return table.markdown(["", *servers], lines) + "\n\n" + table.markdown(head, beside)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"medians of {chosen.rounds} rounds", shown(kept.turns, chosen.prompt)


def main() -> None:
    parser = record.options(__doc__, rounds=3, minutes=15)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of the long prompt, about")
    parser.add_argument("--streams", type=int, default=8)
    record.run("ttft", parser, measure, _told)


if __name__ == "__main__":
    main()
