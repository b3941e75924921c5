"""What 4 bits cost: perplexity on a fixed text, and how often greedy answers are those of the unquantised weights.

    python -m benchmarks.quality [--prompts 50] [--tokens 32] [--fresh]

The reference is the demo's weights in bf16, computed in float32. Beside it NF4 with nothing else changed, and the
product that serves on this machine: with whole prompts, and token by token over several rows, which may be other
kernels. Agreement goes through the engine itself, compiled steps included. Deterministic: one round.
The text (benchmarks/quality.txt) is cut into windows; the model sees nothing before its window.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import record, table
from benchmarks.engines import dense
from benchmarks.ours import fill, load, runs
from benchmarks.record import HERE, Record
from model.engine.scheduler import Work
from model.runtime.gpu import choose_device
from model.runtime.kv import Batch
from model.runtime.linear import dequantise
from model.runtime.runner import Runner
from model.text.prompt import Prompt
from model.types import Message
from model.weights.catalogue import find, with_config
from model.weights.loader import load_model, load_tokenizer, prepare
from settings import Settings

REFERENCE, NF4, PROMPTS, STEPS = "bf16 weights", "NF4 alone", "served, whole prompts", "served, token by token"
WINDOWS = 8  # and rows, where the text is read token by token

Ids = list[int]


def windows(settings: Settings) -> torch.Tensor:
    """The fixed text as int64 [WINDOWS, tokens]."""
    ids = load_tokenizer(prepare(find(settings), settings))((HERE / "quality.txt").read_text("utf-8"))["input_ids"]
    each = len(ids) // WINDOWS
    return torch.tensor(ids[: each * WINDOWS]).view(WINDOWS, each)


def reference(settings: Settings) -> Any:
    """The unquantised model."""
    return _load(dense(settings), settings, torch.float32)


def dequantised(settings: Settings) -> Any:
    """The model with its NF4 matrices as floats."""
    model = _load(prepare(find(settings), settings), settings, torch.float32)
    dequantise(model, torch.float32)
    return model


class Served:
    """The engine as it serves, called as transformers' models are. past_key_values: how many tokens were read."""

    def __init__(self, settings: Settings) -> None:
        self.runner = load(settings, 0)
        self.device = self.runner.device

    def __call__(self, input_ids: torch.Tensor, past_key_values: int | None = None, use_cache: bool = False) -> Any:
        start, (rows, n) = past_key_values or 0, input_ids.shape
        blocks = runs(self.runner, rows, start + n)
        work = [Work(row, ids, start, blocks[row]) for row, ids in enumerate(input_ids.tolist())]
        with torch.inference_mode():
            logits = self.runner.model.lm_head(self.runner.hidden_states(Batch.of(work)))
        return SimpleNamespace(logits=logits.view(rows, n, -1), past_key_values=start + n)


def _load(folder: Path, settings: Settings, dtype: torch.dtype) -> Any:
    torch.set_num_threads(settings.compute_threads)
    return load_model(folder, settings, torch.device(choose_device(settings.device)), dtype)


def whole(model: Any, text: torch.Tensor) -> float:
    """Perplexity, each window read at once."""
    losses = [_loss(model(input_ids=row[None, :-1]).logits[0], row[1:]) for row in text.to(model.device)]
    return math.exp(sum(losses) / len(losses))


def stepwise(model: Any, text: torch.Tensor) -> float:
    """Perplexity, all windows read side by side, a token each at a time."""
    cache, losses = None, []
    for place in range(text.shape[1] - 1):
        ids = text[:, place : place + 2].to(model.device)
        made = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        losses.append(_loss(made.logits[:, -1], ids[:, 1]))
    return math.exp(sum(losses) / len(losses))


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), targets).item())


def rendered(settings: Settings, count: int) -> list[Ids]:
    """The first prompts of benchmarks/prompts.txt, as chats."""
    folder = prepare(find(settings), settings)
    prompt = Prompt(load_tokenizer(folder), with_config(find(settings), folder))
    lines = (HERE / "prompts.txt").read_text("utf-8").splitlines()[:count]
    return [list(prompt.render((Message("user", line),))) for line in lines]


def greedy(model: Any, prompt: Ids, count: int, eos: frozenset[int]) -> Ids:
    """The model's own greedy answer, up to its end token."""
    ids, cache, answer = torch.tensor([prompt], device=model.device), None, Ids()
    while len(answer) < count and not (answer and answer[-1] in eos):
        made = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
        answer.append(int(ids))
    return answer


def follow(runner: Runner, prompts: list[Ids], answers: list[Ids], forced: bool) -> list[Ids]:
    """The engine's choices beside each answer, in one batch. forced: each next to the answer's tokens, not its own."""
    blocks = runs(runner, len(prompts), max(len(ids) for ids in prompts) + max(len(ids) for ids in answers))
    work = [fill(runner, row, prompt, blocks[row]) for row, prompt in enumerate(prompts)]
    found: list[Ids] = [[] for _ in prompts]
    for place in range(max(map(len, answers))):
        for row, (token,) in enumerate(runner.step(work)):
            if place >= len(answers[row]):
                continue
            found[row].append(-1 if token is None else token)
            following = answers[row][place] if forced else token
            if following is not None:
                work[row] = work[row]._replace(tokens=[following], position=work[row].position + 1)
    return found


def agreement(settings: Settings, chosen: argparse.Namespace) -> dict[str, float]:
    """Shares of equal tokens: free (each goes its own way) and forced; equal: answers that are the same throughout."""
    runner, prompts = load(settings, chosen.patience), rendered(settings, chosen.prompts)
    model = reference(settings)
    answers = [greedy(model, prompt, chosen.tokens, runner.eos) for prompt in prompts]
    shares: dict[str, float] = {}
    for name, forced in (("free", False), ("forced", True)):
        found: list[Ids] = []
        for first in range(0, len(prompts), runner.slots):
            part = slice(first, first + runner.slots)
            found += follow(runner, prompts[part], answers[part], forced)
        shares[name] = share(answers, found)
        shares.setdefault("equal", sum(a == b for a, b in zip(answers, found, strict=True)) / len(answers))
    return shares


def share(wanted: list[Ids], found: list[Ids]) -> float:
    """The share of tokens that are the same in the same place."""
    pairs = [pair for a, b in zip(wanted, found, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _perplexity(
    settings: Settings, text: torch.Tensor, make: Callable[[Settings], Any], read: Callable[[Any, torch.Tensor], float]
) -> float:
    return read(make(settings), text)


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All that is not kept yet."""
    text = windows(settings)
    kept.facts["predicted tokens"] = text.numel() - WINDOWS
    ways = (
        (REFERENCE, reference, whole),
        (NF4, dequantised, whole),
        (PROMPTS, Served, whole),
        (STEPS, Served, stepwise),
    )
    for name, make, read in ways:
        kept.turn(name, 0, partial(_perplexity, settings, text, make, read))
    kept.turn("agreement", 0, lambda: agreement(settings, chosen))


def shown(turns: Mapping[str, Any]) -> str:
    """The tables of this row."""
    base = (turns.get(REFERENCE) or [math.nan])[0]
    lines = [[name, f"{turns[name][0]:.2f}", f"{turns[name][0] / base:.3f}"]
             for name in (REFERENCE, NF4, PROMPTS, STEPS) if turns.get(name)]  # fmt: skip
    text = table.markdown(["", "perplexity", "of the reference"], lines)
    for found in turns.get("agreement", ()):
        text += "\n\n" + table.markdown(["greedy answers, against the reference's", ""], [
            ["equal tokens, each going on by itself", f"{found['free']:.1%}"],
            ["equal tokens after the reference's own tokens", f"{found['forced']:.1%}"],
            ["whole answers equal", f"{found['equal']:.1%}"]])  # fmt: skip
    return text


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"{kept.facts['predicted tokens']} tokens predicted", shown(kept.turns)


def main() -> None:
    parser = record.options(__doc__, rounds=1, minutes=20)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    record.run("quality", parser, measure, _told)


if __name__ == "__main__":
    main()
