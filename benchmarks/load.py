"""A small load generator: streamed chat completions over plain sockets, in one asyncio thread.

Takes as little of the machine as it can, since it shares it with the server. Starts no server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

# Topics for prompts of about 30 tokens; a number makes each unlike any before, so that no prefix is reused.
TOPICS = ("a lighthouse", "two rivers", "a clock", "the first snow", "an old map", "bees", "a violin", "the desert")


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Times are seconds from the sending of the request; gaps lie between chunks."""

    tokens: int
    first: float
    total: float
    gaps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """What N clients saw together: tokens a second summed, medians of the rest in seconds."""

    clients: int
    tokens_per_second: float
    first: float
    gap: float
    longest_gap: float
    tokens: int


def prompt(number: int, words: int = 0) -> str:
    """A prompt that no earlier one is a prefix of; `words` more make it longer."""
    filling = " ".join(f"word{n % 97}" for n in range(words))
    return f"{number}: {filling} Tell me a long story about {TOPICS[number % len(TOPICS)]}, with many details."


def run(url: str, model: str, key: str, clients: int, max_tokens: int, first_prompt: int) -> Load:
    """`clients` requests at once, each for `max_tokens` greedy tokens. Raises ConnectionError on any other status."""

    async def everyone() -> tuple[list[Answer], float]:
        begin = time.perf_counter()
        asked = (ask(url, model, key, prompt(first_prompt + n), max_tokens) for n in range(clients))
        answers = await asyncio.gather(*asked)
        return list(answers), time.perf_counter() - begin

    answers, wall = asyncio.run(everyone())
    gaps = [gap for answer in answers for gap in answer.gaps] or [0.0]
    tokens = sum(answer.tokens for answer in answers)
    first = statistics.median(answer.first for answer in answers)
    return Load(clients, tokens / wall, first, statistics.median(gaps), max(gaps), tokens)


async def ask(url: str, model: str, key: str, text: str, max_tokens: int) -> Answer:
    """One streamed chat completion, read to its end."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "stream": True,
            "max_tokens": max_tokens, "stream_options": {"include_usage": True}}  # fmt: skip
    payload = json.dumps(body).encode()
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    begin = time.perf_counter()
    head = (f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
            f"Cache-Control: no-store\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
            "Connection: close\r\n\r\n")  # fmt: skip
    writer.write(head.encode() + payload)
    status = (await reader.readline()).decode(errors="replace").strip()
    if " 200 " not in f"{status} ":
        raise ConnectionError(f"{url}: {status} {(await reader.read(2000)).decode(errors='replace')}")
    times: list[float] = []
    tokens = 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()):
            times.append(time.perf_counter() - begin)
        tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
    writer.close()
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Answer(tokens or len(times), times[0] if times else float("nan"), time.perf_counter() - begin, gaps)
