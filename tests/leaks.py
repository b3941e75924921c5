"""Looks through what the services of a test run have written for what must never be there.

Knows only files of the service's own making: what a test itself wrote may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

TOKEN = re.compile(rb"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}")  # a JWT
_WRITTEN = re.compile(r"log|.*\.log|metrics|.*\.sqlite3(-wal|-shm)?|.*\.jsonl|head")
_MOST = 256 << 20  # bytes: larger files are weights


def written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Logs, databases and audit segments below `folder`, with their contents."""
    for file in sorted(folder.rglob("*")):
        if _WRITTEN.fullmatch(file.name) and file.is_file() and file.stat().st_size < _MOST:
            yield file, file.read_bytes()


def leaks(folder: Path, secrets: Iterable[str]) -> list[str]:
    """Each file that holds a token or one of the secrets, with what it was."""
    words = [secret.encode() for secret in secrets]
    return [
        f"{file}: {found.decode()}"
        for file, content in written(folder)
        for found in [word for word in words if word in content] + TOKEN.findall(content)
    ]
