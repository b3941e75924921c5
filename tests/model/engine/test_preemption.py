"""A pool of KV smaller than what is wanted: who gives way, and that nobody loses a token by it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from errors import DeadlineExceeded
from model.engine.blocks import BLOCK
from model.types import FinishReason
from telemetry import Metrics
from tests.model.driving import Gate, eventually, failure, read, request, serving
from tests.model.scripted import ScriptedRunner, continuation


def preemptions(metrics: Metrics) -> int:
    return int(metrics.registry.get_sample_value("llm_preemptions_total") or 0)


@pytest.mark.promise("P31", injected="three streams on blocks for one and a half", counted="each the text it has alone")
def test_a_preempted_stream_goes_on_where_it_was(counted: Callable[..., None]) -> None:
    runner = ScriptedRunner(slots=4, context=5 * BLOCK, blocks=5)
    with serving(runner) as engine:
        prompts = [[n + 1] * 200 for n in range(3)]
        sequences = [engine.submit(request(prompt, count=600)) for prompt in prompts]
        texts = [read(sequence) for sequence in sequences]
        happened = preemptions(engine._metrics)
        details = engine.status().details
    counted(streams=len(texts), preemptions=happened, tokens=sum(len(tokens) for tokens, _ in texts))
    assert texts == [(continuation(prompt, 600), FinishReason.LENGTH) for prompt in prompts]
    assert happened >= 2 and details["preempted"] == 0 and details["kv_blocks_free"] == details["kv_blocks"] == 5


def test_the_youngest_gives_way_and_comes_back_before_anybody_new() -> None:
    runner = ScriptedRunner(slots=3, context=4 * BLOCK, blocks=4)
    gate, order = Gate(runner, "prefill"), []
    with serving(runner) as engine:
        old = engine.submit(request([1] * 250, count=700, owner="ann"))
        young = engine.submit(request([2] * 250, count=400, owner="bob"))
        assert gate.reached.wait(10)
        new = engine.submit(request([3] * 500, count=10, owner="carl"))
        gate.open()
        for name, sequence in (("old", old), ("young", young), ("new", new)):
            sequence.finish = lambda *a, name=name, end=sequence.finish: (order.append(name), end(*a))  # type: ignore[method-assign, misc]
        texts = [read(sequence)[0] for sequence in (old, young, new)]
        assert preemptions(engine._metrics) >= 1
    assert order.index("young") < order.index("new") or order.index("old") < order.index("young")
    assert texts == [continuation([1] * 250, 700), continuation([2] * 250, 400), continuation([3] * 500, 10)]


def test_a_preempted_request_can_be_given_up_and_runs_out_of_time() -> None:
    for ending in ("closed", "late"):
        runner = ScriptedRunner(slots=2, context=4 * BLOCK, blocks=4)
        with serving(runner) as engine:
            old = engine.submit(request([1] * 250, count=750))
            young = engine.submit(request([2] * 250, count=500, timeout=60))
            eventually(lambda engine=engine: engine.status().details.get("preempted") == 1)  # type: ignore[misc]
            if ending == "closed":
                young.close()
                assert read(young)[1] is FinishReason.CANCELLED
            else:
                young.deadline = 0
                assert isinstance(failure(young), DeadlineExceeded)
            assert read(old)[0] == continuation([1] * 250, 750)


@pytest.mark.promise("P31", injected="200 mixed requests, a quarter of the KV they want", counted="each the very text")
def test_two_hundred_requests_on_a_quarter_of_what_they_want(counted: Callable[..., None]) -> None:
    chance = random.Random(5)
    runner = ScriptedRunner(slots=16, context=6 * BLOCK, blocks=12)  # 16 such requests want 48 at once
    lengths, counts = [1, 40, 255, 256, 300, 700], [20, 270, 500, 600]
    prompts = [[chance.randrange(1, 97) for _ in range(chance.choice(lengths))] for _ in range(200)]
    wanted = [(prompt, chance.choice(counts)) for prompt in prompts]
    with serving(runner, max_queue=200) as engine:
        sequences = [engine.submit(request(prompt, count, owner=chance.choice("abc"))) for prompt, count in wanted]
        texts = [read(sequence) for sequence in sequences]
        happened, details = preemptions(engine._metrics), engine.status().details
    right = sum(text == (continuation(*one), FinishReason.LENGTH) for one, text in zip(wanted, texts, strict=True))
    counted(requests=len(texts), the_very_text=right, preemptions=happened)
    assert right == 200 and happened and details["kv_blocks_free"] == 12
