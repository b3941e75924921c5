"""Sampling: the right distribution, the right cuts, and one's own noise whatever the neighbours do."""

import pytest
import torch

from model.runtime.sampler import (
    CANDIDATES,
    Rows,
    choose,
    choose_by_kernel,
    choose_unfiltered,
    gumbel,
    mix_seed,
    top_candidates,
)
from model.types import Sampling

VOCABULARY = 49_152


def _rows(*samplings: Sampling, vocabulary: int = VOCABULARY, seeds: tuple[int, ...] = ()) -> Rows:
    rows = Rows.empty(len(samplings), vocabulary, "cpu")
    for slot, sampling in enumerate(samplings):
        seed = seeds[slot] if seeds else 7
        rows.assign(slot, sampling, seed, torch.tensor([0]))
    return rows


def _draws(logits: torch.Tensor, sampling: Sampling, count: int, draw=choose) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """`count` draws from one row's logits, one for each position."""
    one = _rows(sampling, vocabulary=logits.shape[0])
    rows = Rows(*(tensor.repeat(count, *[1] * (tensor.dim() - 1)) for tensor in one.tensors()))
    rows.position.copy_(torch.arange(count))
    return draw(logits.expand(count, -1).contiguous(), rows)


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
    rows = _rows(Sampling(temperature=0), Sampling(temperature=5, top_k=0, top_p=0.99), Sampling(temperature=0))
    tokens = choose(logits, rows)
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def by_kernel(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    return choose_by_kernel(logits, rows)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("draw", [choose, choose_unfiltered, by_kernel])
def test_draws_follow_the_softmax(draw) -> None:  # type: ignore[no-untyped-def]
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    tokens = _draws(probabilities.log(), Sampling(temperature=1, top_k=0, top_p=1), 40_000, draw)
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


def test_unfiltered_draws_reach_beyond_the_candidates() -> None:
    tokens = _draws(torch.zeros(4096), Sampling(temperature=1, top_k=0, top_p=1), 3000, choose_unfiltered)
    assert len(tokens.unique()) > 1500


def test_a_row_draws_the_same_in_any_place_and_company() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, VOCABULARY)
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95)
    alone = _rows(sampling, seeds=(42,))
    alone.position[0] = 11
    want = choose(logits[2:3], alone)
    crowd = _rows(*[sampling] * 4, seeds=(1, 2, 42, 3))
    crowd.position.copy_(torch.tensor([11, 11, 11, 12]))
    assert choose(logits, crowd)[2] == want[0]


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
    logits, prompt = torch.randn(1, 300), [3, 9, 250]
    rows = _rows(Sampling(temperature=0, repetition_penalty=1.7), vocabulary=300)
    rows.assign(0, Sampling(temperature=0, repetition_penalty=1.7), 0, torch.tensor(prompt))
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt]), logits.clone())
    assert choose(logits, rows)[0] == want.argmax()
    peak = torch.zeros(1, 300)
    peak[0, 9], peak[0, 10] = 1.0, 0.9
    assert choose(peak, rows)[0] == 10
