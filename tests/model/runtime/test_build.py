"""How many slots of how much context: bounded by settings, by the model and by memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from model.engine.blocks import BLOCK
from model.engine.scheduler import Work
from model.runtime import build
from model.runtime.attention import attend_by_definition, verify
from model.runtime.build import fit, require_embeddings, try_out
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from model.weights.catalogue import KERNEL_ARCHITECTURES, ModelError, find
from model.weights.loader import prepare
from settings import Settings
from tests.model.test_local import settings_for
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model, tiny_tokenizer

# 2 sides x 2 layers x 2 KV heads x 16 x 4 bytes
TOKEN = 512


def room(monkeypatch: pytest.MonkeyPatch, available: int, **settings: int) -> tuple[int, int, int]:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=1 << 40))
    return fit(Settings(**settings), tiny_model().config, torch.float32, "cpu")  # type: ignore[arg-type]


def test_settings_and_model_bound_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(monkeypatch, 1 << 40) == (16, 16 * 4, 1024)  # the model's own context
    assert room(monkeypatch, 1 << 40, slots=3, max_context=300) == (3, 3 * 2, 300)


def test_memory_bounds_the_sum_and_only_then_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 2 * TOKEN * 256  # half of the available memory is for KV
    assert room(monkeypatch, block * 21) == (16, 20, 1024)  # one is nobody's
    assert room(monkeypatch, block * 3) == (2, 2, 512)


def test_too_little_memory_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no memory is left for KV"):
        room(monkeypatch, 2 * TOKEN * 256)


def test_damaged_weights_fail_the_load_and_not_a_user() -> None:
    model = tiny_model()
    model.lm_head.weight.data[3, 5] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        try_out(Runner(model, Plan("dense", torch.float32, torch.float32), 2, 2, 256, "cpu", frozenset()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("architecture", "by_kernels"),
    [(name, kernels) for kernels, names in ((False, ARCHITECTURES), (True, KERNEL_ARCHITECTURES)) for name in names
     if name != "LlamaForCausalLM"],
)  # fmt: skip
def test_a_window_that_a_text_does_not_fit_into_is_refused(architecture: str, by_kernels: bool) -> None:
    overrides = {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 1}
    plan = Plan("dense", torch.float32, torch.float32, by_kernels)
    try_out(Runner(tiny_model(architecture, **overrides), plan, 2, 2, 256, "cpu", frozenset()))
    with pytest.raises(ModelError, match=r"sliding_window=256 is not served: set MAX_CONTEXT=256"):
        Runner(tiny_model(architecture, **overrides), plan, 2, 4, 257, "cpu", frozenset())


def test_attention_that_is_not_understood_is_refused() -> None:
    model = tiny_model("Qwen2ForCausalLM")
    attention = model.model.layers[1].self_attn
    attention.forward = partial(attention.forward, softcap=50.0)
    with pytest.raises(ValueError, match=r"softcap=50\.0"):
        try_out(Runner(model, Plan("dense", torch.float32, torch.float32), 2, 2, 256, "cpu", frozenset()))


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(KERNEL_ARCHITECTURES)))
def test_the_kernels_take_no_layer_that_they_do_not_know(architecture: str) -> None:
    plan = Plan("dense", torch.float32, torch.float32, kernels=True)
    with pytest.raises(ValueError, match=f"{architecture} has layers that the CPU kernels do not know"):
        Runner(tiny_model(architecture), plan, 1, 1, 256, "cpu", frozenset())


@pytest.mark.usefixtures("kernels")
def test_a_model_that_is_refused_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Runner) -> None:
        raise ValueError("it has a soft cap")

    settings = settings_for(source, tmp_path / "data")
    monkeypatch.setattr(build, "try_out", refuse)
    with pytest.raises(ModelError, match="cannot be served: it has a soft cap"):
        build.build(prepare(find(settings), settings), settings, lambda stage, percent: None)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("architecture", "change", "by_kernels"),
    [
        *((name, {}, name in KERNEL_ARCHITECTURES) for name in ARCHITECTURES),
        ("LlamaForCausalLM", {"head_dim": 24}, False),
        ("Phi3ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                 "partial_rotary_factor": 0.5}}, False),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_compute_is_served_by_transformers_modules(
    tmp_path: Path, architecture: str, change: dict[str, object], by_kernels: bool
) -> None:
    source = tiny_checkpoint(tmp_path / "source", architecture)
    tiny_model(architecture, **change).save_pretrained(source)
    settings = settings_for(source, tmp_path / "data")
    runner = build.build(prepare(find(settings), settings), settings, lambda stage, percent: None)
    assert runner.plan.kernels is by_kernels
    assert len(runner.step([Work(0, [7], 1, [1])])[0]) == 1


def test_a_token_without_an_embedding_is_refused_if_a_prompt_may_hold_it() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)  # as Gemma 3 1B has one
    require_embeddings(tokenizer, size)
    with pytest.raises(ModelError, match="the model has 290 embeddings, and none for"):
        require_embeddings(tokenizer, 290)
    tokenizer.chat_template += "<image_soft_token>"
    with pytest.raises(ModelError, match="none for 1 tokens"):
        require_embeddings(tokenizer, size)


@pytest.mark.parametrize("wrong_for", [None, 1, 2])
def test_attention_that_computes_something_else_on_this_gpu_fails_the_load(wrong_for: int | None) -> None:
    """As PyTorch 2.13 does for several sequences in several splits: rows of the others stay unwritten."""

    def attend(query: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        out = attend_by_definition(query, *rest, **options)  # type: ignore[arg-type]
        if len(options["seqused_k"]) == wrong_for:  # type: ignore[arg-type]
            out[-1] = 0
        return out

    keys = torch.zeros(1, BLOCK, 2, 16, dtype=torch.bfloat16)
    if wrong_for is None:
        return verify(4, keys, attend)
    with pytest.raises(ValueError, match="wrong numbers"):
        verify(4, keys, attend)
