"""How many slots of how much context: bounded by settings, by the model and by memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from model.engine.blocks import BLOCK
from model.runtime import build
from model.runtime.attention import attend_by_definition, verify
from model.runtime.build import fit, try_out
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from model.weights.catalogue import ModelError, find
from model.weights.loader import prepare
from settings import Settings
from tests.model.test_local import settings_for
from tests.model.tiny import tiny_model

# 2 sides x 2 layers x 2 KV heads x 16 x 4 bytes
TOKEN = 512


def room(monkeypatch: pytest.MonkeyPatch, available: int, **settings: int) -> tuple[int, int, int]:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=available))
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
@pytest.mark.parametrize("kernels", [False, True])
def test_attention_that_is_not_understood_is_refused(kernels: bool) -> None:
    model = tiny_model("Qwen2ForCausalLM")
    model.model.layers[1].self_attn.sliding_window = 512
    with pytest.raises(ValueError, match="sliding_window"):
        try_out(Runner(model, Plan("dense", torch.float32, torch.float32, kernels), 2, 2, 256, "cpu", frozenset()))


@pytest.mark.usefixtures("kernels")
def test_a_model_that_is_refused_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Runner) -> None:
        raise ValueError("it has a soft cap")

    settings = settings_for(source, tmp_path / "data")
    monkeypatch.setattr(build, "try_out", refuse)
    with pytest.raises(ModelError, match="cannot be served: it has a soft cap"):
        build.build(prepare(find(settings), settings), settings, lambda stage, percent: None)


@pytest.mark.usefixtures("kernels")
def test_heads_that_the_kernels_cannot_take_are_one_line(source: Path, tmp_path: Path) -> None:
    tiny_model(head_dim=24).save_pretrained(source)
    settings = settings_for(source, tmp_path / "data")
    with pytest.raises(ModelError, match="multiples of 16"):
        build.build(prepare(find(settings), settings), settings, lambda stage, percent: None)


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
