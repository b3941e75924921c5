"""Products of quantised matrices: exactness, independence of rows, and the choice by machine."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from model import quant
from tests.model.tiny import ARCHITECTURES, tiny_model

PRODUCTS = [quant.Int8Linear, *([quant.Nf4Linear] if bnb.functional.has_avx512bf16() else [])]


def _input(rows: int, product: type[nn.Module]) -> torch.Tensor:
    torch.manual_seed(3)
    x = torch.randn(rows, 64)
    return x if product is quant.Int8Linear else x.bfloat16()


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_close_to_the_exact_one(product: type[nn.Module]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 64)
    x = _input(5, product)
    exact = x.float() @ weight.T
    error = (product(weight)(x).float() - exact).norm() / exact.norm()
    assert 0 < error < (0.03 if product is quant.Int8Linear else 0.12)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_is_bitwise_the_same_alone_and_beside_an_outlier(product: type[nn.Module]) -> None:
    layer = product(torch.randn(96, 64))
    x = _input(8, product)
    x[3] *= 10_000  # one user's outlier
    together = layer(x)
    for row in range(8):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_extreme_activations_do_not_saturate() -> None:
    """AVX2 adds pairs of 8-bit products in 16 bits: the largest possible pair must fit."""
    layer = quant.Int8Linear(torch.ones(32, 64))
    assert torch.allclose(layer(torch.full((1, 64), 5.0)), torch.full((1, 32), 320.0), rtol=1e-3)
    assert torch.allclose(layer(torch.full((1, 64), -5.0)), torch.full((1, 32), -320.0), rtol=1e-3)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(quant.Int8Linear(torch.randn(32, 64))(torch.zeros(2, 64)), torch.zeros(2, 32))


def test_packed_matrices_go_with_their_layer() -> None:
    before = len(quant._packed)
    layer = quant.Int8Linear(torch.randn(32, 64))
    assert len(quant._packed) == before + 1
    del layer
    assert len(quant._packed) == before


@pytest.mark.parametrize(
    ("device", "quantization", "kernel", "product", "dtype"),
    [
        ("cuda", "nf4", False, "bitsandbytes", torch.bfloat16),
        ("cuda", "none", False, "dense", torch.bfloat16),
        ("cpu", "nf4", True, "nf4", torch.bfloat16),
        ("cpu", "nf4", False, "int8", torch.float32),
        ("cpu", "int8", True, "int8", torch.float32),
        ("cpu", "none", True, "dense", torch.bfloat16),
        ("cpu", "none", False, "dense", torch.float32),
    ],
)
def test_the_product_is_chosen_by_machine(device, quantization, kernel, product, dtype) -> None:  # type: ignore[no-untyped-def]
    assert quant.plan(device, quantization, kernel) == quant.Plan(product, dtype)


def test_without_fbgemm_weights_become_floats_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "_HAS_FBGEMM", False)
    chosen = quant.plan("cpu", "nf4", avx512_bf16=False)
    assert chosen == quant.Plan("dequantised", torch.float32)
    dense, fused = tiny_model(), tiny_model()
    quant.install(fused, chosen)
    ids = torch.tensor([[5, 90, 17, 33]])
    with torch.inference_mode():
        torch.testing.assert_close(fused(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_int8_layers_answer_like_the_dense_model(architecture: str) -> None:
    dense, fused = tiny_model(architecture), tiny_model(architecture)
    quant.install(fused, quant.Plan("int8", torch.float32))
    ids = torch.tensor([[5, 90, 17, 33]])
    with torch.inference_mode():
        want, got = dense(ids).logits, fused(ids).logits
    assert torch.nn.functional.cosine_similarity(want, got, dim=-1).min() > 0.99
    left = [name for name, layer in fused.named_modules() if isinstance(layer, nn.Linear)]
    assert left == []  # every matrix was replaced
    assert fused.model.layers[0].self_attn.q_proj.fused.pending == ()


def test_nf4_weights_become_int8_once_and_not_at_every_call() -> None:
    layer = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(96, 64), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    weight = quant.dense_weight(layer)
    assert weight.shape == (96, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(quant.Int8Linear(weight)(x), x @ weight.float().T, rtol=0.1, atol=0.4)
