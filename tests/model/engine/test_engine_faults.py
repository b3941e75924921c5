"""What the engine does when the model misbehaves: one fails alone, or all hear of it and it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from errors import GenerationFailed, ModelUnavailable
from model.engine.engine import Engine
from model.engine.scheduler import _MAX_FAILURES, Scheduler
from telemetry import Metrics
from tests.model.driving import eventually, failure, read, request, serving
from tests.model.scripted import NOT_FINITE, UNFIT, ScriptedRunner, continuation


@pytest.mark.promise(
    "P2",
    injected="a step that raises for one row of four",
    counted="token for token as alone",
)
def test_a_poisonous_row_fails_alone(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=4)

    def poison(active: tuple[int, ...]) -> None:
        if any([*runner.read(one), *one.tokens][0] == 66 for one in runner.work):
            raise RuntimeError("injected")

    runner.before_step = poison
    with serving(runner) as engine:
        prompts = [[1], [66, 2], [3], [4]]
        sequences = [engine.submit(request(prompt, count=6)) for prompt in prompts]
        with pytest.raises(GenerationFailed):
            read(sequences[1])
        others = {n: read(sequences[n])[0] for n in (0, 2, 3)}
    counted(other_rows=len(others), tokens=sum(map(len, others.values())))
    assert others == {n: continuation(prompts[n], 6) for n in others}


@pytest.mark.promise("P3", injected="out of memory above two rows")
def test_a_batch_too_large_for_the_memory_is_split_and_answered(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=4)
    refused: list[int] = []

    def small_memory(active: tuple[int, ...]) -> None:
        if len(active) > 2:
            refused.append(len(active))
            raise MemoryError("injected")

    runner.before_step = small_memory
    with serving(runner) as engine:
        sequences = [engine.submit(request([n + 1], count=6)) for n in range(4)]
        texts = [read(sequence)[0] for sequence in sequences]
    counted(batches_out_of_memory=len(refused), answers_in_full=len(texts))
    assert refused and texts == [continuation([n + 1], 6) for n in range(4)]


@pytest.mark.promise("P5", injected="one row of NaN beside another")
def test_a_row_without_finite_numbers_fails_alone_and_its_kv_is_wiped(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=2)
    runner.spoil = lambda one: runner.read(one, 1)[0] == 500
    with serving(runner) as engine:
        good, bad = engine.submit(request([1], count=6)), engine.submit(request([500], count=6))
        with pytest.raises(GenerationFailed):
            read(bad)
        text = read(good)[0]
        eventually(lambda: all(500 not in written for written in runner.written.values()))
    left = sum(500 in written for written in runner.written.values())
    counted(tokens_of_the_other=len(text), blocks_that_hold_the_bad_row=left)
    assert text == continuation([1], 6) and left == 0


def test_a_prompt_that_the_model_chokes_on_fails_alone() -> None:
    """At the first touch, in the middle of its prefill, or by numbers that are not finite."""
    runner = ScriptedRunner(slots=2)
    with serving(runner) as engine:
        good = engine.submit(request([1], count=60))
        for prompt in ([UNFIT, 1], [1, UNFIT, 1], [1] * 70 + [NOT_FINITE, 1]):
            with pytest.raises(GenerationFailed):
                read(engine.submit(request(prompt)))
        assert read(good)[0] == continuation([1], 60)
        assert not any(NOT_FINITE in written for written in runner.written.values())
        assert engine.status().ready


@pytest.mark.promise("P4", injected="a device that is lost: every step raises", counted="serving again")
def test_a_step_that_fails_for_everyone_makes_the_engine_load_again(counted: Callable[..., None]) -> None:
    runners: list[ScriptedRunner] = []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runners.append(ScriptedRunner())
        if len(runners) == 1:
            runners[0].before_step = _break
        return runners[-1]

    engine = Engine(load, 64, Metrics())
    told = [failure(engine.submit(request([1]))) for _ in range(_MAX_FAILURES)]
    assert read(engine.submit(request([2], count=3)))[0] == continuation([2], 3)
    counted(requests_failed=len(told), loads=len(runners))
    assert len(runners) == 2 and engine.status().reason is None
    engine.stop(0)


def _break(active: tuple[int, ...]) -> None:
    raise RuntimeError("injected: the device is lost")


@pytest.mark.promise("P6", injected="two steps that could not be compiled", counted="by the metrics")
def test_metrics_follow_what_is_compiled_and_what_could_not_be(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner()
    metrics = Metrics()
    scheduler = Scheduler(runner, metrics, time.monotonic)
    for runner.compiled in ((1, 0), (1, 2), (3, 2)):
        scheduler.load_compiled(idle=True)
    names = ("llm_compiled_buckets", "llm_compile_fallbacks_total")
    compiled, fallbacks = (int(metrics.registry.get_sample_value(name) or 0) for name in names)
    counted(compiled=compiled, fallbacks=fallbacks)
    assert (compiled, fallbacks) == (3, 2)


@pytest.mark.promise("P4", injected="SystemExit in the model thread", counted="the reader told, who waits served")
def test_a_killed_model_thread_tells_everyone_and_comes_back(counted: Callable[..., None]) -> None:
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
    text = read(waiting)[0]
    assert text == continuation([2], 2)  # it was only waiting: the new thread serves it
    counted(tokens_served=len(text), loads=len(runners))
    assert len(runners) == 2 and runners[0].closed and engine.status().ready
    engine.stop(0)


def _exit() -> None:
    raise SystemExit("injected")


@pytest.mark.promise("P4", injected="every life of the model thread ends at once", counted="not ready")
def test_an_engine_that_cannot_recover_goes_down_and_says_so(counted: Callable[..., None]) -> None:
    loads, refused = [], []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runner = ScriptedRunner()
        runner.before_step = lambda active: _exit()
        loads.append(runner)
        return runner

    engine = Engine(load, 64, Metrics())
    for _ in range(5):
        try:
            read(engine.submit(request([1])))
        except ModelUnavailable as error:
            refused.append(error)
    eventually(lambda: engine.status().stage == "failed")
    counted(requests_refused=len(refused), loads=len(loads))
    assert len(refused) == 5 and not engine.status().ready
