"""A child process that computes bare steps, turn by turn: one JSON line in, one JSON line out.

Imports nothing but the standard library, since peers run it in environments of their own. Measures nothing itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
Turn = dict[str, Any]  # JSON both ways; each worker's `answer` says which keys it reads and writes


class WorkerFailed(Exception):
    """A worker ended or refused. The message is its last line."""


def prompt(row: int, count: int) -> list[int]:
    """`count` token ids that differ from row to row; the same for every engine that has this vocabulary."""
    return [100 + (7 * place + 131 * row) % 900 for place in range(count)]


class Worker:
    """A running child as a context; `ask` is one turn. Between turns it waits for input and uses no processor."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, settings: Mapping[str, str], ending: float = 60
    ) -> None:
        self._command, self._log, self._settings, self._ending = [str(part) for part in command], log, settings, ending

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ | self._settings, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()  # which ends it
        try:
            self._child.wait(self._ending if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def ask(self, do: str, **given: int) -> Turn:
        """What the child answers. Raises WorkerFailed."""
        assert self._child.stdin and self._child.stdout
        try:
            self._child.stdin.write(json.dumps({"do": do} | given) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the log says why, below
        line = self._child.stdout.readline()
        if not line:
            lines = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise WorkerFailed(lines[-1][:300])
        answer: Turn = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(str(answer["failed"]))
        return answer


def serve(answers: Mapping[str, Callable[..., Turn]]) -> None:
    """The child's side: answers turns until its input ends. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            turn = json.loads(line)
            try:
                answer = answers[turn.pop("do")](**turn)
            except Exception as error:  # whatever it is, the parent wants to go on with the other peers
                answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(answer), file=out, flush=True)
