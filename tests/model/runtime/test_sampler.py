"""Sampling: the right distribution, the right cuts, and one's own noise whatever the neighbours do."""

import pytest
import torch

from model.runtime.sampler import CANDIDATES, UNSOUND, Rules, choose, choose_by_kernel, gumbel, mix_seed, top_candidates
from model.types import Sampling

VOCABULARY = 49_152


def _rules(*samplings: Sampling, vocabulary: int = VOCABULARY, seeds: tuple[int, ...] = ()) -> Rules:
    rules = Rules.empty(len(samplings), vocabulary, "cpu")
    for row, sampling in enumerate(samplings):
        seed = seeds[row] if seeds else 7
        rules.assign(row, sampling, seed, torch.tensor([0]))
    return rules


def _each(rules: Rules) -> tuple[torch.Tensor, torch.Tensor, Rules]:
    """What `choose` takes beside the logits, for a token of each row: all at position 0."""
    rows = torch.arange(len(rules.key))
    return torch.zeros_like(rows), rows, rules


def _draws(logits: torch.Tensor, sampling: Sampling, count: int, draw=choose) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """`count` draws from one row's logits, one for each position."""
    rules, position = _rules(sampling, vocabulary=logits.shape[0]), torch.arange(count)
    return draw(logits.expand(count, -1), position, torch.zeros_like(position), rules)


def test_the_two_level_search_finds_exactly_the_largest() -> None:
    torch.manual_seed(0)
    for vocabulary in (VOCABULARY, 49_157, 151_936, 300):
        logits = torch.randn(3, vocabulary)
        values, tokens = top_candidates(logits)
        want = logits.topk(min(CANDIDATES, vocabulary), -1)
        assert torch.equal(values, want.values)
        assert torch.equal(logits.gather(1, tokens), values)


def test_temperature_zero_is_argmax_beside_sampling_rows() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, VOCABULARY)
    rules = _rules(Sampling(temperature=0), Sampling(temperature=5, top_k=0, top_p=0.99), Sampling(temperature=0))
    tokens = choose(logits, *_each(rules))
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def test_rows_are_greedy_until_a_request_sets_them() -> None:
    logits = torch.randn(2, 300)
    assert torch.equal(choose(logits, *_each(Rules.empty(2, 300, "cpu"))), logits.argmax(-1))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("draw", [choose, choose_by_kernel])
@pytest.mark.parametrize("cut", [{"top_k": 0, "top_p": 1}, {"top_k": 5, "top_p": 1}])
def test_draws_follow_the_softmax(draw, cut: dict[str, int]) -> None:  # type: ignore[no-untyped-def]
    """From the whole vocabulary, and from candidates of which none is cut."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    tokens = _draws(probabilities.log(), Sampling(temperature=1, **cut), 40_000, draw)
    frequency = tokens.bincount(minlength=5) / len(tokens)
    # Five standard deviations of a binomial share at n = 40,000, p = 0.5.
    assert torch.allclose(frequency, probabilities, atol=5 * (0.25 / 40_000) ** 0.5)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([0.6, 0.4]).log()
    tokens = _draws(logits, Sampling(temperature=0.5, top_k=0, top_p=1), 40_000)
    want = 0.36 / (0.36 + 0.16)  # p ** (1 / temperature), normalised
    assert abs((tokens == 0).float().mean().item() - want) < 0.0125


def test_top_k_and_top_p_leave_only_what_they_say() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    assert _draws(logits, Sampling(temperature=3, top_k=2, top_p=1), 2000).unique().tolist() == [0, 1]
    # The smallest set that reaches 0.65 is {0.4, 0.3}; temperature 1 keeps the probabilities as they are.
    assert _draws(logits, Sampling(temperature=1, top_k=0, top_p=0.65), 2000).unique().tolist() == [0, 1]
    assert _draws(logits, Sampling(temperature=1, top_k=0, top_p=0.75), 2000).unique().tolist() == [0, 1, 2]
    assert _draws(logits, Sampling(temperature=1, top_k=0, top_p=0.01), 500).unique().tolist() == [0]


def test_without_any_cut_draws_reach_beyond_the_candidates() -> None:
    tokens = _draws(torch.zeros(4096), Sampling(temperature=1, top_k=0, top_p=1), 3000)
    assert len(tokens.unique()) > 1500
    assert len(_draws(torch.zeros(4096), Sampling(temperature=1, top_k=0, top_p=0.9999), 3000).unique()) <= CANDIDATES


@pytest.mark.parametrize("top_k", [0, 50])
def test_a_row_draws_the_same_in_any_place_and_company(top_k: int) -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, VOCABULARY)
    sampling = Sampling(temperature=1.5, top_k=top_k, top_p=0.95 if top_k else 1)
    want = choose(logits[2:3], torch.tensor([11]), torch.tensor([0]), _rules(sampling, seeds=(42,)))
    crowd = _rules(*[sampling] * 4, seeds=(1, 42, 2, 3))
    assert choose(logits, torch.tensor([11, 11, 11, 12]), torch.tensor([3, 0, 1, 2]), crowd)[2] == want[0]


@pytest.mark.parametrize("top_k", [0, 50])
def test_several_tokens_of_one_row_are_drawn_as_if_one_by_one(top_k: int) -> None:
    """As guesses are, after each of which another token follows: its position alone tells the draws apart."""
    torch.manual_seed(3)
    logits, sampling = 0.1 * torch.randn(1, VOCABULARY).expand(8, -1), Sampling(top_k=top_k, top_p=1)
    position, row = torch.arange(40, 48), torch.tensor([1] * 8)
    rules = _rules(Sampling(temperature=0), sampling, seeds=(1, 42))
    together = choose(logits, position, row, rules)
    alone = [choose(logits[at : at + 1], position[at : at + 1], row[:1], rules) for at in range(8)]
    assert torch.equal(together, torch.cat(alone)) and len(together.unique()) > 4


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("draw", [choose, choose_by_kernel])
def test_what_is_chosen_counts_as_seen_by_its_row_alone(draw) -> None:  # type: ignore[no-untyped-def]
    logits, rules = torch.zeros(4, 300), _rules(*[Sampling(temperature=0)] * 3, vocabulary=300)
    for token, favourite in enumerate([10, 20, 10, 30]):
        logits[token, favourite] = 1
    logits[3, 5] = torch.nan
    row = torch.tensor([2, 0, 0, 1])
    assert draw(logits, torch.zeros(4, dtype=torch.int64), row, rules).tolist() == [10, 20, 10, UNSOUND]
    assert [mine.nonzero().flatten().tolist() for mine in rules.seen] == [[0, 10, 20], [0], [0, 10]]


def test_a_new_request_forgets_what_the_row_has_seen() -> None:
    rules = _rules(Sampling(repetition_penalty=1.5), vocabulary=300)
    rules.assign(0, Sampling(), 1, torch.tensor([7, 9, 7]))
    assert rules.seen[0].nonzero().flatten().tolist() == [7, 9] and rules.penalty[0] == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_told_of_its_token_alone(value: float) -> None:
    logits, rules = torch.randn(3, 300), _rules(Sampling(temperature=0), Sampling(top_p=1, top_k=0), vocabulary=300)
    position, row = torch.arange(3), torch.tensor([0, 1, 1])
    want = choose(logits, position, row, rules)
    logits[1, 299] = value
    assert choose(logits, position, row, rules).tolist() == [want[0], UNSOUND, want[2]]


def test_seed_position_and_token_each_change_the_noise() -> None:
    def noise(seed: int, position: int, token: int) -> float:
        return gumbel(*(torch.tensor([n]) for n in (mix_seed(seed), position, token))).item()

    base = noise(7, 3, 5)
    assert len({base, noise(8, 3, 5), noise(7, 4, 5), noise(7, 3, 6), noise(7 + (1 << 32), 3, 5)}) == 5


def test_noise_is_standard_gumbel_and_always_finite() -> None:
    noise = gumbel(torch.tensor([[mix_seed(1)]]), torch.tensor([[9]]), torch.arange(200_000)[None])
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.02  # Euler's constant
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03


def test_repetition_penalty_counts_prompt_and_answer_like_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(4)
    logits, prompt, sampling = torch.randn(1, 300), [3, 9, 250], Sampling(temperature=0, repetition_penalty=1.7)
    rules = _rules(sampling, vocabulary=300)
    rules.assign(0, sampling, 0, torch.tensor(prompt))
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits.clone())
    assert choose(logits, *_each(rules))[0] == want.argmax()
    peak = torch.zeros(1, 300)
    peak[0, 9], peak[0, 10], peak[0, 11] = 1.0, 0.9, 0.8
    assert choose(peak, *_each(rules))[0] == 10
    assert choose(peak, *_each(rules))[0] == 11  # its own answer counts from the next token on
