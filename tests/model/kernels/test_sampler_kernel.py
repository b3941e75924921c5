"""The sampler's kernel against its definition in sampler.py."""

from __future__ import annotations

import random

import pytest
import torch

from model.runtime.sampler import Rows, advance, choose, choose_by_kernel, choose_unfiltered
from model.types import Sampling

pytestmark = pytest.mark.usefixtures("kernels")

ROWS = 24


def some_rows(vocabulary: int, seed: int) -> Rows:
    """Rows of all kinds: greedy, cut by one rule or by both, uncut, penalised."""
    pick = random.Random(seed)
    rows = Rows.empty(ROWS, vocabulary, "cpu")
    for slot in range(ROWS):
        rules = Sampling(
            temperature=pick.choice([0, 0.3, 0.7, 1, 2]),
            top_p=pick.choice([0.01, 0.5, 0.9, 0.99, 1]),
            top_k=pick.choice([0, 0, 1, 5, 40, 256]),
            repetition_penalty=pick.choice([0.8, 1, 1.3]),
        )
        rows.assign(slot, rules, pick.randrange(1 << 63), torch.tensor(pick.choices(range(vocabulary), k=50)))
    rows.position.copy_(torch.tensor(pick.choices(range(8192), k=ROWS)))
    return rows


@pytest.mark.parametrize("spread", [1, 3, 8])
@pytest.mark.parametrize("vocabulary", [300, 8_200, 49_152, 49_157, 151_936])
def test_it_chooses_what_is_defined(vocabulary: int, spread: int) -> None:
    torch.manual_seed(spread)
    rows, logits = some_rows(vocabulary, spread), spread * torch.randn(ROWS, vocabulary)
    uncut = (rows.temperature > 0) & (rows.top_k == 0) & (rows.top_p >= 1)
    want = torch.where(uncut, choose_unfiltered(logits, rows), choose(logits, rows))
    tokens = choose_by_kernel(logits, rows)
    sound = tokens >= 0
    assert tokens.tolist() == want.tolist() and sound.all() and 0 < uncut.sum() < ROWS


def test_logits_may_be_a_view() -> None:
    rows, wide = some_rows(300, 1), torch.randn(ROWS, 304)
    assert torch.equal(choose_by_kernel(wide[:, :300], rows), choose_by_kernel(wide[:, :300].clone(), rows))


def test_the_first_of_equals_is_taken() -> None:
    rows = Rows.empty(1, 300, "cpu")
    assert choose_by_kernel(torch.zeros(1, 300), rows) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40, 298])  # 298 is in what no vector covers
def test_what_is_not_finite_is_told_of_its_row_alone(value: float, place: int) -> None:
    rows, logits = some_rows(299, 1), torch.randn(ROWS, 299)
    logits[3, place] = value
    tokens = choose_by_kernel(logits, rows)
    sound = tokens >= 0
    assert not sound[3] and sound.sum() == ROWS - 1
    logits[3, place] = 0
    others = torch.arange(ROWS) != 3
    assert torch.equal(choose_by_kernel(logits, rows)[others], tokens[others])


def test_a_row_is_chosen_alike_alone_and_by_any_number_of_threads() -> None:
    rows, logits = some_rows(49_152, 2), 3 * torch.randn(ROWS, 49_152)
    together = choose_by_kernel(logits, rows)
    torch.ops.slots.set_threads(3)
    try:
        assert torch.equal(choose_by_kernel(logits, rows), together)
    finally:
        torch.ops.slots.set_threads(1)
    for row in range(ROWS):
        one = Rows(*(tensor[row : row + 1] for tensor in rows.tensors()))
        assert choose_by_kernel(logits[row : row + 1], one) == together[row]


def test_rows_advance_as_is_defined() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 300, (ROWS,))
    tokens[::5] = -1
    left, right = some_rows(300, 4), some_rows(300, 4)
    for rows in (left, right):
        rows.active.copy_(torch.arange(ROWS) % 3 > 0)
    advance(left, tokens, tokens >= 0)
    torch.ops.slots.advance(right.ids, right.position, right.active, right.seen, tokens)
    assert all(map(torch.equal, left.tensors(), right.tensors()))
    assert 0 < (left.ids[:, 0] == tokens).sum() < ROWS
