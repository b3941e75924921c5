"""Products of quantised matrices: exactness, independence of rows, and the choice by machine."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from model.runtime import linear as quant
from model.runtime.packed import FeedForward, PackedLinear
from tests.model.tiny import ARCHITECTURES, tiny_model

PRODUCTS = [quant.Int8Linear, PackedLinear.dense]

pytestmark = pytest.mark.usefixtures("kernels")


def nf4_layer(weight: torch.Tensor, nested: bool = True) -> bnb.nn.Linear4bit:
    rows, k = weight.shape
    layer = bnb.nn.Linear4bit(k, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=nested
    )
    return layer.to("cpu")


def nf4(weight: torch.Tensor) -> PackedLinear:
    return PackedLinear.nf4([nf4_layer(weight)])


def inputs(rows: int, k: int = 128) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(rows, k)


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", [96, 20])  # the kernel computes eight at once: 20 is no multiple
def test_a_product_is_close_to_the_exact_one(product: Callable[[torch.Tensor], nn.Module], rows: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(rows, 128), inputs(5)
    y = product(weight)(x[None])
    assert y.shape == (1, 5, rows)
    assert 0 < relative_error(y[0], x @ weight.T) < 0.03


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_codes_are_multiplied_as_they_are(nested: bool) -> None:
    """Against bitsandbytes' own dequantisation: what is left is the rounding of activations and of the codebook."""
    layers, x = [nf4_layer(torch.randn(96, 128), nested), nf4_layer(torch.randn(32, 128), nested)], inputs(7)
    exact = x @ torch.cat([quant.dense_weight(layer) for layer in layers]).T
    assert relative_error(PackedLinear.nf4(layers)(x), exact) < 0.02


def test_each_of_the_sixteen_values_is_the_libraries_own() -> None:
    layer = nf4_layer(torch.linspace(-1, 1, 64).expand(8, 64).contiguous(), nested=False)
    assert len(quant.dense_weight(layer).unique()) == 16
    step = 1 / 63
    error = PackedLinear.nf4([layer])(torch.eye(64)).T - quant.dense_weight(layer)
    assert error.abs().max() < step / 2 + 0.004  # rounded to a step, and the block's scale to bfloat16


def test_four_bits_of_another_kind_are_refused() -> None:
    layer = bnb.nn.Linear4bit(128, 32, bias=False, quant_type="fp4")
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 128), requires_grad=False, quant_type="fp4", blocksize=64)
    with pytest.raises(ValueError, match="fp4"):
        PackedLinear.nf4([layer.to("cpu")])


@pytest.mark.parametrize("product", [*PRODUCTS, nf4])
def test_a_row_is_bitwise_the_same_alone_and_beside_an_outlier(product: Callable[[torch.Tensor], nn.Module]) -> None:
    layer, x = product(torch.randn(96, 128)), inputs(150)  # more rows than the kernel computes together
    x[3] *= 10_000  # one user's outlier
    together = layer(x)
    for row in (0, 1, 2, 3, 4, 63, 64, 127, 149):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    for count in range(2, 10):  # few rows, and what is left over of many, have code of their own
        assert torch.equal(layer(x[:count]), together[:count])


@pytest.mark.parametrize("rows", [1, 9])
def test_threads_do_not_show_in_a_result(rows: int) -> None:
    layer, x = nf4(torch.randn(96, 128)), inputs(rows)
    alone = layer(x)
    torch.set_num_threads(3)
    try:
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(1)


def test_what_is_not_finite_stays_so_in_its_row_alone() -> None:
    layer, x = PackedLinear.dense(torch.randn(32, 128)), inputs(3)
    x[1, 70] = torch.nan
    finite = layer(x).isfinite().all(-1).tolist()
    x[1, 70] = torch.inf
    assert finite == layer(x).isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("value", [5.0, -5.0, 1e30, 1e-30])
def test_extreme_activations_do_not_saturate(product: Callable[[torch.Tensor], nn.Module], value: float) -> None:
    """AVX2 adds pairs of 8-bit products in 16 bits: the largest possible pair must fit."""
    for weight in (1.0, -1.0):
        y = product(torch.full((32, 64), weight))(torch.full((1, 64), value))
        assert torch.allclose(y, torch.full((1, 32), 64 * weight * value), rtol=5e-3)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_of_zeros_stays_zero(product: Callable[[torch.Tensor], nn.Module]) -> None:
    assert torch.equal(product(torch.randn(32, 64))(torch.zeros(2, 64)), torch.zeros(2, 32))


def test_packed_matrices_go_with_their_layer() -> None:
    before = len(quant._packed)
    layer = quant.Int8Linear(torch.randn(32, 64))
    assert len(quant._packed) == before + 1
    del layer
    assert len(quant._packed) == before


@pytest.mark.parametrize(
    ("device", "quantization", "kernels", "product", "dtype", "kv"),
    [
        ("cuda", "nf4", False, "bitsandbytes", torch.bfloat16, torch.bfloat16),
        ("cuda", "none", False, "dense", torch.bfloat16, torch.bfloat16),
        ("cpu", "nf4", True, "packed", torch.float32, torch.bfloat16),
        ("cpu", "nf4", False, "int8", torch.float32, torch.float32),
        ("cpu", "int8", True, "packed", torch.float32, torch.bfloat16),
        ("cpu", "int8", False, "int8", torch.float32, torch.float32),
        ("cpu", "none", True, "dense", torch.float32, torch.bfloat16),
        ("cpu", "none", False, "dense", torch.float32, torch.float32),
    ],
)
def test_the_product_is_chosen_by_machine(device, quantization, kernels, product, dtype, kv) -> None:  # type: ignore[no-untyped-def]
    assert quant.plan(device, quantization, kernels) == quant.Plan(product, dtype, kv, kernels)


def test_without_fbgemm_weights_become_floats_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "_HAS_FBGEMM", False)
    chosen = quant.plan("cpu", "nf4", kernels=False)
    assert chosen == quant.Plan("dequantised", torch.float32, torch.float32)
    dense, fused = tiny_model(), tiny_model()
    quant.install(fused, chosen)
    ids = torch.tensor([[5, 90, 17, 33]])
    with torch.inference_mode():
        torch.testing.assert_close(fused(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("count", [1, 4, 5, 70])  # 70 are more than are computed together
def test_a_feed_forward_is_its_three_steps(count: int) -> None:
    torch.manual_seed(1)
    gate_up, down = nf4(torch.randn(512, 128)), PackedLinear.dense(torch.randn(128, 256))
    layer, x = FeedForward(gate_up, down), inputs(count)
    gate, up = gate_up(x).split([256, 256], -1)
    torch.testing.assert_close(layer(x), down(nn.functional.silu(gate) * up), rtol=1e-3, atol=1e-2)
    assert torch.equal(layer(x[None, :1])[0], layer(x)[:1])  # whoever shares the batch


def test_a_feed_forward_keeps_what_is_not_finite_in_its_row_alone() -> None:
    layer, x = FeedForward(nf4(torch.randn(512, 128)), nf4(torch.randn(128, 256))), inputs(3)
    for value in (torch.nan, torch.inf, 1e38):
        x[1, 70] = value
        assert layer(x).isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("product", ["int8", "packed"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_layers_answer_like_the_dense_model(architecture: str, product: str) -> None:
    dense, fused = tiny_model(architecture), tiny_model(architecture)
    quant.install(fused, quant.Plan(product, torch.float32, torch.float32))
    ids = torch.tensor([[5, 90, 17, 33]])
    with torch.inference_mode():
        want, got = dense(ids).logits, fused(ids).logits
    assert torch.nn.functional.cosine_similarity(want, got, dim=-1).min() > 0.99
    left = [name for name, layer in fused.named_modules() if isinstance(layer, nn.Linear)]
    assert left == []  # every matrix was replaced
    assert fused.model.layers[0].self_attn.q_proj.fused.pending == ()
    assert isinstance(fused.model.layers[0].mlp, FeedForward) == (product == "packed")


def test_a_feed_forward_of_another_kind_stays_in_parts() -> None:
    for change in ({"hidden_act": "gelu"}, {"mlp_bias": True}):
        dense, fused = tiny_model(**change), tiny_model(**change)
        quant.install(fused, quant.Plan("packed", torch.float32, torch.float32))
        assert not isinstance(fused.model.layers[0].mlp, FeedForward)
        want, got = (model(torch.tensor([[5, 90, 17, 33]])).logits for model in (dense, fused))
        assert torch.nn.functional.cosine_similarity(want, got, dim=-1).min() > 0.99


def test_a_width_that_the_kernel_cannot_take_gets_another_product() -> None:
    chosen = quant.plan("cpu", "nf4", kernels=True)
    assert isinstance(quant.product([nn.Linear(96, 32)], chosen), quant.Int8Linear)
    assert isinstance(quant.product([nn.Linear(128, 32)], chosen), PackedLinear)


def test_nf4_weights_become_int8_once_and_not_at_every_call() -> None:
    layer, x = nf4_layer(torch.randn(96, 64)), inputs(3, 64)
    weight = quant.dense_weight(layer)
    assert weight.shape == (96, 64)
    torch.testing.assert_close(quant.Int8Linear(weight)(x), x @ weight.float().T, rtol=0.1, atol=0.4)
