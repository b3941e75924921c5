"""What this service wants to reach, beside what the rows measured, read from their records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import cache, decode, http, quality, speculation, table, ttft
from benchmarks.engines import OURS, THEIRS
from benchmarks.growth import FLAT
from benchmarks.growth import growth as grown
from benchmarks.peers import LLAMA_SERVER, TRANSFORMERS, VLLM

Records = Mapping[str, Mapping[str, Any]]  # row -> its record, as record.read gives it
PERCENT = ".1%"
HEADLINES = (  # README's rows
    "decode, batch 1, against llama.cpp, tokens/s",
    "decode, batch 16, against llama.cpp, tokens/s",
    "HTTP, 1 clients, against llama-server, tokens/s",
    "HTTP, 16 clients, against llama-server, tokens/s",
    "HTTP, 16 clients, against transformers serve, tokens/s",
    "first token of a 500-token prompt, against llama.cpp's bare prefill",
    "longest pause of a running stream meanwhile, ms",
    "cache hit, Redis, requests/s",
    "warm `make run` to ready, s",
    "memory at rest, MB",
)


@dataclass(frozen=True, slots=True)
class Goal:
    """One line. values: a figure a round; reached: said of their median; note: what the figure is made of."""

    what: str
    goal: str
    values: list[float]
    reached: Callable[[float], bool]
    form: str = ".2f"
    note: str = ""

    def cells(self) -> list[str]:
        """As shown: what, goal, measured, reached."""
        if not self.values:
            return [self.what, self.goal, "not measured", ""]
        measured = table.median(self.values, self.form) + (f" ({self.note})" if self.note else "")
        return [self.what, self.goal, measured, "yes" if self.reached(statistics.median(self.values)) else "no"]


def shown(records: Records, only: Container[str] | None = None) -> str:
    """All goals as a table, or those whose names are in `only`. Without figures a goal is "not measured"."""
    rows = (_decode, _http, _ttft, _speculation, _quality, _cache, _start, _growth)
    goals = [goal for row in rows for goal in row(records.get(row.__name__[1:], _NOTHING))]
    lines = [goal.cells() for goal in goals if only is None or goal.what in only]
    return table.markdown(["", "goal", "measured", "reached"], lines)


_NOTHING: Mapping[str, Any] = {"turns": {}, "facts": {}, "identity": {"options": {}}}


def at_least(what: str, ours: list[float], theirs: list[float], times: float, note: str = "") -> Goal:
    """Ours over theirs, as a ratio round by round."""
    pairs = table.ratios(ours, theirs)
    note = note or (f"{table.median(ours)} / {table.median(theirs)}" if pairs else "")
    return Goal(what, f">= {times:g} x", pairs, lambda value: value >= times, ".2f", note)


def at_most(what: str, goal: str, values: list[float], bound: float, form: str = ".2f", note: str = "") -> Goal:
    """A figure that should stay under a bound."""
    return Goal(what, goal, values, lambda value: value <= bound, form, note)


def _decode(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns, facts = kept["turns"], kept["facts"]
    for rows, times in ((1, 1.1), (8, 1.6), (16, 2.0)):
        ours = decode.speeds(turns, OURS, rows)
        yield at_least(
            f"decode, batch {rows}, against llama.cpp, tokens/s", ours, decode.speeds(turns, THEIRS, rows), times
        )
    for rows in (1, 16):
        floor = decode.floors(turns, facts[OURS], rows, kept["identity"]["options"]["context"]) if facts else []
        pairs = table.ratios(decode.speeds(turns, OURS, rows), floor)
        yield Goal(f"decode, batch {rows}, of the memory's limit", "shown", pairs, lambda value: True, PERCENT)


def _http(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns = kept["turns"]
    for peer, wanted in ((LLAMA_SERVER, (1, 2, 2)), (VLLM, (3, 1.5, 1.3)), (TRANSFORMERS, (3.5, 3, 3.3))):
        for clients, times in zip((1, 8, 16), wanted, strict=True):
            ours, theirs = (http.figures(turns, name, clients, "tokens_per_second") for name in (http.OURS, peer.name))
            yield at_least(f"HTTP, {clients} clients, against {peer.name}, tokens/s", ours, theirs, times)
    ours, bare = (http.figures(turns, name, 16, "tokens_per_second") for name in (http.OURS, http.BARE))
    lost = [1 - share for share in table.ratios(ours, bare)]
    yield at_most("what HTTP and the queue take from the bare engine, 16 clients", "<= 5 %", lost, 0.05, PERCENT)
    ours, theirs = (http.figures(turns, name, 16, "cpu") for name in (http.OURS, TRANSFORMERS.name))
    note = f"{table.median(ours)} s, {table.median(theirs)} s" if theirs else ""
    pairs = table.ratios(ours, theirs)
    yield at_most(
        f"processor seconds for 1,000 tokens, 16 clients, against {TRANSFORMERS.name}", "< 1 x", pairs, 1, note=note
    )


def _ttft(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns = kept["turns"]
    idle, busy, pause = (ttft.column(turns, http.OURS, key) for key in ("idle", "busy", "pause"))
    theirs = ttft.column(turns, THEIRS, "seconds")
    note = f"{table.median(idle, '.2f')} s, {table.median(theirs, '.2f')} s" if theirs else ""
    what = "first token of a 500-token prompt, against llama.cpp's bare prefill"
    yield at_most(what, "<= 0.35 x", table.ratios(idle, theirs), 0.35, note=note)
    yield at_most("the same beside 8 streams, against idle", "<= 2 x", table.ratios(busy, idle), 2)
    yield at_most("longest pause of a running stream meanwhile, ms", "<= 150", [v * 1e3 for v in pause], 150, ".0f")
    cached, prompt = (ttft.column(turns, http.OURS, key) for key in ("second cached", "second prompt tokens"))
    first, note = ttft.column(turns, http.OURS, "prompt tokens"), f"of {table.median(prompt, '.0f')}"
    yield at_least("second turn of a chat, tokens reused, against the first turn's prompt", cached, first, 1, note)


def _speculation(kept: Mapping[str, Any]) -> Iterator[Goal]:
    for name, times in ((speculation.SUMMARY, 1.5), (speculation.CODE, 2), (speculation.TALK, 0.97)):
        on, off = (speculation.speeds(kept["turns"], name, key) for key in ("on", "off"))
        yield at_least(f"with guesses, {name}, against without, tokens/s", on, off, times)


def _quality(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns = kept["turns"]
    for name in (quality.PROMPTS, quality.STEPS):
        ratios = table.ratios(turns.get(name, []), turns.get(quality.REFERENCE, []))
        note = f"{turns[name][0]:.2f} / {turns[quality.REFERENCE][0]:.2f}" if ratios else ""
        yield at_most(f"perplexity against bf16, {name}", "<= 1.2 x", ratios, 1.2, ".3f", note)
    forced = [found["forced"] for found in turns.get("agreement", ())]
    yield Goal("greedy tokens equal to bf16's, after bf16's own", "shown", forced, lambda value: True, PERCENT)


def _cache(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns = kept["turns"]
    for name in (cache.REDIS, cache.SQLITE):
        found = turns.get(name, ())
        speed = [value["per_second"] for value in found]
        # Of 1,870 that an empty route made on the machine where this was set; each answer has a durable audit record.
        yield Goal(f"{name}, requests/s", ">= 300", speed, lambda value: value >= 300, ".0f")
        yield at_most(f"{name}, p99, ms", "< 20", [value["p99"] * 1e3 for value in found], 20, ".1f")


def _start(kept: Mapping[str, Any]) -> Iterator[Goal]:
    found = kept["turns"].get("make run", ())
    yield at_most("warm `make run` to ready, s", "<= 12", [value["ready"] for value in found], 12, ".1f")
    compilers = [float(len(value["compilers"])) for value in found]
    yield at_most("compilers run at a warm start", "0", compilers, 0, ".0f")
    memory = [value["memory"] / 1e6 for value in found]
    yield at_most("memory at rest, MB", "<= 1500", memory, 1500, ".0f")


def _growth(kept: Mapping[str, Any]) -> Iterator[Goal]:
    turns, options = kept["turns"], kept["identity"]["options"]
    speeds = [statistics.median(found["tokens_per_second"] for found in turns[name])
              for name in (f"{count} clients" for count in options.get("clients", ())) if turns.get(name)]  # fmt: skip
    least = min((after / max(speeds[: n + 1]) for n, after in enumerate(speeds[1:])), default=None)
    # 5 % is what rounds differ by.
    yield Goal("throughput from 1 to 64 clients, least against the best of fewer clients", "never falls",
               [] if least is None else [least], lambda value: value >= 0.95)  # fmt: skip
    memory = [abs(grown(readings)) for readings in turns.get("memory", ())]
    yield at_most("memory over a mixed run, change", "<= 2 %", memory, FLAT, PERCENT)
