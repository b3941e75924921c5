"""Drives an engine from a test: makes requests, reads them to the end, waits for conditions, holds the model thread.

Asserts nothing about the engine but that it does not go silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from errors import ServiceError
from model.engine.engine import Engine
from model.engine.sequence import Sequence
from model.types import FinishReason, GenerateRequest, Message, Status
from telemetry import Metrics
from tests.model.scripted import ScriptedRunner

WAIT = 10.0  # seconds until a test gives up


def request(prompt: list[int], count: int = 8, owner: str = "ann", timeout: float = 60) -> GenerateRequest:
    return GenerateRequest("id", owner, "m", (Message("user", "x"),), max_new_tokens=count, timeout=timeout,
                           prompt_ids=tuple(prompt))  # fmt: skip


def read(sequence: Sequence) -> tuple[list[int], FinishReason]:
    """All tokens and how it ended; what it waited for is passed over."""
    tokens: list[int] = []
    while True:
        item = sequence.get(WAIT)
        assert item is not None, "the engine went silent"
        if isinstance(item, FinishReason):
            return tokens, item
        if not isinstance(item, Status):
            tokens.append(item)


def failure(sequence: Sequence) -> ServiceError:
    """The error that it ends with."""
    with pytest.raises(ServiceError) as caught:
        read(sequence)
    return caught.value


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


@contextmanager
def serving(runner: ScriptedRunner, max_queue: int = 64) -> Iterator[Engine]:
    engine = Engine(lambda progress: runner, max_queue, Metrics())
    try:
        yield engine
    finally:
        runner.before_step = lambda active: None
        engine.stop(0)


class Gate:
    """Holds the model thread before a step, or a chunk, until it is opened."""

    def __init__(self, runner: ScriptedRunner, before: str = "step") -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        setattr(runner, f"before_{before}", self._pass)

    def _pass(self, *_: object) -> None:
        self.reached.set()
        assert self._open.wait(WAIT)

    def open(self) -> None:
        self._open.set()
