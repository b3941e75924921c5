"""What the audit log costs: a sync, durable records a second, and cached answers a second with two records each.

    python -m benchmarks.audit [--folder data] [--seconds 3] [--hits 1500]

The answers come through gunicorn and a redis-server of its own, with the demo model. Asserts nothing: it is a
measurement.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.http import machine
from benchmarks.servers import Server, this_service
from ops.stack import free_port
from security.keys import KeyRing
from settings import Settings
from store.journal import Journal
from store.tail import Place

_MASTER = b"b" * 32
# As long as a generation's start.
_RECORD = {
    "kind": "start",
    "id": "f" * 32,
    "writer": "0" * 16,
    "user": "somebody",
    "model": "m" * 20,
    "parameters": {"max_new_tokens": 256, "temperature": 0.6, "top_p": 0.95, "top_k": 50},
    "raw_sha256": "0" * 64,
    "input_sha256": "0" * 64,
}


def sync_ms(folder: Path) -> float:
    """Milliseconds to make 500 bytes durable, the median of 200 times."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            os.write(file.fileno(), b"x" * 500)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begin)
    return sorted(times)[100] * 1e3


def records_per_second(folder: Path, threads: int, seconds: float) -> float:
    """Each thread appends a record, waits until it is durable, and appends the next."""
    journal, end = Journal(_place(folder)), time.monotonic() + seconds
    counts = [0] * threads

    def write(thread: int) -> None:
        while time.monotonic() < end:
            journal.append(_RECORD)
            counts[thread] += 1

    _together(write, threads)
    return sum(counts) / seconds


def from_processes(folder: Path, processes: int, seconds: float) -> float:
    """The same from several processes of four threads each."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(records_per_second, [(folder, 1, 0.1)] * processes)  # imports are done
        return sum(pool.starmap(records_per_second, [(folder, 4, seconds)] * processes))


def hits(server: Server, clients: int, requests: int) -> tuple[float, float]:
    """Cached answers a second, and milliseconds of the server's processor time for each."""
    address = urlsplit(server.url).netloc
    body = json.dumps({"model": server.model, "temperature": 0, "max_tokens": 16,
                       "messages": [{"role": "user", "content": "Why is the sky blue?"}]})  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}

    def ask(connection: http.client.HTTPConnection) -> str | None:
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.headers["X-Cache"]

    def client(_: int) -> None:
        connection = http.client.HTTPConnection(address)
        for _ in range(requests // clients):
            if ask(connection) != "hit":
                raise ConnectionError("an answer did not come from the cache")

    with suppress(http.client.HTTPException):
        ask(http.client.HTTPConnection(address))
    before, begin = server.cpu_seconds, time.perf_counter()
    _together(client, clients)
    return requests / (time.perf_counter() - begin), (server.cpu_seconds - before) * 1e3 / requests


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _together(work: Callable[[int], None], threads: int) -> None:
    running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _place(folder: Path) -> Place:
    return Place(folder / "log", folder / "head", KeyRing([_MASTER]).codes("audit"))


def main() -> None:
    settings = Settings.from_environment()
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=settings.data_dir)
    options.add_argument("--seconds", type=float, default=3)
    options.add_argument("--hits", type=int, default=1500, help="0: without the service")
    chosen = options.parse_args()
    print(f"{machine()}\n\n| | |\n|---|---|")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        print(f"| one sync of 500 bytes | {sync_ms(folder):.2f} ms |", flush=True)
        for threads in (1, 8, 32):
            rate = records_per_second(folder / str(threads), threads, chosen.seconds)
            print(f"| durable records/s, {threads} threads | {rate:.0f} |", flush=True)
        print(f"| durable records/s, 2 processes | {from_processes(folder / 'p', 2, chosen.seconds):.0f} |", flush=True)
        if chosen.hits:
            _served(folder, settings, chosen.hits)


def _served(folder: Path, settings: Settings, requests: int) -> None:
    data = folder / "data"
    data.mkdir()
    (data / "models").symlink_to((settings.data_dir / "models").resolve())
    with _redis(folder) as url:
        os.environ["REDIS_URL"], os.environ["COMPILE"] = url, "off"
        with this_service(free_port(), data, folder / "log.txt") as server:
            for clients in (1, 8, 16):
                rate, cpu = hits(server, clients, requests)
                print(
                    f"| cached answers/s, {clients} clients | {rate:.0f} ({cpu:.1f} ms of processor each) |", flush=True
                )


if __name__ == "__main__":
    main()
