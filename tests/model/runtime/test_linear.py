"""Products of quantised matrices: exactness, independence of rows, and the choice by machine."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from model.engine.scheduler import Work
from model.runtime import linear
from model.runtime.kv import Batch
from model.runtime.linear import DenseLinear, PackedLinear, Plan, join
from model.runtime.runner import Runner
from model.weights.catalogue import KERNEL_ARCHITECTURES
from model.weights.loader import load_model
from tests.model.preparing import prepare, settings_for
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model

PACKED = Plan("packed", torch.float32, torch.bfloat16, kernels=True)

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


@pytest.mark.parametrize("rows", [96, 20])  # the kernel computes eight at once: 20 is no multiple
def test_a_product_is_close_to_the_exact_one(rows: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(rows, 128), inputs(5)
    y = PackedLinear.dense(weight)(x)
    assert y.shape == (5, rows)
    assert 0 < relative_error(y, x @ weight.T) < 0.03


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_codes_are_multiplied_as_they_are(nested: bool) -> None:
    """Against bitsandbytes' own dequantisation: what is left is the rounding of activations and of the codebook."""
    layers, x = [nf4_layer(torch.randn(96, 128), nested), nf4_layer(torch.randn(32, 128), nested)], inputs(7)
    exact = x @ torch.cat([linear.dense_weight(layer) for layer in layers]).T
    assert relative_error(PackedLinear.nf4(layers)(x), exact) < 0.02


def test_each_of_the_sixteen_values_is_the_libraries_own() -> None:
    layer = nf4_layer(torch.linspace(-1, 1, 64).expand(8, 64).contiguous(), nested=False)
    assert len(linear.dense_weight(layer).unique()) == 16
    step = 1 / 63
    error = PackedLinear.nf4([layer])(torch.eye(64)).T - linear.dense_weight(layer)
    assert error.abs().max() < step / 2 + 0.004  # rounded to a step, and the block's scale to bfloat16


def test_four_bits_of_another_kind_are_refused() -> None:
    layer = bnb.nn.Linear4bit(128, 32, bias=False, quant_type="fp4")
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 128), requires_grad=False, quant_type="fp4", blocksize=64)
    with pytest.raises(ValueError, match="fp4"):
        PackedLinear.nf4([layer.to("cpu")])


@pytest.mark.parametrize("product", [PackedLinear.dense, nf4])
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
    layer, x = nf4(torch.randn(512, 128)), inputs(rows)
    alone = layer(x)
    torch.ops.slots.set_threads(3)
    try:
        assert all(torch.equal(layer(x), alone) for _ in range(200))
    finally:
        torch.ops.slots.set_threads(1)


def test_a_bias_is_added() -> None:
    layer, x, bias = PackedLinear.dense(torch.randn(96, 128)), inputs(70), torch.randn(1, 96)
    plain = layer(x)
    layer.bias = bias
    assert torch.equal(layer(x), plain + bias)


def test_what_is_not_finite_stays_so_in_its_row_alone() -> None:
    layer, x = PackedLinear.dense(torch.randn(32, 128)), inputs(3)
    x[1, 70] = torch.nan
    finite = layer(x).isfinite().all(-1).tolist()
    x[1, 70] = torch.inf
    assert finite == layer(x).isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("value", [5.0, -5.0, 1e30, 1e-30])
def test_extreme_activations_do_not_saturate(value: float) -> None:
    """AVX2 adds pairs of 8-bit products in 16 bits: the largest possible pair must fit."""
    for weight in (1.0, -1.0):
        y = PackedLinear.dense(torch.full((32, 64), weight))(torch.full((1, 64), value))
        assert torch.allclose(y, torch.full((1, 32), 64 * weight * value), rtol=5e-3)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(PackedLinear.dense(torch.randn(32, 64))(torch.zeros(2, 64)), torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("device", "quantization", "kernels", "backend", "dtype", "kv"),
    [
        ("cuda", "nf4", False, "bitsandbytes", torch.bfloat16, torch.bfloat16),
        ("cuda", "none", False, "dense", torch.bfloat16, torch.bfloat16),
        ("cpu", "nf4", True, "packed", torch.float32, torch.bfloat16),
        ("cpu", "nf4", False, "dense", torch.float32, torch.float32),
        ("cpu", "int8", True, "packed", torch.float32, torch.bfloat16),
        ("cpu", "int8", False, "dense", torch.float32, torch.float32),
        ("cpu", "none", True, "dense", torch.float32, torch.bfloat16),
    ],
)
def test_the_backend_is_chosen_by_machine(  # type: ignore[no-untyped-def]
    monkeypatch, device, quantization, kernels, backend, dtype, kv
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert linear.plan(device, quantization, kernels) == Plan(backend, dtype, kv, kernels)


def test_a_processor_that_multiplies_bfloat16_computes_in_it_without_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert linear.plan("cpu", "nf4", kernels=False) == Plan("dense", torch.bfloat16, torch.bfloat16)


def test_without_kernels_4_bits_become_floats_once() -> None:
    model = nn.Sequential(nn.Sequential(nf4_layer(torch.randn(32, 64))), nn.Linear(32, 8))
    x = inputs(3, 64)
    want = model[1](x @ linear.dense_weight(model[0][0]).T)
    linear.dequantise(model, torch.float32)
    assert isinstance(model[0][0], DenseLinear) and isinstance(model[1], nn.Linear)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("count", [1, 4, 5, 70])  # 70 are more than are computed together
@pytest.mark.parametrize("architecture", KERNEL_ARCHITECTURES)
def test_a_layer_in_one_call_is_its_steps(architecture: str, count: int) -> None:
    runner = Runner(tiny_model(architecture), PACKED, 1, 1, 256, "cpu", frozenset())
    body, (keys, values) = runner.model.model, runner.kv.tensors
    layer = body.layers[1]
    for weight in (*(norm.weight.data for norm in (*layer.norms, *layer.head_norms)), layer.qkv.bias):
        if weight is not None:
            weight.copy_(torch.rand_like(weight) + 0.5)

    def computed(x: torch.Tensor) -> torch.Tensor:
        batch = Batch.of([Work(0, [0] * len(x), 0, [1])])
        cos, sin = (table[:, 0] for table in body.rotary_emb(x, batch.tokens[1][:, None]))
        result = layer(x, cos, sin, keys[1], values[1], batch.tables, batch.tokens)
        written = (t[1, :, : len(x)].transpose(0, 1).flatten(1).float() for t in (keys[1], values[1]))
        return torch.cat([result, *written], -1)

    with torch.inference_mode():
        x = inputs(count, runner.model.config.hidden_size)
        operands, whole = layer.operands, computed(x)
        assert torch.equal(computed(x[:1]), whole[:1])  # whatever shares the batch
        layer.operands = ()
        torch.testing.assert_close(whole, computed(x), rtol=1e-3, atol=2e-2)
        if count > 3:
            layer.operands, x[3, 7] = operands, torch.nan
            assert computed(x)[:4].isfinite().all(-1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("change", [{}, {"hidden_act": "gelu"}, {"mlp_bias": True}, {"attention_bias": True}])
@pytest.mark.parametrize("architecture", KERNEL_ARCHITECTURES)
def test_packed_layers_answer_like_the_dense_model(architecture: str, change: dict[str, object]) -> None:
    if change and architecture != "LlamaForCausalLM":
        change = {"hidden_act": "gelu"}
    dense, packed = (Runner(tiny_model(architecture, **change), plan, 1, 1, 256, "cpu", frozenset())
                     for plan in (Plan("dense", torch.float32, torch.float32), PACKED))  # fmt: skip
    assert [name for name, layer in packed.model.named_modules() if isinstance(layer, nn.Linear)] == []
    assert bool(packed.model.model.layers[0].operands) == (not change)
    outputs = []
    for each in (dense, packed):
        each.prefill([Work(0, [5, 90, 17], 0, [1])])
        each.step([Work(0, [33], 3, [1])])
        written = [t[1] if each.plan.kernels else t[1].transpose(0, 1) for t in each.kv.values]
        outputs.append(torch.cat([t[:, :4].flatten() for t in written]).float())
    assert nn.functional.cosine_similarity(*outputs, dim=0) > 0.99


def test_a_width_that_the_kernel_cannot_take_stays_floats() -> None:
    assert isinstance(join([nn.Linear(96, 32)], PACKED), DenseLinear)
    assert isinstance(join([nn.Linear(128, 32)], PACKED), PackedLinear)


HALF = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("architecture", "change"),
    [*((name, {}) for name in ARCHITECTURES if name != "Qwen3MoeForCausalLM"),
     ("Phi3ForCausalLM", {"rope_parameters": HALF})],
)  # fmt: skip
def test_matrices_joined_for_cuda_answer_like_those_of_transformers(
    tmp_path: Path, architecture: str, change: dict[str, object]
) -> None:
    """On a CPU, where bitsandbytes computes the same; the scales of what is joined are stored in 8 bits anew."""
    source = tiny_checkpoint(tmp_path / "source", architecture)
    tiny_model(architecture, **change).save_pretrained(source)
    folder, states = prepare(source), []
    for backend in ("dense", "bitsandbytes"):
        model = load_model(folder, settings_for(source), torch.device("cpu"), torch.float32)
        runner = Runner(model, Plan(backend, torch.float32, torch.float32), 1, 1, 256, "cpu", frozenset())
        with torch.inference_mode():
            states.append(runner.hidden_states(Batch.of([Work(0, list(range(40)), 0, [1])])))
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {"JoinedAttention"}
    assert {type(layer.mlp).__name__ for layer in model.model.layers} == {"JoinedMlp"}
    assert nn.functional.cosine_similarity(*states, dim=-1).min() > 0.999
