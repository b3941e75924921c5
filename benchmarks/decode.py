"""The bare decode step: tokens a second at batch 1, 8 and 16, beside llama.cpp and beside the memory's own limit.

    python -m benchmarks.decode [--rounds 5] [--batches 1 8 16] [--context 128] [--steps 64] [--fresh]

Ours compiled through Runner, llama.cpp through llama-cpp-python's low-level batch; the same weights (llama.cpp the
GGUF itself, ours the NF4 checkpoint made of it), threads, prompts and context; greedy; in turns A B A B, while the
other waits. The floor is the bytes that one step must read over the bandwidth measured in the same run.
Leaves out HTTP, queue and text: `http.py` measures those.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, table
from benchmarks.engines import OURS, THEIRS, side_by_side
from benchmarks.peers import ONNX, wanted_all
from benchmarks.record import Record
from benchmarks.worker import Worker
from settings import Settings


def names() -> list[str]:
    """The engines of this row."""
    return [OURS, THEIRS, *([ONNX.name] if wanted_all() else [])]


def measure(record: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet."""
    wanted = [_turn(name, rows) for name in names() for rows in chosen.batches]
    if record.has(wanted, chosen.rounds):
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        side_by_side(settings, Path(folder), chosen.patience, record) as engines,
    ):
        for number in range(chosen.rounds):
            record.turn("bandwidth", number, lambda: engines[OURS].ask("bandwidth")["bytes"])
            for rows in chosen.batches:
                for name, engine in engines.items():
                    record.turn(_turn(name, rows), number, partial(_decode, engine, rows, chosen))


def _decode(engine: Worker, rows: int, chosen: argparse.Namespace) -> dict[str, float]:
    """step: the median, in seconds; slowest: the longest; cpu: processor seconds for 1,000 tokens."""
    turn = engine.ask("decode", rows=rows, context=chosen.context, steps=chosen.steps)
    cpu = turn["cpu"] * 1000 / (rows * chosen.steps)
    return {"step": statistics.median(turn["seconds"]), "slowest": max(turn["seconds"]), "cpu": cpu}


def _turn(name: str, rows: int) -> str:
    return f"{name}, batch {rows}"


def speeds(kept: Mapping[str, Any], name: str, rows: int) -> list[float]:
    """Tokens a second, a value a round. kept: a record's turns."""
    return [rows / turn["step"] for turn in kept.get(_turn(name, rows), ())]


def floors(kept: Mapping[str, Any], facts: Mapping[str, Any], rows: int, context: int) -> list[float]:
    """Tokens a second if a step took just as long as reading its weights and KV from memory, a value a round."""
    size = facts["weights"] + rows * context * facts["kv_bytes_per_token"]
    return [rows * bandwidth / size for bandwidth in kept.get("bandwidth", ())]


def shown(kept: Mapping[str, Any], facts: Mapping[str, Any], batches: list[int], context: int) -> str:
    """The table of this row: each peer with our ratio to it."""
    peers, lines = [name for name in names() if name != OURS and name in facts], []
    for rows in batches:
        ours, floor = speeds(kept, OURS, rows), floors(kept, facts[OURS], rows, context)
        beside = [table.beside(ours, speeds(kept, name, rows)) for name in peers]
        lines.append([f"tokens/s, batch {rows}", table.median(ours), *beside, table.beside(ours, floor, ".0f")])
    for rows in batches:
        ours, *others = ([turn["cpu"] for turn in kept.get(_turn(name, rows), ())] for name in (OURS, *peers))
        beside = [table.beside(ours, theirs) for theirs in others]
        lines.append([f"processor seconds for 1,000 tokens, batch {rows}", table.median(ours), *beside, ""])
    return table.markdown(["", OURS, *(f"{name} (ratio)" for name in peers), "the memory's limit (ratio)"], lines)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return (
        f"{kept.facts[OURS]['linear_backend']} against Q4_1, context {chosen.context}, "
        f"medians of {chosen.rounds} rounds",
        shown(kept.turns, kept.facts, chosen.batches, chosen.context),
    )


def main() -> None:
    parser = record.options(__doc__, rounds=5, minutes=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens that every row holds before the first step")
    parser.add_argument("--steps", type=int, default=64)
    record.run("decode", parser, measure, _told)


if __name__ == "__main__":
    main()
