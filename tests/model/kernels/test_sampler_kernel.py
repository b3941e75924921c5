"""The sampler's kernel against its definition in sampler.py."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.runtime.sampler import UNSOUND, Rules, choose, choose_by_kernel
from model.types import Sampling

pytestmark = pytest.mark.usefixtures("kernels")

ROWS = 24
TOKENS = 32  # of which some belong to one row, as guesses do


def some_rules(vocabulary: int, seed: int) -> Rules:
    """Rows of all kinds: greedy, cut by one rule or by both, uncut, penalised."""
    pick = random.Random(seed)
    rules = Rules.empty(ROWS, vocabulary, "cpu")
    for row in range(ROWS):
        sampling = Sampling(
            temperature=pick.choice([0, 0.3, 0.7, 1, 2]),
            top_p=pick.choice([0.01, 0.5, 0.9, 0.99, 1]),
            top_k=pick.choice([0, 0, 1, 5, 40, 256]),
            repetition_penalty=pick.choice([0.8, 1, 1.3]),
        )
        rules.assign(row, sampling, pick.randrange(1 << 63), torch.tensor(pick.choices(range(vocabulary), k=50)))
    return rules


def some_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Position and row of each token: every row in random order, and some rows again."""
    pick = random.Random(seed)
    rows = pick.sample(range(ROWS), ROWS) + pick.choices(range(ROWS), k=TOKENS - ROWS)
    return torch.tensor(pick.choices(range(8192), k=TOKENS)), torch.tensor(rows)


@pytest.mark.parametrize("spread", [1, 3, 8])
@pytest.mark.parametrize("vocabulary", [300, 8_200, 49_152, 49_157, 151_936])
def test_it_chooses_what_is_defined(vocabulary: int, spread: int) -> None:
    torch.manual_seed(spread)
    rules, defined = some_rules(vocabulary, spread), some_rules(vocabulary, spread)
    tokens, logits = some_tokens(spread), spread * torch.randn(TOKENS, vocabulary)
    before = rules.seen.clone()
    got, want = choose_by_kernel(logits, *tokens, rules), choose(logits, *tokens, defined)
    assert got.tolist() == want.tolist() and (got >= 0).all()
    assert torch.equal(rules.seen, defined.seen) and not torch.equal(rules.seen, before)
    uncut = (rules.temperature > 0) & (rules.top_k == 0) & (rules.top_p >= 1)
    assert 0 < uncut.sum() < ROWS and 0 < (rules.temperature == 0).sum() < ROWS


def test_rules_and_their_tokens_are_changed_in_nothing_but_what_was_seen() -> None:
    rules, same, tokens = some_rules(300, 1), some_rules(300, 1), some_tokens(1)
    chosen = choose_by_kernel(torch.randn(TOKENS, 300), *tokens, rules)
    assert all(map(torch.equal, rules.tensors()[:-1], same.tensors()[:-1]))
    assert all(map(torch.equal, tokens, some_tokens(1)))
    for row, token in zip(tokens[1], chosen, strict=True):
        same.seen[row, token] = True
    assert torch.equal(rules.seen, same.seen)


def test_logits_may_be_a_view() -> None:
    tokens, wide = some_tokens(1), torch.randn(TOKENS, 304)
    view, copy = wide[:, :300], wide[:, :300].clone()
    got, want = (choose_by_kernel(logits, *tokens, some_rules(300, 1)) for logits in (view, copy))
    assert not view.is_contiguous() and torch.equal(got, want)


def test_the_first_of_equals_is_taken() -> None:
    first = torch.tensor([0])
    assert choose_by_kernel(torch.zeros(1, 300), first, first, Rules.empty(1, 300, "cpu")) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40, 298])  # 298 is in what no vector covers
def test_what_is_not_finite_is_told_of_its_token_alone(value: float, place: int) -> None:
    tokens, logits = some_tokens(1), torch.randn(TOKENS, 299)
    want, others = choose_by_kernel(logits, *tokens, some_rules(299, 1)), torch.arange(TOKENS) != 3
    logits[3, place] = value
    rules, same = some_rules(299, 1), some_rules(299, 1)
    got = choose_by_kernel(logits, *tokens, rules)
    assert got[3] == UNSOUND and torch.equal(got[others], want[others])
    for row, token in zip(tokens[1][others], got[others], strict=True):
        same.seen[row, token] = True
    assert torch.equal(rules.seen, same.seen)  # and nothing counts as seen for it


def test_a_token_is_chosen_alike_alone_and_by_any_number_of_threads() -> None:
    """Tokens of one row, too: none counts as seen for the others of its step."""
    tokens, logits = some_tokens(2), 3 * torch.randn(TOKENS, 49_152)
    rules = some_rules(49_152, 2)
    together = choose_by_kernel(logits, *tokens, rules)
    torch.ops.slots.set_threads(3)
    try:
        threaded = some_rules(49_152, 2)
        assert torch.equal(choose_by_kernel(logits, *tokens, threaded), together)
        assert torch.equal(threaded.seen, rules.seen)
    finally:
        torch.ops.slots.set_threads(1)
    for at, (position, row) in enumerate(zip(*tokens, strict=True)):
        mine, fresh = slice(int(row), int(row) + 1), some_rules(49_152, 2)
        one = Rules(*(tensor[mine].clone() for tensor in fresh.tensors()))
        assert choose_by_kernel(logits[at : at + 1], position[None], torch.tensor([0]), one) == together[at]
