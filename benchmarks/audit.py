"""What the audit log costs: a sync, and durable records a second from threads and processes.

    python -m benchmarks.audit [--folder data] [--seconds 3]

Asserts nothing: it is a measurement. What answers cost with two records each, cache.py measures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from audit.log import AuditLog
from benchmarks.record import machine
from crypto import KeyRing
from db import Database
from settings import Settings

_MASTER = b"b" * 32
# As long as a generation's start.
_RECORD = {
    "kind": "login",
    "request": "f" * 32,
    "outcome": "0" * 16,
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
    log, end = _log(folder), time.monotonic() + seconds
    counts = [0] * threads

    def write(thread: int) -> None:
        while time.monotonic() < end:
            log.append(_RECORD)
            counts[thread] += 1

    _together(write, threads)
    return sum(counts) / seconds


def from_processes(folder: Path, processes: int, seconds: float) -> float:
    """The same from several processes of four threads each."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(records_per_second, [(folder, 1, 0.1)] * processes)  # imports are done
        return sum(pool.starmap(records_per_second, [(folder, 4, seconds)] * processes))


def _together(work: Callable[[int], None], threads: int) -> None:
    running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _log(folder: Path) -> AuditLog:
    database = Database.in_folder(folder)
    database.upgrade()
    return AuditLog(database, KeyRing([_MASTER]).mac_keys("audit"), folder)


def main() -> None:
    settings = Settings.from_environment()
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=settings.data_dir)
    options.add_argument("--seconds", type=float, default=3)
    chosen = options.parse_args()
    print(f"{machine()}\n\n| | |\n|---|---|")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        print(f"| one sync of 500 bytes | {sync_ms(folder):.2f} ms |", flush=True)
        for threads in (1, 8, 32):
            rate = records_per_second(folder / str(threads), threads, chosen.seconds)
            print(f"| durable records/s, {threads} threads | {rate:.0f} |", flush=True)
        print(f"| durable records/s, 2 processes | {from_processes(folder / 'p', 2, chosen.seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
