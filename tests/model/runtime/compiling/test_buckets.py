"""Which compiled step serves, and what becomes of one that fails."""

from __future__ import annotations

import pytest
import torch

from model.runtime.runner import Bucket
from model.runtime.step import Step, make_step
from model.types import Sampling
from tests.model.runtime.test_runner import PROMPTS, generated, run, runner, start


def test_steps_use_the_smallest_compiled_bucket_that_covers_them() -> None:
    engine = runner()
    used: list[Bucket] = []

    def noted(bucket: Bucket) -> Step:
        def step(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            used.append(bucket)
            return make_step(bucket.pages)(*arguments)

        return step

    engine.compiled = {bucket: noted(bucket) for bucket in (Bucket(4, 2), Bucket(1, 2), Bucket(4, 1))}
    for slot, prompt in ((0, PROMPTS[0]), (2, PROMPTS[2])):
        start(engine, slot, prompt, Sampling(temperature=0))
    for active in ([0], [2], [0, 2]):
        engine.step(active)
    assert used == [Bucket(1, 2), Bucket(4, 1), Bucket(4, 1)]


@pytest.mark.promise(
    "P6",
    injected="a compiled step that raises at its first call",
    counted="the same greedy tokens, counted as given up",
)
def test_compiled_code_that_fails_is_given_up_and_the_text_goes_on() -> None:
    engine = runner()

    def broken(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise RuntimeError("injected")

    engine.compiled = {Bucket(4, 4): broken}
    start(engine, 0, PROMPTS[0], Sampling(temperature=0))
    assert run(engine, [0], 8) == [generated("LlamaForCausalLM", PROMPTS[0], 8)]
    assert engine.compile_state() == (0, 1)


def test_rows_that_fail_eagerly_too_cost_nobody_the_compiled_code() -> None:
    engine = runner()

    def out_of_memory(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise MemoryError("injected")

    engine.compiled = {Bucket(4, 4): out_of_memory}
    start(engine, 0, PROMPTS[0], Sampling(temperature=0))
    engine.arm(0, 10_000, 2)  # no such token: eager raises as well
    with pytest.raises(IndexError):
        engine.step([0])
    assert engine.compile_state() == (1, 0)
