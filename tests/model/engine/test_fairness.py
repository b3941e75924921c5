"""P30: users take turns, in the queue and in a chunk; counted in admissions and tokens, not in seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from errors import Overloaded
from model.engine.engine import Engine
from model.engine.scheduler import CHUNK_MIN
from model.engine.sequence import RequestQueue, Sequence
from model.types import FinishReason, Status
from telemetry import Metrics
from tests.model.driving import WAIT, Gate, eventually, read, request, serving
from tests.model.scripted import ScriptedRunner, continuation


@pytest.fixture
def queue() -> RequestQueue:
    return RequestQueue()


def join(queue: RequestQueue, owner: str, count: int = 1, timeout: float = 60) -> list[Sequence]:
    new = [Sequence(request([1], owner=owner, timeout=timeout), lambda: None, 0.0, Metrics()) for _ in range(count)]
    for sequence in new:
        queue.append(sequence)
    return new


def owners(queue: RequestQueue) -> Iterator[str]:
    while queue:
        yield queue.take().request.owner


@pytest.mark.promise("P30", injected="64 requests of one user in the queue")
def test_a_single_request_is_next_whatever_another_user_has_queued(
    queue: RequestQueue, counted: Callable[..., None]
) -> None:
    ann = join(queue, "ann", 65)
    assert queue.take() is ann[0]  # it runs
    (bob,) = join(queue, "bob")
    order = [queue.take() for _ in range(65)]
    counted(before_another_users_one=order.index(bob), after_it=len(order) - 1 - order.index(bob))
    assert order == [bob, *ann[1:]]


def test_users_alternate_and_each_users_order_stands(queue: RequestQueue) -> None:
    join(queue, "ann", 4), join(queue, "bob", 2), join(queue, "cem", 1)
    assert list(owners(queue)) == ["ann", "bob", "cem", "ann", "bob", "ann", "ann"]


def test_who_comes_again_and_again_does_not_overtake_who_waits(queue: RequestQueue) -> None:
    join(queue, "ann", 3)
    order = []
    for _ in range(6):
        join(queue, "bob")
        order.append(queue.take().request.owner)
    assert order == ["ann", "bob"] * 3


def test_requests_that_were_given_up_cost_their_user_no_turn(queue: RequestQueue) -> None:
    for sequence in join(queue, "ann", 20):
        sequence.close()
    queue.sweep(1.0)
    (ann,), (bob,) = join(queue, "ann"), join(queue, "bob", 1)
    assert [queue.take(), queue.take()] == [ann, bob] and not len(queue)


def test_each_is_told_its_own_place_and_time(queue: RequestQueue) -> None:
    ann, (bob,) = join(queue, "ann", 3), join(queue, "bob")
    queue.announce_positions(float)
    told = [sequence.get(WAIT) for sequence in (ann[0], bob, ann[1], ann[2])]
    assert told == [Status("queued", position=n + 1, eta_seconds=9.0 * n) for n in range(4)]  # 9 tokens each


@pytest.mark.promise("P30", injected="ten prompts of 3,000 tokens of one user", counted="before another's first token")
@pytest.mark.parametrize("length", [30, 300, 1000])
def test_long_prompts_of_one_user_do_not_delay_a_short_one_of_another(
    length: int, counted: Callable[..., None]
) -> None:
    runner = ScriptedRunner(slots=16)
    hold = Gate(runner, "prefill")
    with serving(runner) as engine:
        for n in range(10):
            engine.submit(request([n + 1] * 3000, count=400, owner="ann"))
        assert hold.reached.wait(WAIT)
        short = engine.submit(request([77] * length, count=3, owner="bob"))
        hold.open()
        assert read(short)[0] == continuation([77] * length, 3)
        later = runner.chunks[1:]  # the first was being computed when the short prompt came
        last = max(n for n, chunk in enumerate(later) if 77 in chunk)
        tokens = sum(sum(chunk.values()) for chunk in later[: last + 1])
        counted(tokens_computed=tokens, tokens_of_its_own=length)
        assert tokens <= 3 * max(length, CHUNK_MIN)


def test_a_chunk_is_for_every_user_in_turn() -> None:
    runner = ScriptedRunner(slots=16)
    hold = Gate(runner, "prefill")
    with serving(runner) as engine:
        sequences = [engine.submit(request([n + 1] * 2000, count=1, owner=f"user{n % 4}")) for n in range(16)]
        assert hold.reached.wait(WAIT)
        eventually(lambda: len(engine._queue) <= 15)
        hold.open()
        for sequence in sequences:
            read(sequence)
    owners = {sequence.tokens[0]: sequence.request.owner for sequence in sequences}
    for chunk in runner.chunks[1:9]:
        tokens = {owner: sum(n for token, n in chunk.items() if owners[token] == owner) for owner in owners.values()}
        assert set(tokens.values()) == {runner.chunk_tokens // 4}


def test_the_shortest_rest_of_a_user_goes_first() -> None:
    runner = ScriptedRunner(slots=4)
    hold = Gate(runner, "prefill")
    with serving(runner) as engine:
        long = engine.submit(request([5] * 3000, count=1))
        assert hold.reached.wait(WAIT)
        short = engine.submit(request([6] * 100, count=1))
        hold.open()
        read(short)
        assert runner.chunks[1] == {6: 99, 5: runner.chunk_tokens - 99}
        assert read(long)[0] == continuation([5] * 3000, 1)


def test_a_free_slot_is_not_a_place_in_the_queue() -> None:
    runner = ScriptedRunner(slots=16)
    gate = Gate(runner)
    with serving(runner, max_queue=1) as engine:
        read_later = [engine.submit(request([9], count=2))]
        assert gate.reached.wait(WAIT)
        read_later += [engine.submit(request([n], count=2)) for n in range(1, 17)]  # 15 run, one waits
        with pytest.raises(Overloaded):
            engine.submit(request([1]))
        gate.open()
        assert all(read(sequence)[1] is FinishReason.LENGTH for sequence in read_later)


def test_requests_that_will_find_a_slot_need_no_place_in_the_queue_during_the_load() -> None:
    loaded = threading.Event()
    runner = ScriptedRunner(slots=16)
    engine = Engine(lambda progress: loaded.wait(WAIT) and runner, 1, Metrics(), slots=16)  # type: ignore[arg-type]
    sequences = [engine.submit(request([n + 1], count=2)) for n in range(17)]
    with pytest.raises(Overloaded):
        engine.submit(request([1]))
    loaded.set()
    assert [read(sequence)[1] for sequence in sequences] == [FinishReason.LENGTH] * 17
    engine.stop(0)
