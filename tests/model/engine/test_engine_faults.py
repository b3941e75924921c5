"""What the engine does when the model misbehaves: one fails alone, or all hear of it and it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from errors import GenerationFailed, ModelUnavailable, ServiceError
from model.engine.engine import Engine
from model.engine.scheduler import _MAX_FAILURES, Scheduler
from telemetry import Metrics
from tests.model.driving import eventually, read, request, serving
from tests.model.scripted import NOT_FINITE, UNFIT, ScriptedRunner, continuation


@pytest.mark.promise(
    "P2",
    injected="a step that raises for one row of four",
    counted="the other three tokens for token as alone",
)
def test_a_poisonous_row_fails_alone() -> None:
    runner = ScriptedRunner(slots=4)

    def poison(active: tuple[int, ...]) -> None:
        if any(runner.written[slot].get(0, runner.active[slot][0]) == 66 for slot in active):
            raise RuntimeError("injected")

    runner.before_step = poison
    with serving(runner) as engine:
        prompts = [[1], [66, 2], [3], [4]]
        sequences = [engine.submit(request(prompt, count=6)) for prompt in prompts]
        with pytest.raises(GenerationFailed):
            read(sequences[1])
        for n in (0, 2, 3):
            assert read(sequences[n])[0] == continuation(prompts[n], 6)


@pytest.mark.promise("P3", injected="out of memory above two rows", counted="all four answered in full")
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


@pytest.mark.promise(
    "P5",
    injected="one row of NaN beside another",
    counted="the other's tokens; nothing of the row left in its slot",
)
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


@pytest.mark.promise("P4", injected="a device that is lost: every step raises", counted="loaded again, serving again")
def test_a_step_that_fails_for_everyone_makes_the_engine_load_again() -> None:
    runners: list[ScriptedRunner] = []

    def load(progress: Callable[[str, int], None]) -> ScriptedRunner:
        runners.append(ScriptedRunner())
        if len(runners) == 1:
            runners[0].before_step = _break
        return runners[-1]

    engine = Engine(load, 64, Metrics())
    for _ in range(_MAX_FAILURES):
        with pytest.raises(ServiceError):
            read(engine.submit(request([1])))
    assert read(engine.submit(request([2], count=3)))[0] == continuation([2], 3)
    assert len(runners) == 2 and engine.status().reason is None
    engine.stop(0)


def _break(active: tuple[int, ...]) -> None:
    raise RuntimeError("injected: the device is lost")


@pytest.mark.promise("P6", injected="two steps that could not be compiled", counted="the counter of fallbacks")
def test_metrics_follow_what_is_compiled_and_what_could_not_be() -> None:
    runner = ScriptedRunner()
    metrics = Metrics()
    scheduler = Scheduler(runner, metrics, time.monotonic)
    for runner.compiled in ((1, 0), (1, 2), (3, 2)):
        scheduler.load_compiled(idle=True)
    assert metrics.registry.get_sample_value("llm_compiled_buckets") == 3
    assert metrics.registry.get_sample_value("llm_compile_fallbacks_total") == 2


@pytest.mark.promise(
    "P4",
    injected="SystemExit in the model thread",
    counted="running reader told, waiting one served, loaded again",
)
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


@pytest.mark.promise("P4", injected="every life of the model thread ends at once", counted="stage failed, not ready")
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
