"""How the engine loads, fails to load, and stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from errors import ModelUnavailable
from model.engine.engine import Engine
from model.types import FinishReason, Status
from model.weights.catalogue import ModelError
from telemetry import Metrics
from tests.model.driving import WAIT, Gate, eventually, failure, read, request
from tests.model.scripted import ScriptedRunner, continuation


def test_a_reader_that_leaves_during_the_load_makes_room_at_once() -> None:
    go_on = threading.Event()

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        assert go_on.wait(WAIT)
        return ScriptedRunner()

    engine = Engine(load, 2, Metrics())
    for _ in range(10):
        leaving = [engine.submit(request([1])) for _ in range(2)]
        for sequence in leaving:
            sequence.close()
            assert read(sequence) == ([], FinishReason.CANCELLED)
    staying = engine.submit(request([2], count=2))
    go_on.set()
    assert read(staying)[0] == continuation([2], 2)
    engine.stop(0)


def test_the_model_loads_once_however_many_ask_together() -> None:
    loads: list[int] = []
    runner = ScriptedRunner(slots=4)

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        loads.append(1)
        progress("loading", 40)
        return runner

    engine = Engine(load, 64, Metrics())
    barrier, texts = threading.Barrier(50), []

    def ask() -> None:
        barrier.wait()
        texts.append(read(engine.submit(request([3], count=4)))[0])

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.stop(1)
    assert loads == [1] and texts == [continuation([3], 4)] * 50


def test_a_request_hears_how_the_loading_goes() -> None:
    go_on = threading.Event()

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        progress("loading", 40)
        assert go_on.wait(WAIT)
        return ScriptedRunner()

    engine = Engine(load, 64, Metrics())
    sequence = engine.submit(request([1], count=1))
    statuses = [sequence.get(WAIT)]
    while statuses[-1] != Status("loading", percent=40):
        statuses.append(sequence.get(WAIT))
    assert (engine.status().stage, engine.status().percent, engine.status().ready) == ("loading", 40, False)
    go_on.set()
    assert read(sequence)[0] == continuation([1], 1)
    assert engine.status().ready
    engine.stop(0)


def test_a_model_that_does_not_load_says_so_and_is_not_tried_in_a_loop() -> None:
    tries: list[int] = []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        tries.append(1)
        raise ModelError("/secret/path: shard is cut short")

    engine = Engine(load, 64, Metrics())
    told: list[str] = []
    engine.on_failure = told.append
    engine.start()
    with pytest.raises(ModelUnavailable) as refused:
        read(engine.submit(request([1])))
    assert "/secret" not in refused.value.message
    eventually(lambda: engine.status().stage == "failed")
    assert told == ["/secret/path: shard is cut short"]
    for _ in range(20):
        with pytest.raises(ModelUnavailable):
            engine.submit(request([1]))
    assert len(tries) == 1
    assert not engine.status().ready and "/secret" not in (engine.status().reason or "")


@pytest.mark.promise("P11", injected="a stop in the middle of a stream", counted="it ends in full, newcomers are told")
def test_stopping_lets_running_streams_end_and_refuses_the_rest(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    engine = Engine(lambda progress: runner, 64, Metrics())
    running = engine.submit(request([1], count=5))
    assert gate.reached.wait(WAIT)
    queued = [engine.submit(request([n])) for n in (2, 3)]
    stopper = threading.Thread(target=engine.stop, args=(WAIT,))
    stopper.start()
    eventually(lambda: engine.status().stage == "stopping")
    with pytest.raises(ModelUnavailable):
        engine.submit(request([4]))
    gate.open()
    text, ending = read(running)
    assert (text, ending) == (continuation([1], 5), FinishReason.LENGTH)
    told = [failure(sequence).code for sequence in queued]
    counted(tokens_streamed=len(text), queued_requests_told=told.count("stopping"))
    assert told == ["stopping"] * 2
    stopper.join(WAIT)
    assert engine.status().stage == "stopped" and runner.closed


@pytest.mark.promise("P11", injected="a stop, and streams longer than the grace")
def test_streams_that_outlast_the_grace_end_with_an_error(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=8)
    runner.before_step = lambda active: time.sleep(0.005)
    engine = Engine(lambda progress: runner, 64, Metrics())
    endless = [engine.submit(request([n + 1], count=4000)) for n in range(8)]
    assert all(sequence.get(WAIT) is not None for sequence in endless)
    engine.stop(0.05)
    ends = [failure(sequence).code for sequence in endless]
    counted(streams=len(endless), errors=ends.count("stopping"))
    assert ends == ["stopping"] * 8


def test_stopping_does_not_wait_for_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.engine.STOP_PATIENCE", 0.05)
    go_on = threading.Event()

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        assert go_on.wait(WAIT)
        return ScriptedRunner()

    engine = Engine(load, 64, Metrics())
    sequence = engine.submit(request([1]))
    engine.stop(0.05)
    with pytest.raises(ModelUnavailable, match="stopping"):
        read(sequence)
    go_on.set()
