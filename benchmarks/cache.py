"""Cache hits a second through gunicorn, with Redis and with SQLite, beside an empty route that only checks a token.

    python -m benchmarks.cache [--rounds 3] [--seconds 10] [--connections 4] [--fresh]

One answer is made, then asked for again and again over kept-alive connections; every answer must be a hit. The empty
route runs under gunicorn with as many threads. The load generator takes part of the same cores, from all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import record, table
from benchmarks.http import Start, in_turns
from benchmarks.load import hang_up, request
from benchmarks.record import Record
from benchmarks.servers import Server, data_folder, other_server, redis, this_service
from ops.stack import free_port
from settings import Settings

REDIS, SQLITE, EMPTY = "cache hit, Redis", "cache hit, SQLite", "empty route with a token"
BODY = {"prompt": "Name the four seasons.", "temperature": 0, "max_new_tokens": 48}


@dataclass(frozen=True, slots=True)
class Hits:
    """What a storm of equal requests saw. Latencies in seconds."""

    per_second: float
    p50: float
    p99: float


def storm(url: str, key: str, connections: int, seconds: float, expect: bytes) -> Hits:
    """Equal requests over kept-alive connections. Raises ConnectionError for an answer without `expect` in its head."""
    raw, place = request(url, key, BODY), urlsplit(url)

    async def one(end: float) -> list[float]:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        times = []
        try:
            while (begin := time.perf_counter()) < end:
                writer.write(raw)
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200") or expect not in head.lower():
                    raise ConnectionError(f"{url}: {head[:300]!r}")
                await reader.readexactly(length(head))
                times.append(time.perf_counter() - begin)
        finally:
            await hang_up(writer)
        return times

    async def everyone() -> list[float]:
        end = time.perf_counter() + seconds
        found = await asyncio.gather(*(one(end) for _ in range(connections)))
        return sorted(value for times in found for value in times)

    begin = time.perf_counter()
    times = asyncio.run(everyone())
    wall = time.perf_counter() - begin
    return Hits(len(times) / wall, statistics.median(times), times[int(0.99 * (len(times) - 1))])


def length(head: bytes) -> int:
    """The body's bytes by the head of an answer; 0 where it does not say."""
    lines = (line.split(b":") for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return next((int(value) for _, value in lines), 0)


def turn(start: Start, chosen: argparse.Namespace) -> dict[str, float]:
    """One turn of one server: a second to warm up, then the storm."""
    with start(free_port()) as server:
        hit = b"" if server.name == EMPTY else b"x-cache: hit"
        if hit:
            storm(server.url, server.key, 1, 0.01, b"")  # the answer is made
        storm(server.url, server.key, chosen.connections, 1, hit)
        before = server.cpu_seconds
        hits = storm(server.url, server.key, chosen.connections, chosen.seconds, hit)
        cpu = (server.cpu_seconds - before) / chosen.seconds
        return {"per_second": hits.per_second, "p50": hits.p50, "p99": hits.p99, "cores": cpu}


@contextmanager
def service(port: int, settings: Settings, folder: Path, name: str) -> Iterator[Server]:
    """The service, asked at /generate, with answers kept in Redis or in SQLite."""
    data = data_folder(settings, folder)
    with redis(folder / "redis.log") as url:
        more = {"REDIS_URL": url if name == REDIS else "", "COMPILE": "off"}
        with this_service(port, data, folder / "service.log", more) as server:
            server.name, server.url = name, server.url.removesuffix("/v1") + "/generate"
            yield server


@contextmanager
def empty(port: int, folder: Path, threads: int) -> Iterator[Server]:
    """The empty route, under gunicorn as the service is."""
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "gunicorn", "-c", os.devnull, "-k", "gthread", "--threads", str(threads),
               "--no-control-socket", "-b", address, "benchmarks.empty:create()"]  # fmt: skip
    with other_server(EMPTY, command, f"http://{address}", "/login", folder / "empty.log") as server:
        with urllib.request.urlopen(f"{server.url}/login", timeout=30) as answer:
            server.key = str(json.load(answer)["access_token"])
        server.url += "/empty"
        yield server


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet."""
    if kept.has([REDIS, SQLITE, EMPTY], chosen.rounds):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known: dict[str, Callable[[int], AbstractContextManager[Server]]] = {
            REDIS: lambda port: service(port, settings, folder, REDIS),
            SQLITE: lambda port: service(port, settings, folder, SQLITE),
            EMPTY: lambda port: empty(port, folder, chosen.connections * 2),
        }
        for number in range(chosen.rounds):
            in_turns(kept, known, number, partial(turn, chosen=chosen))


def shown(turns: Mapping[str, Any]) -> str:
    """The table of this row."""

    def values(name: str, key: str, scale: float = 1) -> list[float]:
        return [found[key] * scale for found in turns.get(name, ())]

    lines = [
        [name, table.median(values(name, "per_second"), ".0f"), table.median(values(name, "p50", 1e3)),
         table.median(values(name, "p99", 1e3)), table.median(values(name, "cores"), ".2f"),
         table.ratio(values(name, "per_second"), values(EMPTY, "per_second"))]
        for name in (REDIS, SQLITE, EMPTY)
    ]  # fmt: skip
    return table.markdown(["", "requests/s", "p50, ms", "p99, ms", "cores used", "of the empty route"], lines)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"{chosen.connections} connections, medians of {chosen.rounds} rounds", shown(kept.turns)


def main() -> None:
    parser = record.options(__doc__, rounds=3, minutes=10)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=4, help="as many as requests wait at once")
    record.run("cache", parser, measure, _told)


if __name__ == "__main__":
    main()
