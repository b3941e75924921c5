"""The batched step against transformers' own generate(), on tiny random float32 models."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from model.engine.blocks import BLOCK, Copy, blocks_for
from model.engine.scheduler import Work
from model.runtime.attention import refuse_unknown
from model.runtime.kv import Batch
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from model.types import Sampling
from model.weights.catalogue import KERNEL_ARCHITECTURES
from tests.model.tiny import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.usefixtures("kernels")

DENSE = Plan("dense", torch.float32, torch.float32)
KERNELS = Plan("dense", torch.float32, torch.float32, kernels=True)  # attention by this project's own kernel
GREEDY = Sampling(temperature=0)
PLANS = [pytest.param(DENSE, id="torch"), pytest.param(KERNELS, id="kernels")]
SERVED = [  # each architecture on each path that serves it
    *(pytest.param(name, DENSE, id=f"{name}-torch") for name in ARCHITECTURES),
    *(pytest.param(name, KERNELS, id=f"{name}-kernels") for name in KERNEL_ARCHITECTURES),
]
PROMPTS = [[10, 11, 12], [(7 * i) % 290 for i in range(300)], [5], [(11 * i) % 290 for i in range(120)]]


def runner(architecture: str = "LlamaForCausalLM", slots: int = 4, context: int = 1024, plan: Plan = DENSE) -> Runner:
    return Runner(tiny_model(architecture), plan, slots, slots * blocks_for(context), context, "cpu", frozenset())


@dataclass
class Text:
    """A sequence in a runner: all its tokens, of which the KV of all but the last is computed."""

    row: int
    tokens: list[int]
    blocks: list[int]

    def work(self, *guesses: int) -> Work:
        return Work(self.row, [self.tokens[-1], *guesses], len(self.tokens) - 1, self.blocks)


def blocks_of(engine: Runner, row: int) -> list[int]:
    """Those of a row, when each has its share: the last first, for they may come in any order."""
    each = engine.blocks // engine.slots
    return [1 + row * each + n for n in reversed(range(each))]


def start(engine: Runner, row: int, prompt: list[int], sampling: Sampling, seed: int = 1, chunk: int = 64) -> Text:
    text = Text(row, list(prompt), blocks_of(engine, row))
    engine.begin(row, sampling, seed, prompt)
    for at in range(0, len(prompt) - 1, chunk):
        engine.prefill([Work(row, prompt[at : min(at + chunk, len(prompt) - 1)], at, text.blocks)])
    return text


def run(engine: Runner, texts: list[Text], count: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in texts]
    for _ in range(count):
        for text, own, (token,) in zip(texts, made, engine.step([text.work() for text in texts]), strict=True):
            assert token is not None
            text.tokens.append(token)
            own.append(token)
    return made


def generated(architecture: str, prompt: list[int], count: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    out = tiny_model(architecture).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("architecture", "plan"), SERVED)
def test_greedy_in_a_batch_is_greedy_alone_is_generate(architecture: str, plan: Plan) -> None:
    engine, alone = runner(architecture, plan=plan), runner(architecture, slots=1, plan=plan)
    together = run(engine, [start(engine, row, prompt, GREEDY) for row, prompt in enumerate(PROMPTS)], 24)
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert text == generated(architecture, prompt, 24)
        assert run(alone, [start(alone, 0, prompt, GREEDY)], 24) == [text]


@pytest.mark.parametrize(("architecture", "plan"), SERVED)
def test_chunks_of_any_size_make_the_same_prompt(architecture: str, plan: Plan) -> None:
    want = generated(architecture, PROMPTS[1], 8)
    for chunk in (1, 7, BLOCK - 1, BLOCK, 512):
        engine = runner(architecture, slots=1, plan=plan)
        assert run(engine, [start(engine, 0, PROMPTS[1], GREEDY, chunk=chunk)], 8) == [want]


@pytest.mark.parametrize("plan", PLANS)
def test_a_text_grows_over_a_blocks_border(plan: Plan) -> None:
    engine, prompt = runner(slots=2, plan=plan), PROMPTS[1][: BLOCK - 5]
    assert run(engine, [start(engine, 1, prompt, GREEDY)], 20) == [generated("LlamaForCausalLM", prompt, 20)]


@pytest.mark.parametrize(("architecture", "plan"), SERVED)
def test_guesses_are_read_beside_the_next_token_as_if_one_by_one(architecture: str, plan: Plan) -> None:
    """Right ones, wrong ones, and another row's single token beside them; what a wrong one wrote is written over."""
    engine, want = runner(architecture, plan=plan), generated(architecture, PROMPTS[1], 9)
    text, other = start(engine, 0, PROMPTS[1], GREEDY), start(engine, 2, PROMPTS[3], GREEDY)
    chosen = engine.step([text.work(want[0], want[1], want[2] + 1, want[3]), other.work()])
    assert chosen[0][:3] == want[:3] and chosen[1] == generated(architecture, PROMPTS[3], 1)
    text.tokens += want[:3]
    assert engine.step([text.work(*want[3:6])])[0] == want[3:7]
    text.tokens += want[3:7]
    assert run(engine, [text], 2) == [want[7:]]


@pytest.mark.parametrize("plan", PLANS)
def test_a_copied_block_goes_on_as_its_source(plan: Plan) -> None:
    engine = runner(slots=2, plan=plan)
    source = start(engine, 0, PROMPTS[3], GREEDY)
    other = Text(1, [*PROMPTS[3][:100], 7, 8], blocks_of(engine, 1))
    engine.copy(Copy(source.blocks[0], other.blocks[0], 100))
    engine.begin(1, GREEDY, 1, other.tokens)
    engine.prefill([Work(1, other.tokens[100:-1], 100, other.blocks)])
    texts = run(engine, [source, other], 8)
    assert texts == [
        generated("LlamaForCausalLM", PROMPTS[3], 8),
        generated("LlamaForCausalLM", [*PROMPTS[3][:100], 7, 8], 8),
    ]


def test_repetition_penalty_is_transformers_own() -> None:
    engine = runner(slots=2)
    texts = [start(engine, 0, PROMPTS[0], GREEDY), start(engine, 1, PROMPTS[0], Sampling(0, repetition_penalty=1.5))]
    plain, penalised = run(engine, texts, 24)
    assert penalised == generated("LlamaForCausalLM", PROMPTS[0], 24, repetition_penalty=1.5) != plain


@pytest.mark.parametrize(("architecture", "plan"), SERVED)
def test_a_seeded_row_is_the_same_alone_and_among_strangers(architecture: str, plan: Plan) -> None:
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.9)
    engine, alone = runner(architecture, plan=plan), runner(architecture, slots=1, plan=plan)
    texts = [start(engine, row, prompt, sampling, seed=100 + row) for row, prompt in enumerate(PROMPTS)]
    together = run(engine, texts, 16)
    assert run(alone, [start(alone, 0, PROMPTS[1], sampling, seed=101)], 16) == [together[1]]
    assert run(alone, [start(alone, 0, PROMPTS[1], sampling, seed=102)], 16) != [together[1]]


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_without_any_cut_is_drawn_from_the_whole_vocabulary_and_spares_the_others(plan: Plan) -> None:
    engine = runner(plan=plan)
    free = Sampling(temperature=4.0, top_k=0, top_p=1.0)
    greedy, drawn = run(engine, [start(engine, 0, PROMPTS[0], GREEDY), start(engine, 1, PROMPTS[0], free, seed=5)], 16)
    assert greedy == generated("LlamaForCausalLM", PROMPTS[0], 16) != drawn


@pytest.mark.promise("P5", injected="NaN in the KV of one row of a real model", counted="the other's tokens unchanged")
@pytest.mark.parametrize("plan", PLANS)
def test_numbers_that_are_not_finite_are_told_and_only_of_their_row(plan: Plan, counted: Callable[..., None]) -> None:
    engine = runner(slots=2, plan=plan)
    good, bad = start(engine, 0, PROMPTS[0], GREEDY), start(engine, 1, PROMPTS[3], GREEDY)
    engine.kv.values[0][bad.blocks[0]].select(1 if plan.kernels else 0, 3).fill_(torch.nan)
    tokens = [own for (own,) in engine.step([good.work(), bad.work()])]
    sound = engine.prefill([bad.work(), good.work()])
    counted(bad_rows_in_steps=tokens.count(None), bad_rows_in_prompts=sound.count(False), good_rows=sound.count(True))
    assert sound == [False, True]
    assert tokens[1] is None and tokens[0] == generated("LlamaForCausalLM", PROMPTS[0], 1)[0]
    engine.clear(bad.blocks)
    assert run(engine, [start(engine, 1, PROMPTS[3], GREEDY)], 4) == [generated("LlamaForCausalLM", PROMPTS[3], 4)]


def test_an_attention_argument_that_is_not_understood_is_refused() -> None:
    refuse_unknown({"dropout": 0.0, "sliding_window": None, "position_ids": object()})
    for argument in ({"softcap": 50.0}, {"sliding_window": 512}, {"dropout": 0.1}, {"brand_new": 1}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            refuse_unknown(argument)


PACKED = Plan("packed", torch.float32, torch.bfloat16, kernels=True)


@pytest.mark.promise(
    "P29",
    injected="other rows, chunks of other lengths, guesses, blocks in another order: 1,000 seeded schedules",
    counted="bitwise the same logits",
)
@pytest.mark.parametrize("architecture", KERNEL_ARCHITECTURES)
def test_a_text_depends_on_nothing_but_itself_to_the_bit(architecture: str, counted: Callable[..., None]) -> None:
    """Each text's logits after each token, computed in one piece and, 1,000 times, in random pieces beside others."""
    engine, chance = runner(architecture, context=512, plan=PACKED), random.Random(architecture)
    assert engine.details()["deterministic"]
    wanted = [logits(engine, [Work(0, tokens, 0, [1, 2])])[0] for tokens in PROMPTS]
    same, schedules = 0, 1000 // len(KERNEL_ARCHITECTURES) + 1
    for _ in range(schedules):
        rows = chance.sample(range(len(PROMPTS)), chance.randrange(1, len(PROMPTS) + 1))
        blocks = iter(chance.sample(range(1, 9), 8))
        places = {row: [next(blocks), next(blocks)] for row in rows}
        at, found = dict.fromkeys(rows, 0), {row: [torch.zeros(0)] for row in rows}
        while left := [row for row in rows if at[row] < len(PROMPTS[row])]:
            now = chance.sample(left, chance.randrange(1, len(left) + 1))
            pieces = [PROMPTS[row][at[row] :][: chance.choice([1, 1, 2, 5, 8, 31, 33, 64, 300])] for row in now]
            made = logits(engine, [Work(r, piece, at[r], places[r]) for r, piece in zip(now, pieces, strict=True)])
            for row, piece, one in zip(now, pieces, made, strict=True):
                at[row] += len(piece)
                found[row].append(one)
        same += all(torch.equal(torch.cat(found[row][1:]), wanted[row]) for row in rows)
    counted(schedules=schedules, bitwise_the_same=same)
    assert same == schedules


@torch.inference_mode()
def logits(engine: Runner, work: list[Work]) -> list[torch.Tensor]:
    made = engine.model.lm_head(engine.hidden_states(Batch.of(work)))
    return list(made.split([len(one.tokens) for one in work]))


@pytest.mark.parametrize("plan", PLANS)
def test_several_prompts_in_one_chunk_are_computed_as_if_alone(plan: Plan) -> None:
    engine = runner(plan=plan)
    texts = [Text(row, list(prompt), blocks_of(engine, row)) for row, prompt in enumerate(PROMPTS)]
    for text in texts:
        engine.begin(text.row, GREEDY, 1, text.tokens)
    chunks = [Work(text.row, text.tokens[:-1], 0, text.blocks) for text in texts if text.tokens[1:]]
    assert engine.prefill(chunks) == [True] * 3
    assert run(engine, texts, 8) == [generated("LlamaForCausalLM", prompt, 8) for prompt in PROMPTS]


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        pytest.param("LlamaForCausalLM", {"rope_type": "linear", "factor": 2.0}, id="linear"),
        pytest.param("LlamaForCausalLM", {"rope_type": "dynamic", "factor": 2.0}, id="dynamic, within the context"),
        pytest.param("Phi3ForCausalLM", LONG | {"original_max_position_embeddings": 512}, id="longrope, short texts"),
        pytest.param("Phi3ForCausalLM", LONG | {"original_max_position_embeddings": 511}, id="longrope, long texts"),
        pytest.param("Phi3ForCausalLM", {"rope_type": "default", "partial_rotary_factor": 0.5}, id="half of a head"),
    ],
)
def test_rotary_embeddings_are_looked_up(architecture: str, rope: dict[str, object]) -> None:
    scaled = {"rope_parameters": {"rope_theta": 10_000.0} | rope}
    plain, served = tiny_model(architecture, **scaled), tiny_model(architecture, **scaled)
    Runner(served, DENSE, 1, 2, 512, "cpu", frozenset())
    positions, like = torch.tensor([[0, 3, 511]]), torch.zeros(1)
    for got, want in zip(*(each.model.rotary_emb(like, positions) for each in (served, plain)), strict=True):
        assert torch.equal(got, want)


def test_gemmas_layers_have_rotary_embeddings_of_their_own() -> None:
    plain, served = tiny_model("Gemma3ForCausalLM"), tiny_model("Gemma3ForCausalLM")
    Runner(served, DENSE, 1, 2, 512, "cpu", frozenset())
    positions, like = torch.tensor([[0, 3, 511]]), torch.zeros(1)
    tables = []
    for kind in ("sliding_attention", "full_attention"):
        got, want = (each.model.rotary_emb(like, positions, kind) for each in (served, plain))
        assert torch.equal(torch.cat(got), torch.cat(want))
        tables.append(got[0])
    assert not torch.equal(*tables)
