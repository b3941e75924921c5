"""The engine's invariants: admission, cancelling, deadlines, faults, recovery and stopping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from model.engine import Engine
from model.registry import ModelError
from model.scheduler import _BARREN, Batch
from model.sequence import Finished, Sequence
from model.types import (
    DeadlineExceeded,
    FinishReason,
    GenerateRequest,
    GenerationFailed,
    Message,
    ModelUnavailable,
    Overloaded,
    ServiceError,
    Status,
)
from telemetry import Metrics
from tests.model.scripted import NOT_FINITE, UNFIT, ScriptedRunner, continuation

WAIT = 10.0


def request(prompt: list[int], count: int = 8, owner: str = "ann", timeout: float = 60) -> GenerateRequest:
    return GenerateRequest("id", owner, "m", (Message("user", "x"),), max_new_tokens=count, timeout=timeout,
                           prompt_ids=tuple(prompt))  # fmt: skip


def read(sequence: Sequence) -> tuple[list[int], FinishReason]:
    """All tokens and how it ended; what it waited for is passed over."""
    tokens: list[int] = []
    while True:
        item = sequence.get(WAIT)
        assert item is not None, "the engine went silent"
        if isinstance(item, Finished):
            return tokens, item.reason
        if not isinstance(item, Status):
            tokens.append(item)


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
    """Holds the model thread before a step until it is opened."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        runner.before_step = self._pass

    def _pass(self, active: tuple[int, ...]) -> None:
        self.reached.set()
        assert self._open.wait(WAIT)

    def open(self) -> None:
        self._open.set()


def test_texts_are_the_same_alone_and_in_a_full_batch() -> None:
    runner = ScriptedRunner(slots=4)
    with serving(runner) as engine:
        prompts = [[n + 1] * (3 + 40 * n) for n in range(12)]
        sequences = [engine.submit(request(prompt, count=40 + n)) for n, prompt in enumerate(prompts)]
        for n, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            assert read(sequence) == (continuation(prompt, 40 + n), FinishReason.LENGTH)
    assert len(runner.threads) == 1 and threading.get_ident() not in runner.threads
    assert max(len(active) for active in runner.steps) == 4


def test_long_prompts_are_computed_in_chunks_between_steps() -> None:
    runner = ScriptedRunner(slots=2)
    with serving(runner) as engine:
        streaming = engine.submit(request([5], count=200))
        assert streaming.get(WAIT) is not None
        long = engine.submit(request([7] * 300, count=2))
        assert read(long)[0] == continuation([7] * 300, 2)
        streaming.close()
    chunks = [count for slot, start, count in runner.prefilled if count > 1]
    assert sum(chunks) == 299 and max(chunks) <= 64


def test_a_request_waits_in_line_and_hears_its_position() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        first = engine.submit(request([1], count=3))
        assert gate.reached.wait(WAIT)
        waiting = [engine.submit(request([2], count=1)) for _ in range(2)]
        gate.open()
        read(first)
        statuses = [item for item in (waiting[1].get(WAIT), waiting[1].get(WAIT)) if isinstance(item, Status)]
        positions = [status.position for status in statuses if status.stage == "queued"]
        assert positions and positions == sorted(positions, reverse=True)
        assert all(status.eta_seconds and status.eta_seconds >= 1 for status in statuses)
        assert [read(sequence)[0] for sequence in waiting] == [continuation([2], 1)] * 2


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner, max_queue=2) as engine:
        sequences = [engine.submit(request([1], count=4))]
        assert gate.reached.wait(WAIT)
        sequences += [engine.submit(request([1], count=4)) for _ in range(2)]
        with pytest.raises(Overloaded) as refused:
            engine.submit(request([1]))
        assert refused.value.retry_after and refused.value.retry_after >= 1
        gate.open()
        for sequence in sequences:
            assert read(sequence)[1] is FinishReason.LENGTH


def test_the_time_to_come_back_grows_with_the_backlog() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        engine.submit(request([1], count=100))
        assert gate.reached.wait(WAIT)
        times = []
        for _ in range(3):
            engine.submit(request([1], count=1000))
            times.append(engine._seconds_for(engine._waiting.tokens))
        # One lane at the first guess of 50 tokens/s: 20 seconds for each thousand.
        assert times == [pytest.approx(22, abs=0.5), pytest.approx(42, abs=0.5), pytest.approx(62, abs=0.5)]
        gate.open()


def test_a_closed_stream_frees_its_slot_within_two_steps() -> None:
    runner = ScriptedRunner(slots=1)
    with serving(runner) as engine:
        closed = engine.submit(request([1], count=4000))
        assert closed.get(WAIT) is not None
        closed.close()
        steps = len(runner.steps)
        next_one = engine.submit(request([2], count=1))
        assert read(next_one)[0] == continuation([2], 1)
        assert len(runner.steps) - steps <= 3  # two at most for the closed one, one for the other
        assert read(closed)[1] is FinishReason.CANCELLED


def test_a_queued_request_can_be_given_up() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        first = engine.submit(request([1], count=2))
        assert gate.reached.wait(WAIT)
        queued = engine.submit(request([2]))
        queued.close()
        gate.open()
        assert read(queued) == ([], FinishReason.CANCELLED)
        assert read(first)[1] is FinishReason.LENGTH


def test_a_request_in_prefill_can_be_given_up() -> None:
    runner = ScriptedRunner(slots=2)
    in_prefill, closed = threading.Event(), threading.Event()

    def pause(active: tuple[int, ...]) -> None:
        if any(count == 64 for _, _, count in runner.prefilled):
            in_prefill.set()
            assert closed.wait(WAIT)

    runner.before_step = pause
    with serving(runner) as engine:
        streaming = engine.submit(request([1], count=4000))
        assert streaming.get(WAIT) is not None
        long = engine.submit(request([3] * 2000))
        assert in_prefill.wait(WAIT)
        long.close()
        closed.set()
        assert read(long) == ([], FinishReason.CANCELLED)
        assert sum(count for _, _, count in runner.prefilled) < 1999
        streaming.close()


def test_deadlines_end_running_and_waiting_requests_with_an_error() -> None:
    runner = ScriptedRunner(slots=1)
    runner.before_step = lambda active: time.sleep(0.01)  # a model that takes its time
    with serving(runner) as engine:
        running = engine.submit(request([1], count=4000, timeout=0.2))
        queued = engine.submit(request([2], count=4000, timeout=0.1))
        for sequence in (queued, running):
            with pytest.raises(DeadlineExceeded):
                read(sequence)


def test_a_reader_does_not_wait_for_a_model_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.sequence._PATIENCE", 0.1)
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        sequence = engine.submit(request([1], timeout=0.1))
        assert gate.reached.wait(WAIT)
        with pytest.raises(DeadlineExceeded):
            read(sequence)
        gate.open()


def test_the_next_turn_of_a_chat_prefills_only_what_is_new() -> None:
    runner = ScriptedRunner(slots=2)
    with serving(runner) as engine:
        first = engine.submit(request([9] * 100, count=5))
        answer, _ = read(first)
        before = sum(count for _, _, count in runner.prefilled)
        again = [9] * 100 + answer + [4, 4, 4]
        second = engine.submit(request(again, count=3))
        assert read(second)[0] == continuation(again, 3)
        assert second.cached == 104  # all but the last generated token, whose KV was never needed
        assert sum(count for _, _, count in runner.prefilled) - before == len(again) - 1 - 104


def test_another_users_prompt_is_computed_from_scratch() -> None:
    runner = ScriptedRunner(slots=1)
    with serving(runner) as engine:
        read(engine.submit(request([9] * 100, owner="ann")))
        other = engine.submit(request([9] * 100, owner="bob"))
        read(other)
        assert other.cached == 0


def test_a_poisonous_row_fails_alone() -> None:
    runner = ScriptedRunner(slots=4)

    def poison(active: tuple[int, ...]) -> None:
        if any(runner.written[slot].get(0, runner.armed[slot][0]) == 66 for slot in active):
            raise RuntimeError("injected")

    runner.before_step = poison
    with serving(runner) as engine:
        prompts = [[1], [66, 2], [3], [4]]
        sequences = [engine.submit(request(prompt, count=6)) for prompt in prompts]
        with pytest.raises(GenerationFailed):
            read(sequences[1])
        for n in (0, 2, 3):
            assert read(sequences[n])[0] == continuation(prompts[n], 6)


def test_a_batch_too_large_for_the_memory_is_split_and_answered() -> None:
    runner = ScriptedRunner(slots=4)
    refused: list[int] = []

    def small_memory(active: tuple[int, ...]) -> None:
        if len(active) > 2:
            refused.append(len(active))
            raise MemoryError("injected")

    runner.before_step = small_memory
    with serving(runner) as engine:
        sequences = [engine.submit(request([n + 1], count=6)) for n in range(4)]
        for n, sequence in enumerate(sequences):
            assert read(sequence)[0] == continuation([n + 1], 6)
    assert refused


def test_a_row_without_finite_numbers_fails_alone_and_its_kv_is_wiped() -> None:
    runner = ScriptedRunner(slots=2)
    runner.spoil = lambda slot: runner.written[slot].get(0) == 500
    with serving(runner) as engine:
        good, bad = engine.submit(request([1], count=6)), engine.submit(request([500], count=6))
        with pytest.raises(GenerationFailed):
            read(bad)
        assert read(good)[0] == continuation([1], 6)
        eventually(lambda: all(500 not in written.values() for written in runner.written))


def test_a_prompt_that_the_model_chokes_on_fails_alone() -> None:
    """At the first touch, in the middle of its prefill, or by numbers that are not finite."""
    runner = ScriptedRunner(slots=2)
    with serving(runner) as engine:
        good = engine.submit(request([1], count=60))
        for prompt in ([UNFIT, 1], [1, UNFIT, 1], [1] * 70 + [NOT_FINITE, 1]):
            with pytest.raises(GenerationFailed):
                read(engine.submit(request(prompt)))
        assert read(good)[0] == continuation([1], 60)
        assert not any(NOT_FINITE in written.values() for written in runner.written)
        assert engine.status().ready


def test_a_step_that_fails_for_everyone_makes_the_engine_load_again() -> None:
    runners: list[ScriptedRunner] = []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runners.append(ScriptedRunner())
        if len(runners) == 1:
            runners[0].before_step = _break
        return runners[-1]

    engine = Engine(load, 64, Metrics())
    for _ in range(_BARREN):
        with pytest.raises(ServiceError):
            read(engine.submit(request([1])))
    assert read(engine.submit(request([2], count=3)))[0] == continuation([2], 3)
    assert len(runners) == 2 and engine.status().reason is None
    engine.stop(0)


def _break(active: tuple[int, ...]) -> None:
    raise RuntimeError("injected: the device is lost")


def test_metrics_follow_what_is_compiled_and_what_could_not_be() -> None:
    runner = ScriptedRunner()
    metrics = Metrics()
    batch = Batch(runner, metrics, time.monotonic)
    for runner.compiled in ((1, 0), (1, 2), (3, 2)):
        batch.adopt(idle=True)
    assert metrics.registry.get_sample_value("llm_compiled_buckets") == 3
    assert metrics.registry.get_sample_value("llm_compile_fallbacks_total") == 2


def test_whoever_leaves_during_the_load_makes_room_at_once() -> None:
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
    engine.start(told.append)
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


def test_a_killed_model_thread_tells_everyone_and_comes_back() -> None:
    runners: list[ScriptedRunner] = []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runners.append(ScriptedRunner(slots=1))
        if len(runners) == 1:
            runners[0].before_step = lambda active: _exit() if len(runners[0].steps) == 2 else None
        return runners[-1]

    engine = Engine(load, 64, Metrics())
    victim = engine.submit(request([1], count=50))
    waiting = engine.submit(request([2], count=2))
    with pytest.raises(ModelUnavailable):
        read(victim)
    assert read(waiting)[0] == continuation([2], 2)  # it was only waiting: the new thread serves it
    assert len(runners) == 2 and runners[0].closed and engine.status().ready
    engine.stop(0)


def _exit() -> None:
    raise SystemExit("injected")


def test_an_engine_that_cannot_recover_goes_down_and_says_so() -> None:
    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runner = ScriptedRunner()
        runner.before_step = lambda active: _exit()
        return runner

    engine = Engine(load, 64, Metrics())
    for _ in range(5):
        try:
            read(engine.submit(request([1])))
        except ModelUnavailable:
            continue
    eventually(lambda: engine.status().stage == "failed")
    assert not engine.status().ready


def test_stopping_lets_running_streams_end_and_refuses_the_rest() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    engine = Engine(lambda progress: runner, 64, Metrics())
    running = engine.submit(request([1], count=5))
    assert gate.reached.wait(WAIT)
    queued = engine.submit(request([2]))
    stopper = threading.Thread(target=engine.stop, args=(WAIT,))
    stopper.start()
    eventually(lambda: engine.status().stage == "stopping")
    with pytest.raises(ModelUnavailable):
        engine.submit(request([3]))
    gate.open()
    assert read(running) == (continuation([1], 5), FinishReason.LENGTH)
    with pytest.raises(ModelUnavailable):
        read(queued)
    stopper.join(WAIT)
    assert engine.status().stage == "stopped" and runner.closed


def test_streams_that_outlast_the_grace_end_with_an_error() -> None:
    runner = ScriptedRunner(slots=1)
    runner.before_step = lambda active: time.sleep(0.005)
    engine = Engine(lambda progress: runner, 64, Metrics())
    endless = engine.submit(request([1], count=4000))
    assert endless.get(WAIT) is not None
    engine.stop(0.05)
    with pytest.raises(ModelUnavailable):
        read(endless)


def test_a_prompt_that_cannot_fit_never_takes_a_slot() -> None:
    runner = ScriptedRunner(slots=1, context=64)
    with serving(runner) as engine:
        with pytest.raises(ServiceError) as refused:
            read(engine.submit(request([1] * 60, count=10)))
        assert refused.value.status == 422 and not runner.steps
        assert read(engine.submit(request([1] * 60, count=4)))[1] is FinishReason.LENGTH


def test_stopping_does_not_wait_for_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.STOP_PATIENCE", 0.05)
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
