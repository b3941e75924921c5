"""What the tests break inside the engine: single words of a prompt that make the step which reads them fail.

Needs no torch: the engine is real and the model is arithmetic.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from model.engine.scheduler import Work
from model.local import LocalBackend
from model.types import Message, Progress
from tests.model.scripted import ScriptedRunner

# word: the token that it becomes, and what that does to every step that has it in its batch
POISON = {"!raise": 90_011, "!memory": 90_012, "!nan": 90_013, "!hang": 90_014, "!kill": 90_015}


class PoisonedRunner(ScriptedRunner):
    """pace: seconds that a step takes. `injected` counts the faults."""

    def __init__(self, slots: int, pace: float = 0.0) -> None:
        super().__init__(slots, context=1 << 20)
        self.injected = 0
        self.before_step = self._suffer
        self.spoil = lambda one: self._holds(one, "!nan")
        self._computes = threading.Event()
        self._pace = pace

    def details(self) -> Mapping[str, str | int]:
        return {**super().details(), "injected": self.injected, "pid": os.getpid()}

    def _suffer(self, rows: tuple[int, ...]) -> None:
        self._computes.wait(self._pace)
        words = {word for one in self.work for word in POISON if self._holds(one, word)}
        if "!raise" in words:
            raise RuntimeError("injected")
        if "!memory" in words:
            raise MemoryError("injected")
        if "!kill" in words:
            raise SystemExit("injected")
        if "!hang" in words:
            self._computes.wait()

    def _holds(self, one: Work, word: str) -> bool:
        """Among the first tokens of what the sequence has read, or is about to."""
        found = POISON[word] in [*self.read(one)[:64], *one.tokens]
        self.injected += found
        return found


class _Letters:
    """A tokenizer for which a word is a token, and a model's token one printable letter."""

    think = think_open = None

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        words = [word for message in messages for word in message.content.split()]
        return tuple(POISON.get(word) or sum(word.encode()) % 9000 + 1 for word in ["<begin>", *words])

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(31 + id) for id in ids)

    def unfinished(self, ids: Sequence[int]) -> int:
        return 0


class PoisonedBackend(LocalBackend):
    """The real Backend over the real engine, with such a tokenizer and such a runner."""

    def _rendered(self, timeout: float) -> _Letters:  # type: ignore[override]
        return _Letters()

    def _load(self, progress: Progress) -> PoisonedRunner:
        return PoisonedRunner(self._settings.slots, float(os.environ.get("PACE", "0")))

    def fingerprint(self) -> str:
        return "arithmetic"
