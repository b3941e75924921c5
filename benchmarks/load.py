"""A small load generator: streamed chat completions over plain sockets, in one asyncio thread.

Takes as little of the machine as it can, since it shares it with the server. Starts no server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# Topics for prompts of about 30 tokens; a number makes each unlike any before, so that no prefix is reused.
TOPICS = ("a lighthouse", "two rivers", "a clock", "the first snow", "an old map", "bees", "a violin", "the desert")


@dataclass(slots=True)
class Answer:
    """One streamed answer, filled as it comes. Times are of time.perf_counter; usage is what the server counted."""

    sent: float = float("nan")
    times: list[float] = field(default_factory=list)  # of each piece of text
    ended: float = float("nan")
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds from sending to the first text."""
        return self.times[0] - self.sent if self.times else float("nan")

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]

    @property
    def tokens(self) -> int:
        """New tokens, by the server's count where it gives one."""
        return int(self.usage.get("completion_tokens") or len(self.times))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, 0 where the server does not say."""
        return int(self.usage.get("prompt_tokens") or 0)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the server did not compute again, 0 where it does not say."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


@dataclass(frozen=True, slots=True)
class Load:
    """What N clients saw together: tokens a second summed, medians of the rest in seconds."""

    clients: int
    tokens_per_second: float
    first: float
    gap: float
    longest_gap: float
    slowest: float  # the 95th percentile of whole answers
    tokens: int
    prompt_tokens: int  # the median


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask: an OpenAI-compatible server, its model's name, and a key for it."""

    url: str
    model: str
    key: str = ""


def prompt(number: int, words: int = 0) -> str:
    """A prompt that no earlier one is a prefix of; `words` more make it longer."""
    filling = " ".join(f"word{n % 97}" for n in range(words))
    return f"{number}: {filling} Tell me a long story about {TOPICS[number % len(TOPICS)]}, with many details."


def run(target: Target, clients: int, max_tokens: int, first_prompt: int) -> Load:
    """`clients` requests at once, each for `max_tokens` greedy tokens. Raises ConnectionError on any other status."""

    async def everyone() -> list[Answer]:
        asked = (ask(target, prompt(first_prompt + n), max_tokens) for n in range(clients))
        return list(await asyncio.gather(*asked))

    begin = time.perf_counter()
    return summary(asyncio.run(everyone()), time.perf_counter() - begin)


def summary(answers: list[Answer], wall: float) -> Load:
    """The load that these answers made together in `wall` seconds."""
    gaps = [gap for answer in answers for gap in answer.gaps] or [0.0]
    tokens, whole = sum(answer.tokens for answer in answers), sorted(answer.ended - answer.sent for answer in answers)
    first = statistics.median(answer.first for answer in answers)
    prompts = int(statistics.median(answer.prompt_tokens for answer in answers))
    slowest = whole[min(len(whole) - 1, int(0.95 * len(whole)))]
    return Load(len(answers), tokens / wall, first, statistics.median(gaps), max(gaps), slowest, tokens, prompts)


async def ask(target: Target, text: str | list[dict[str, str]], max_tokens: int, into: Answer | None = None) -> Answer:
    """One streamed chat completion, read to its end. into: an answer to fill, for who watches it meanwhile."""
    answer = into or Answer()
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    body = {"model": target.model, "messages": messages, "temperature": 0, "stream": True,
            "max_tokens": max_tokens, "stream_options": {"include_usage": True}}  # fmt: skip
    place = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    answer.sent = time.perf_counter()
    try:
        writer.write(
            request(f"{target.url}/chat/completions", target.key, body, "Cache-Control: no-store", "Connection: close")
        )
        status = (await reader.readline()).decode(errors="replace").strip()
        if " 200 " not in f"{status} ":
            raise ConnectionError(f"{target.url}: {status} {(await reader.read(2000)).decode(errors='replace')}")
        async for line in reader:
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]))
    finally:
        answer.ended = time.perf_counter()
        await hang_up(writer)
    return answer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a connection, whatever state it is in."""
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def request(url: str, key: str, body: object, *more: str) -> bytes:
    """A POST as bytes; `more` are header lines."""
    place, payload = urlsplit(url), json.dumps(body).encode()
    lines = [f"POST {place.path} HTTP/1.1", f"Host: {place.netloc}", f"Authorization: Bearer {key}",
             "Content-Type: application/json", f"Content-Length: {len(payload)}", *more]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + payload


def _take(answer: Answer, event: dict[str, Any]) -> None:
    pieces = [(choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()]
    if any(pieces):
        answer.times.append(time.perf_counter())
        answer.text += "".join(piece or "" for piece in pieces)
    answer.usage = event.get("usage") or answer.usage
