"""The engine's invariants: admission, batching, reuse, cancelling and deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from errors import DeadlineExceeded, Overloaded, ServiceError
from model.types import FinishReason, Status
from tests.model.driving import WAIT, Gate, read, request, serving
from tests.model.scripted import ScriptedRunner, continuation


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
    assert sum(chunks) == 299 and max(chunks) < 299


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


@pytest.mark.promise("P8", injected="one request more than the queue holds", counted="with a time")
def test_a_full_queue_refuses_with_a_time_to_come_back(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner, max_queue=2) as engine:
        sequences = [engine.submit(request([1], count=4))]
        assert gate.reached.wait(WAIT)
        sequences += [engine.submit(request([1], count=4)) for _ in range(2)]
        waits = []
        for _ in range(5):
            with pytest.raises(Overloaded) as refused:
                engine.submit(request([1]))
            waits.append(refused.value.retry_after)
        gate.open()
        ends = [read(sequence)[1] for sequence in sequences]
    counted(served=ends.count(FinishReason.LENGTH), refused=len(waits))
    assert ends == [FinishReason.LENGTH] * 3 and all(wait and wait >= 1 for wait in waits)


def test_the_time_to_come_back_grows_with_the_backlog() -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        engine.submit(request([1], count=100))
        assert gate.reached.wait(WAIT)
        times = []
        for _ in range(3):
            engine.submit(request([1], count=1000))
            times.append(engine._scheduler.seconds_until_free(sum(s.left for s in engine._queue)))
        # One lane at the first guess of 50 tokens/s: 20 seconds for each thousand.
        assert times == [pytest.approx(22, abs=0.5), pytest.approx(42, abs=0.5), pytest.approx(62, abs=0.5)]
        gate.open()


@pytest.mark.promise("P10", injected="close() in the middle of decoding")
def test_a_closed_stream_frees_its_slot_within_two_steps(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=1)
    with serving(runner) as engine:
        closed = engine.submit(request([1], count=4000))
        assert closed.get(WAIT) is not None
        closed.close()
        before = len(runner.steps)
        next_one = engine.submit(request([2], count=1))
        assert read(next_one)[0] == continuation([2], 1)
        steps = len(runner.steps) - before - 1  # one is the other's
        counted(steps_until_the_slot_is_free=steps)
        assert steps <= 2
        assert read(closed)[1] is FinishReason.CANCELLED


@pytest.mark.promise("P10", injected="close() while queued")
def test_a_queued_request_can_be_given_up(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=1)
    gate = Gate(runner)
    with serving(runner) as engine:
        first = engine.submit(request([1], count=2))
        assert gate.reached.wait(WAIT)
        queued = [engine.submit(request([2])) for _ in range(20)]
        for sequence in queued:
            sequence.close()
        gate.open()
        given_up, text = [read(sequence) for sequence in queued], read(first)[0]
    counted(given_up=len(given_up), tokens_of_theirs=sum(len(tokens) for tokens, _ in given_up), tokens=len(text))
    assert given_up == [([], FinishReason.CANCELLED)] * 20 and text == continuation([1], 2)


@pytest.mark.promise("P10", injected="close() in the middle of a long prompt")
def test_a_request_in_prefill_can_be_given_up(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=2)
    in_prefill, closed = threading.Event(), threading.Event()

    def pause(active: tuple[int, ...]) -> None:
        if runner.prefilled:  # a first chunk of the long prompt: the other has nothing to compute ahead
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
        computed = sum(count for _, _, count in runner.prefilled)
        counted(prompt_tokens=long.prompt_tokens, prompt_tokens_computed=computed)
        assert computed < 1999
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
    monkeypatch.setattr("model.engine.sequence._PATIENCE", 0.1)
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


@pytest.mark.promise("P19", injected="the same prompt from another user")
def test_another_users_prompt_is_computed_from_scratch(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=1)
    with serving(runner) as engine:
        first, second, other = (request([9] * 100, owner=owner) for owner in ("ann", "ann", "bob"))
        reused = []
        for each in (first, second, other):
            sequence = engine.submit(each)
            read(sequence)
            reused.append(sequence.cached)
    counted(tokens_reused_by_the_same_user=reused[1], tokens_reused_by_another=reused[2])
    assert reused == [0, 99, 0]


def test_a_prompt_that_cannot_fit_never_takes_a_slot() -> None:
    runner = ScriptedRunner(slots=1, context=64)
    with serving(runner) as engine:
        with pytest.raises(ServiceError) as refused:
            read(engine.submit(request([1] * 60, count=10)))
        assert refused.value.status == 422 and not runner.steps
        assert read(engine.submit(request([1] * 60, count=4)))[1] is FinishReason.LENGTH
