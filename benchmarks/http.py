"""Tokens a second, time to first token, start and memory over HTTP, beside the peers' own servers.

    python -m benchmarks.http [--rounds 3] [--tokens 128] [--clients 1 8 16] [--only NAME ...] [--fresh]

The same weights (the NF4 checkpoint of the demo model; llama.cpp the GGUF that it was made of, vLLM those in bf16),
prompts and threads, one server at a time, in turns A B A B; every prompt is new, greedy and uncached. Beside them the
bare engine does the same work without HTTP, queue and text: what those take away. PEERS=all adds llama-server and vLLM.
Asserts nothing: it is a measurement.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import engines, load, record, table
from benchmarks.peers import LLAMA_SERVER, TRANSFORMERS, VLLM, PeerMissing, gguf, wanted_all
from benchmarks.record import OutOfTime, Record
from benchmarks.servers import (
    Server,
    data_folder,
    llama_server,
    this_service,
    transformers_serve,
    until_compiled,
    vllm_serve,
)
from model.weights.catalogue import ModelError, find
from model.weights.loader import prepare
from ops.stack import free_port
from settings import Settings

Start = Callable[[int], AbstractContextManager[Server]]
OURS, BARE = "this service", "the bare engine"
# What the table shows: label, name in the record, scale, format.
BY_CLIENTS = (
    ("tokens/s", "tokens_per_second", 1.0, ".1f"),
    ("gap between tokens, ms", "gap", 1e3, ".0f"),
    ("longest gap, ms", "longest_gap", 1e3, ".0f"),
    ("time to first token, s", "first", 1.0, ".2f"),
    ("processor seconds for 1,000 tokens", "cpu", 1.0, ".1f"),
)
BY_SERVER = (
    ("start to ready, s", "start", 1.0, ".1f"),
    ("memory at rest, MB", "at_rest", 2.0**-20, ".0f"),
    ("memory at the end, MB", "at_most", 2.0**-20, ".0f"),
)


def starts(settings: Settings, folder: Path, wanted: list[str]) -> dict[str, Start]:
    """How each wanted server is started on a port; its log goes to `folder`."""
    nf4 = prepare(find(settings), settings)
    known: dict[str, Start] = {
        OURS: lambda port: this_service(port, data_folder(settings, folder), folder / "service.log"),
        LLAMA_SERVER.name: lambda port: llama_server(port, gguf(settings, folder), folder / "llama.log"),
        VLLM.name: lambda port: vllm_serve(port, engines.dense(settings), folder / "vllm.log"),
        TRANSFORMERS.name: lambda port: transformers_serve(port, nf4, folder / "transformers.log"),
    }
    return {name: start for name, start in known.items() if name in wanted}


def turn(start: Start, chosen: argparse.Namespace, number: int) -> dict[str, Any]:
    """One turn of one server: started, warmed up, then each number of clients once. Memory in bytes."""
    with start(free_port()) as server:
        target = load.Target(server.url, server.model, server.key)
        fresh = 10_000 * number
        for warm in (1, max(chosen.clients)):
            load.run(target, warm, 8, fresh)
            fresh += warm
        until_compiled(server, chosen.patience)
        seen: dict[str, Any] = {"start": server.start, "at_rest": server.memory, "loads": {}}
        for count in chosen.clients:
            before = server.cpu_seconds
            found = load.run(target, count, chosen.tokens, fresh)
            fresh += count
            cpu = (server.cpu_seconds - before) * 1000 / found.tokens
            seen["loads"][str(count)] = asdict(found) | {"cpu": cpu}
            print(f"  {server.name}: {count} clients {found.tokens_per_second:.1f} tokens/s", file=sys.stderr)
        return seen | {"at_most": server.memory}


def bare(settings: Settings, folder: Path, chosen: argparse.Namespace, prompts: Mapping[str, int]) -> dict[str, Any]:
    """The same work by the engine alone, in a process of its own. prompts: tokens a prompt had, by clients."""
    with engines.ours(settings, folder, chosen.patience) as worker:
        loads = {}
        for count in chosen.clients:
            worker.ask("generate", rows=count, context=prompts[str(count)], steps=4)
            made = worker.ask("generate", rows=count, context=prompts[str(count)], steps=chosen.tokens)
            tokens = count * chosen.tokens
            loads[str(count)] = {"tokens_per_second": tokens / made["seconds"], "cpu": made["cpu"] * 1000 / tokens}
        return {"loads": loads}


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        left = starts(settings, folder, chosen.only)
        for number in range(chosen.rounds):
            in_turns(kept, left, number, partial(turn, chosen=chosen, number=number))
            if len(kept.turns.get(OURS, ())) > number:
                loads = kept.turns[OURS][number]["loads"]
                prompts = {count: int(found["prompt_tokens"]) for count, found in loads.items()}
                kept.turn(BARE, number, partial(bare, settings, folder, chosen, prompts))


def in_turns(kept: Record, left: dict[str, Start], number: int, measure: Callable[[Start], Any]) -> None:
    """One round over the servers; one that cannot be had, or fails, is said to and left out from then on."""
    for name, start in list(left.items()):
        try:
            kept.turn(name, number, partial(measure, start))
        except OutOfTime:
            raise
        except (PeerMissing, ModelError, OSError) as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            del left[name]


def figures(turns: Mapping[str, Any], name: str, clients: int, figure: str) -> list[float]:
    """A figure of `name` with so many clients, a value a round. turns: a record's."""
    return [found["loads"][str(clients)][figure] for found in turns.get(name, ())
            if figure in found["loads"].get(str(clients), ())]  # fmt: skip


def shown(turns: Mapping[str, Any], clients: list[int]) -> str:
    """The table: a row a figure, a column a server, each peer with this service's ratio to it."""
    names = [OURS, *(name for name, found in turns.items() if found and name != OURS)]
    lines = []
    for label, key, scale, form in BY_CLIENTS:
        for n in clients:
            values = [[value * scale for value in figures(turns, name, n, key)] for name in names]
            lines.append(_line(f"{label}, {n} clients", values, form))
    for label, key, scale, form in BY_SERVER:
        values = [[found[key] * scale for found in turns.get(name, ()) if key in found] for name in names]
        lines.append(_line(label, values, form))
    return table.markdown(["", names[0], *(f"{name} (ratio)" for name in names[1:])], lines)


def _line(label: str, values: list[list[float]], form: str) -> list[str]:
    ours, *others = values
    return [label, table.median(ours, form), *(table.beside(ours, peer, form) for peer in others)]


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"{chosen.tokens} tokens a request, medians of {chosen.rounds} rounds", shown(kept.turns, chosen.clients)


def main() -> None:
    parser = record.options(__doc__, rounds=3, minutes=45)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    every = [OURS, *([LLAMA_SERVER.name, VLLM.name] if wanted_all() else []), TRANSFORMERS.name]
    parser.add_argument("--only", nargs="+", default=every, metavar="NAME", help=", ".join(every))
    record.run("http", parser, measure, _told)


if __name__ == "__main__":
    main()
