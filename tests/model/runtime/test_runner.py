"""The batched step against transformers' own generate(), on tiny random float32 models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.runtime import attention
from model.runtime.attention import refuse_unknown
from model.runtime.kv import PAGE
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from model.types import Sampling
from tests.model.tiny import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.usefixtures("kernels")

DENSE = Plan("dense", torch.float32, torch.float32)
KERNELS = Plan("dense", torch.float32, torch.float32, kernels=True)  # attention by this project's own kernel
PLANS = [pytest.param(DENSE, id="torch"), pytest.param(KERNELS, id="kernels")]
PROMPTS = [[10, 11, 12], [(7 * i) % 290 for i in range(300)], [5], [(11 * i) % 290 for i in range(120)]]


def runner(architecture: str = "LlamaForCausalLM", slots: int = 4, context: int = 1024, plan: Plan = DENSE) -> Runner:
    return Runner(tiny_model(architecture), plan, slots, context, "cpu", frozenset())


def start(engine: Runner, slot: int, prompt: list[int], sampling: Sampling, seed: int = 1, chunk: int = 64) -> None:
    engine.init_row(slot, sampling, seed, prompt)
    for position in range(0, len(prompt) - 1, chunk):
        engine.prefill([(slot, prompt[position : min(position + chunk, len(prompt) - 1)], position)])
    engine.activate(slot, prompt[-1], len(prompt) - 1)


def run(engine: Runner, active: list[int], count: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in active]
    for _ in range(count):
        tokens = engine.step(active)
        for text, slot in zip(texts, active, strict=True):
            token = tokens[slot]
            assert token is not None
            text.append(token)
    return texts


def generated(architecture: str, prompt: list[int], count: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = tiny_model(architecture).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_in_a_batch_is_greedy_alone_is_generate(architecture: str, plan: Plan) -> None:
    engine, alone = runner(architecture, plan=plan), runner(architecture, slots=1, plan=plan)
    for slot, prompt in enumerate(PROMPTS):
        start(engine, slot, prompt, Sampling(temperature=0))
    together = run(engine, [0, 1, 2, 3], 24)
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert text == generated(architecture, prompt, 24)
        start(alone, 0, prompt, Sampling(temperature=0))
        assert run(alone, [0], 24) == [text]


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_of_any_size_make_the_same_prompt(plan: Plan) -> None:
    want = generated("LlamaForCausalLM", PROMPTS[1], 8)
    for chunk in (1, 7, PAGE - 1, PAGE, 512):
        engine = runner(slots=1, plan=plan)
        start(engine, 0, PROMPTS[1], Sampling(temperature=0), chunk=chunk)
        assert run(engine, [0], 8) == [want]


@pytest.mark.parametrize("plan", PLANS)
def test_a_text_grows_over_a_page_border(plan: Plan) -> None:
    engine = runner(slots=2, plan=plan)
    prompt = PROMPTS[1][: PAGE - 5]
    start(engine, 1, prompt, Sampling(temperature=0))
    assert run(engine, [1], 20) == [generated("LlamaForCausalLM", prompt, 20)]


def test_repetition_penalty_is_transformers_own() -> None:
    engine = runner(slots=2)
    start(engine, 0, PROMPTS[0], Sampling(temperature=0))
    start(engine, 1, PROMPTS[0], Sampling(temperature=0, repetition_penalty=1.5))
    plain, penalised = run(engine, [0, 1], 24)
    assert penalised == generated("LlamaForCausalLM", PROMPTS[0], 24, repetition_penalty=1.5) != plain


@pytest.mark.parametrize("plan", PLANS)
def test_a_seeded_row_is_the_same_alone_and_among_strangers(plan: Plan) -> None:
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.9)
    engine, alone = runner(plan=plan), runner(slots=1, plan=plan)
    for slot, prompt in enumerate(PROMPTS):
        start(engine, slot, prompt, sampling, seed=100 + slot)
    together = run(engine, [0, 1, 2, 3], 16)
    start(alone, 0, PROMPTS[1], sampling, seed=101)
    assert run(alone, [0], 16) == [together[1]]
    start(alone, 0, PROMPTS[1], sampling, seed=102)
    assert run(alone, [0], 16) != [together[1]]


def test_a_row_without_any_cut_is_drawn_from_the_whole_vocabulary_and_spares_the_others() -> None:
    engine = runner()
    start(engine, 0, PROMPTS[0], Sampling(temperature=0))
    start(engine, 1, PROMPTS[0], Sampling(temperature=4.0, top_k=0, top_p=1.0), seed=5)
    greedy, free = run(engine, [0, 1], 16)
    assert greedy == generated("LlamaForCausalLM", PROMPTS[0], 16) != free


@pytest.mark.parametrize("plan", PLANS)
def test_idle_rows_of_a_bucket_keep_their_kv(plan: Plan) -> None:
    """A step computes every row of its bucket: one in prefill or at rest must come out unharmed."""
    engine = runner(slots=3, plan=plan)
    resting, arriving = PROMPTS[3], PROMPTS[1]
    start(engine, 0, resting, Sampling(temperature=0))
    engine.deactivate(0, len(resting) - 1)
    engine.init_row(1, Sampling(temperature=0), 1, arriving)
    engine.deactivate(1, 0)
    start(engine, 2, PROMPTS[0], Sampling(temperature=0))
    for position in range(0, len(arriving) - 1, 50):
        engine.prefill([(1, arriving[position : min(position + 50, len(arriving) - 1)], position)])
        run(engine, [2], 2)
    engine.activate(1, arriving[-1], len(arriving) - 1)
    engine.init_row(0, Sampling(temperature=0), 1, resting)
    engine.activate(0, resting[-1], len(resting) - 1)
    texts = run(engine, [0, 1], 8)
    assert texts == [generated("LlamaForCausalLM", resting, 8), generated("LlamaForCausalLM", arriving, 8)]


@pytest.mark.parametrize("plan", PLANS)
def test_swapped_slots_go_on_as_if_nothing_happened(plan: Plan) -> None:
    engine = runner(slots=3, plan=plan)
    start(engine, 2, PROMPTS[1], Sampling(temperature=1.0, repetition_penalty=1.2), seed=9)
    start(engine, 0, PROMPTS[3], Sampling(temperature=0))
    before = run(engine, [0, 2], 5)
    engine.swap(2, 1, len(PROMPTS[1]) + 6)
    after = run(engine, [0, 1], 5)
    other = runner(slots=3, plan=plan)
    start(other, 2, PROMPTS[1], Sampling(temperature=1.0, repetition_penalty=1.2), seed=9)
    start(other, 0, PROMPTS[3], Sampling(temperature=0))
    assert [a + b for a, b in zip(before, after, strict=True)] == run(other, [0, 2], 10)


@pytest.mark.promise("P5", injected="NaN in the KV of one row of a real model", counted="the other's tokens unchanged")
@pytest.mark.parametrize("plan", PLANS)
def test_numbers_that_are_not_finite_are_told_and_only_of_their_row(plan: Plan, counted: Callable[..., None]) -> None:
    engine = runner(slots=2, plan=plan)
    start(engine, 0, PROMPTS[0], Sampling(temperature=0))
    start(engine, 1, PROMPTS[3], Sampling(temperature=0))
    engine.kv.values[0][0, 1, :, 3] = torch.nan  # the first page, or the only one
    tokens = engine.step([0, 1])
    sound = engine.prefill([(1, [3], len(PROMPTS[3])), (0, [3], len(PROMPTS[0]))])
    counted(bad_rows_in_steps=tokens.count(None), bad_rows_in_prompts=sound.count(False), good_rows=sound.count(True))
    assert sound == [False, True]
    assert tokens[1] is None and tokens[0] == generated("LlamaForCausalLM", PROMPTS[0], 1)[0]
    engine.clear(1)
    start(engine, 1, PROMPTS[3], Sampling(temperature=0))
    assert run(engine, [1], 4) == [generated("LlamaForCausalLM", PROMPTS[3], 4)]


def test_an_attention_argument_that_is_not_understood_is_refused() -> None:
    refuse_unknown({"dropout": 0.0, "sliding_window": None, "position_ids": object()})
    for argument in ({"softcap": 50.0}, {"sliding_window": 512}, {"dropout": 0.1}, {"brand_new": 1}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            refuse_unknown(argument)


PACKED = Plan("packed", torch.float32, torch.bfloat16, kernels=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_matrices_keep_a_batch_bitwise_equal_to_one_alone(architecture: str) -> None:
    engine, alone = runner(architecture, plan=PACKED), runner(architecture, slots=1, plan=PACKED)
    for slot, prompt in enumerate(PROMPTS):
        start(engine, slot, prompt, Sampling(temperature=0))
    together = run(engine, [0, 1, 2, 3], 16)
    for prompt, text in zip(PROMPTS, together, strict=True):
        start(alone, 0, prompt, Sampling(temperature=0))
        assert run(alone, [0], 16) == [text]


def test_several_prompts_in_one_chunk_are_computed_as_if_alone() -> None:
    together, alone = runner(plan=KERNELS), runner(plan=KERNELS)
    for slot, prompt in enumerate(PROMPTS):
        together.init_row(slot, Sampling(temperature=0), 1, prompt)
        start(alone, slot, prompt, Sampling(temperature=0), chunk=512)
    assert together.prefill([(slot, prompt[:-1], 0) for slot, prompt in enumerate(PROMPTS)]) == [True] * 4
    for slot, prompt in enumerate(PROMPTS):
        together.activate(slot, prompt[-1], len(prompt) - 1)
    assert run(together, [0, 1, 2, 3], 16) == run(alone, [0, 1, 2, 3], 16)


@pytest.mark.parametrize(("rope", "looked_up"), [("linear", True), ("dynamic", False)])
def test_rotary_embeddings_are_looked_up_where_the_position_is_all_they_depend_on(rope: str, looked_up: bool) -> None:
    scaled = {"rope_parameters": {"rope_type": rope, "factor": 2.0, "rope_theta": 10_000.0}}
    plain, served = tiny_model(**scaled), tiny_model(**scaled)
    Runner(served, DENSE, 1, 512, "cpu", frozenset())
    assert isinstance(served.model.rotary_emb, attention.RotaryTable) == looked_up
    positions, like = torch.tensor([[0, 3, 511]]), torch.zeros(1)
    for got, want in zip(*(each.model.rotary_emb(like, positions) for each in (served, plain)), strict=True):
        assert torch.equal(got, want)
