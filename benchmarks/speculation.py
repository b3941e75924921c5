"""What guessing from the text so far brings: one user's tokens a second with it and without, on three kinds of text.

    python -m benchmarks.speculation [--rounds 5] [--tokens 200] [--fresh]

The engine as it serves, without HTTP, greedy, from the first token on; two of them in one process, in turns A B A B.
The texts of both have to be the same. The demo model copies badly: what it repeats of a prompt is little.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import record, table
from benchmarks.record import Record
from model.local import LocalBackend
from model.types import Chunk, Done, GenerateRequest, Message, Sampling
from settings import Settings
from telemetry import Metrics

SUMMARY, CODE, TALK = "a summary in a text's own words", "code that is edited", "free talk"
PROMPTS = {
    SUMMARY: """Summarise this text by quoting its most important sentences word for word.

The harbour of the town was built in 1842 by the engineer Thomas Brandt. It has three piers and a lighthouse of
granite. In the winter of 1911 a storm destroyed the northern pier, and it was rebuilt within two years. Today the
harbour is used by fishing boats and by a small ferry that crosses the bay four times a day. The lighthouse is open to
visitors from May to September. The museum beside it shows the history of the fishing trade, with models of boats and
old photographs.""",
    CODE: """Repeat this code and rename `total` to `compute_total`:

```python
def total(items, tax_rate, discount):
    subtotal = 0
    for item in items:
        price = item["price"]
        quantity = item["quantity"]
        subtotal = subtotal + price * quantity
    if discount is not None:
        subtotal = subtotal - subtotal * discount
    tax = subtotal * tax_rate
    return subtotal + tax
```""",
    TALK: "Tell me a story about an old sailor who finds a letter in a bottle.",
}


@contextmanager
def engine(settings: Settings) -> Iterator[LocalBackend]:
    """One that is loaded."""
    backend = LocalBackend(settings, Metrics())
    backend.preload(print)
    while not backend.status().ready:
        time.sleep(0.2)
    try:
        yield backend
    finally:
        backend.close(0)


def answer(backend: LocalBackend, id: str, model: str, prompt: str, tokens: int) -> tuple[str, float]:
    """The text, and tokens a second after the first. Each id is a user of its own: no prefix is reused."""
    asked = GenerateRequest(id, id, model, (Message("user", prompt),), Sampling(temperature=0), tokens)
    stream, text, first = backend.submit(backend.prepare(asked)), "", 0.0
    while not isinstance(event := stream.get(60), Done):
        if isinstance(event, Chunk):
            first, text = first or time.perf_counter(), text + event.text
    return text, (event.usage.completion_tokens - 1) / (time.perf_counter() - first)


def measure(record: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet, {on, off} tokens a second each. Raises ValueError where the texts differ."""
    if record.has(list(PROMPTS), chosen.rounds):
        return
    ids = itertools.count()

    def turn(prompt: str) -> dict[str, float]:
        made = {
            name: answer(one, f"{next(ids)}", settings.model, prompt, chosen.tokens) for name, one in engines.items()
        }
        if made["on"][0] != made["off"][0]:
            raise ValueError(f"with and without guesses the text differs: {made}")
        return {name: speed for name, (_, speed) in made.items()}

    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine(settings.model_copy(update={"speculate": name == "on"})))
            for name in ("on", "off")
        }
        for name, prompt in PROMPTS.items():
            turn(prompt)  # what guesses are worth is learnt from what was seen
            for number in range(chosen.rounds):
                record.turn(name, number, lambda prompt=prompt: turn(prompt))  # type: ignore[misc]


def speeds(turns: Mapping[str, Any], name: str, key: str) -> list[float]:
    """Tokens a second on one kind of text, a value a round; key: `on` or `off`."""
    return [found[key] for found in turns.get(name, ())]


def shown(turns: Mapping[str, Any]) -> str:
    """The table of this row."""
    lines = []
    for name in PROMPTS:
        on, off = speeds(turns, name, "on"), speeds(turns, name, "off")
        lines.append([name, table.median(on), table.median(off), table.ratio(on, off)])
    return table.markdown(["tokens/s", "with guesses", "without", "times as fast"], lines)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"up to {chosen.tokens} tokens, medians of {chosen.rounds} rounds", shown(kept.turns)


def main() -> None:
    parser = record.options(__doc__ or "", rounds=5, minutes=5)
    parser.add_argument("--tokens", type=int, default=200)
    record.run("speculation", parser, measure, _told)


if __name__ == "__main__":
    main()
