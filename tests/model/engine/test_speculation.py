"""Guessing from what was said before: faster where a text repeats, the same text always, and only where it pays."""

from __future__ import annotations

import random

import pytest

from model.engine.speculation import Lookup, Speculation
from model.types import FinishReason
from tests.model.driving import read, request, serving
from tests.model.scripted import ScriptedRunner, continuation


def test_what_followed_the_same_tokens_is_guessed() -> None:
    lookup, text = Lookup([1, 2, 3, 4, 5, 6, 1, 2, 3]), [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert lookup.guess(text, 2) == [4, 5] and lookup.streak == 0
    text += [4, 5]
    assert lookup.read(text) == [(0, True), (1, True)] and lookup.streak == 2
    assert lookup.guess(text, 9) == [6, 1, 2, 3, 4, 5]
    text += [9]
    assert lookup.read(text) == [(2, False)] and lookup.streak == 0 and lookup.guess(text, 2) == []


def test_the_latest_place_counts_and_short_texts_have_none() -> None:
    text = [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]
    assert Lookup(text).guess(text, 1) == [8]
    assert Lookup([1, 1]).guess([1, 1], 4) == Lookup([5]).guess([5], 4) == []


def test_guesses_are_as_long_as_they_pay() -> None:
    cheap, dear = Speculation(), Speculation()
    for tokens in [1, 8, 1, 8, 2, 16, 1] * 20:
        cheap.took(tokens, 0.010 + 0.0001 * tokens)  # a GPU: reading the weights is all
        dear.took(tokens, 0.001 + 0.010 * tokens)  # a processor that is busy with each token
    assert cheap.length(streak=8, rows=1, most=7) == 7 and cheap.length(streak=0, rows=1, most=7) >= 1
    assert [dear.length(streak, rows, 7) for streak in (0, 8) for rows in (1, 16)] == [0, 0, 0, 0]
    for _ in range(300):
        cheap.learn([(0, False)])
    assert cheap.length(streak=0, rows=1, most=7) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_those_without_guessing(seed: int) -> None:
    """A model that copies what it said, but for a slip now and then, so that guesses are right and wrong."""
    chance = random.Random(seed)
    period, slips = chance.randrange(5, 40), {chance.randrange(60, 300) for _ in range(6)}
    prompt = [chance.randrange(1, 90) for _ in range(50)]

    def copying(tokens: list[int]) -> int:
        return tokens[-period] if len(tokens) not in slips else 95

    texts, steps = [], []
    for guesses in (0, 7):
        runner = ScriptedRunner(slots=2)
        runner.following, runner.guesses = copying, guesses  # type: ignore[assignment]
        with serving(runner) as engine:
            sequences = [engine.submit(request(prompt, count)) for count in (230, 77)]
            texts.append([read(sequence) for sequence in sequences])
        steps.append(len(runner.steps))
    assert texts[0] == texts[1] and [len(tokens) for tokens, _ in texts[0]] == [230, 77]
    assert steps[1] < 0.7 * steps[0]


def test_an_end_among_the_guesses_ends_the_text_there() -> None:
    runner = ScriptedRunner(slots=1)
    runner.following = lambda tokens: 0 if len(tokens) == 61 else tokens[-10]
    with serving(runner) as engine:
        text, ending = read(engine.submit(request(list(range(1, 31)), count=100)))
    assert ending is FinishReason.STOP and len(text) == 31


def test_a_penalty_for_repeating_and_the_setting_keep_guesses_away() -> None:
    assert continuation([1], 2)  # the arithmetic model: without repetition nothing is guessed
    runner, read_together = ScriptedRunner(slots=1), []
    runner.following = lambda tokens: tokens[-3]
    runner.before_step = lambda rows: read_together.append(max(len(one.tokens) for one in runner.work))
    wanted = request([1, 2, 3] * 5, count=30)
    with serving(runner) as engine:
        penalised = type(wanted.sampling)(repetition_penalty=1.2)
        read(
            engine.submit(type(wanted)(**{**{n: getattr(wanted, n) for n in wanted.__slots__}, "sampling": penalised}))
        )
        assert set(read_together) == {1}
        read(engine.submit(wanted))
        assert max(read_together) > 1
