"""P4: a model thread that hangs or is gone is told to everyone who waits, and comes back or is exchanged."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from errors import ModelUnavailable
from model.engine.engine import Engine
from model.engine.sequence import Sequence
from telemetry import Metrics
from tests.faults import Clock
from tests.model.driving import WAIT, Gate, eventually, failure, read, request
from tests.model.scripted import ScriptedRunner, continuation


class Loads:
    """Makes the runners of one engine; the first one's steps stop at a gate."""

    def __init__(self) -> None:
        self.runners: list[ScriptedRunner] = []
        self.gate: Gate | None = None

    def __call__(self, progress: Callable[[str, int], None]) -> ScriptedRunner:
        self.runners.append(ScriptedRunner(slots=1))
        if len(self.runners) == 1:
            self.gate = Gate(self.runners[0])
        return self.runners[-1]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def engine(clock: Clock, loads: Loads) -> Iterator[Engine]:
    engine = Engine(loads, 64, Metrics(), clock)
    yield engine
    if loads.gate:
        loads.gate.open()
    engine.stop(0)


def in_a_step(engine: Engine, loads: Loads) -> Sequence:
    """A sequence whose first step has begun and does not end."""
    sequence = engine.submit(request([1], timeout=1000))
    eventually(lambda: loads.gate is not None and loads.gate.reached.is_set())
    return sequence


@pytest.mark.promise("P4", injected="a step that does not return", counted="in 2 s")
def test_a_step_that_hangs_is_told_to_everyone_and_a_new_process_is_asked_for(
    engine: Engine, loads: Loads, clock: Clock, counted: Callable[..., None]
) -> None:
    asked: list[str] = []
    engine.on_hang = asked.append
    running, waiting = in_a_step(engine, loads), engine.submit(request([2], timeout=1000))
    clock.offset += 61
    started = time.monotonic()
    told = [failure(sequence).code for sequence in (running, waiting)]
    assert time.monotonic() - started < 2
    assert told == ["engine_stalled"] * 2
    assert engine.status().stage == "stalled" and not engine.status().ready
    with pytest.raises(ModelUnavailable) as refused:
        engine.submit(request([3]))
    assert (refused.value.code, refused.value.retry_after) == ("engine_stalled", 30)
    eventually(lambda: asked == ["no step for 60 seconds"])
    counted(requests_told=len(told), restarts_asked_for=len(asked))


@pytest.mark.promise("P4", injected="a step that returns after all", counted="nobody is answered twice")
def test_a_hang_that_ends_by_itself_heals(
    engine: Engine, loads: Loads, clock: Clock, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    monkeypatch.setattr("model.engine.engine.LOOK_EVERY", 0.01)
    running = in_a_step(engine, loads)
    clock.offset += 61
    with pytest.raises(ModelUnavailable):
        read(running)
    assert loads.gate is not None
    loads.gate.open()
    eventually(lambda: engine.status().ready)
    assert read(engine.submit(request([2], count=3)))[0] == continuation([2], 3)
    assert len(loads.runners) == 2 and loads.runners[0].closed
    samples = [m for m in engine._metrics.finished.collect()[0].samples if m.name.endswith("_total")]
    finished = {m.labels["reason"]: int(m.value) for m in samples}
    counted(loads=len(loads.runners), failed=finished["engine_stalled"], answered_in_full=finished["length"])
    assert finished == {"engine_stalled": 1, "length": 1}


@pytest.mark.promise("P4", injected="an hour of idleness, a load of an hour")
def test_neither_an_idle_hour_nor_a_long_load_is_a_hang(
    engine: Engine, loads: Loads, clock: Clock, counted: Callable[..., None]
) -> None:
    asked: list[str] = []
    engine.on_hang = asked.append
    begun, go_on = threading.Event(), threading.Event()
    plain = engine._load

    def slow(progress: Callable[[str, int], None]) -> Any:
        begun.set()
        assert go_on.wait(WAIT)
        return plain(progress)

    engine._load = slow
    sequence = engine.submit(request([1], count=2, timeout=10_000))
    assert begun.wait(WAIT)
    clock.offset += 3600
    assert engine.status().stage == "loading"
    go_on.set()
    eventually(lambda: loads.gate is not None)
    assert loads.gate is not None
    loads.gate.open()
    texts = [read(sequence)[0]]
    clock.offset += 3600
    texts.append(read(engine.submit(request([2], count=2)))[0])
    counted(requests_served=len(texts), restarts_asked_for=len(asked))
    assert texts == [continuation([1], 2), continuation([2], 2)]
    assert asked == [] and engine.status().ready


@pytest.mark.promise("P4", injected="the model thread killed where it cannot say so", counted="not ready in 2 s")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_without_a_word_is_noticed(
    engine: Engine, loads: Loads, clock: Clock, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    def deadly(self: logging.Logger, *_: object, **__: object) -> None:
        if threading.current_thread().name == "model":
            raise SystemExit("injected")

    sequence = in_a_step(engine, loads)
    waiting = engine.submit(request([2], timeout=1000))
    monkeypatch.setattr(logging.Logger, "error", deadly)
    loads.runners[0].before_step = lambda active: deadly(logging.getLogger())
    assert loads.gate is not None
    started = time.monotonic()
    loads.gate.open()
    told = [failure(reader) for reader in (sequence, waiting)]
    assert time.monotonic() - started < 2 and all(isinstance(error, ModelUnavailable) for error in told)
    assert engine.status().stage == "failed" and not engine.status().ready
    clock.offset += 31
    assert read(engine.submit(request([3], count=2)))[0] == continuation([3], 2), "healed"
    counted(requests_told=len(told), loads=len(loads.runners))
