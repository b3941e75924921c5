"""What CUDA runs, proved without a GPU: products, compiled steps, waiting and copying, attention, memory, dispatch."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import config_of
from model.engine.blocks import BLOCK, blocks_for
from model.engine.scheduler import Work
from model.runtime import attention
from model.runtime.build import fit
from model.runtime.compile import compiled
from model.runtime.gpu import for_kv
from model.runtime.kv import Batch, KvShape
from model.runtime.layers import JoinedAttention, JoinedMlp
from model.runtime.linear import FEW, FewRows, Plan, fused_rows
from model.runtime.runner import Bucket, Runner, Step, make_step
from model.types import Sampling
from model.weights.catalogue import CATALOGUE, KERNEL_ARCHITECTURES, ModelError, ModelSpec, Shape
from model.weights.estimate import Estimate, estimate
from settings import Settings
from tests.model.runtime.test_runner import GREEDY, PROMPTS, Text, run, start
from tests.model.tiny import tiny_model

BITSANDBYTES = Plan("bitsandbytes", torch.float32, torch.float32)
NARROW, WIDE = Bucket(8, 1), Bucket(8, 8)
DRAWN = Sampling(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2)

pytestmark = [
    pytest.mark.timeout(400),  # half a minute, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
]


def nf4_model(architecture: str) -> nn.Module:
    """One layer, each of its matrices a Linear4bit with nested scales, as a prepared checkpoint loads."""
    model = tiny_model(architecture, num_hidden_layers=1)
    for owner in list(model.model.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear):
                four = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
                )
                four.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", blocksize=64)
                if layer.bias is not None:
                    layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
                    four.bias = nn.Parameter(layer.bias.data, requires_grad=False)
                setattr(owner, name, four.to("cpu"))
    return model.eval().requires_grad_(False)


def served(architecture: str = "Qwen2ForCausalLM", plan: Plan = BITSANDBYTES) -> Runner:
    """8 slots of 3 blocks: one layer's KV is 25 blocks a side."""
    return Runner(nf4_model(architecture), plan, 8, 24, 768, "cpu", frozenset())


# The very products, eager and compiled.


@pytest.mark.parametrize("architecture", KERNEL_ARCHITECTURES)
def test_joined_4_bit_products_compute_what_the_dequantised_matrices_do(architecture: str) -> None:
    joined, dense = served(architecture), served(architecture, Plan("dense", torch.float32, torch.float32))
    layer = joined.model.model.layers[0]
    assert isinstance(layer.self_attn, JoinedAttention) and isinstance(layer.mlp, JoinedMlp)
    with torch.inference_mode():
        states = [each.hidden_states(Batch.of([Work(0, PROMPTS[3], 0, [2])])) for each in (joined, dense)]
    assert (states[0] - states[1]).norm() / states[1].norm() < 0.01  # scales are stored in 8 bits anew


@dataclass(frozen=True)
class Compiled:
    steps: dict[Bucket, Step]
    code: dict[Bucket, str]  # that inductor has generated


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Each bucket's step, compiled once for all tests here; torch's cache is a folder of this module."""
    from torch._inductor.utils import run_and_get_code  # warns of deprecations of its own

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        engine, steps, code = served(), {}, {}
        for bucket in (NARROW, WIDE):
            steps[bucket], sources = run_and_get_code(compiled, engine, bucket)
            code[bucket] = "\n".join(sources)
        yield Compiled(steps, code)


def only(step: Step, bucket: Bucket) -> Runner:
    """A runner that has this compiled step, and fails without it."""

    def eager(_: object) -> Tensor:
        raise AssertionError("an eager step")

    engine = served()
    engine.compiled[bucket], engine._eager = step, eager
    return engine


def texts(engine: Runner) -> list[Text]:
    rules = (GREEDY, DRAWN, GREEDY, DRAWN)
    return [start(engine, row, prompt, rule) for row, (prompt, rule) in enumerate(zip(PROMPTS, rules, strict=True))]


def test_a_compiled_step_of_one_token_a_row_answers_like_an_eager_one(made: Compiled) -> None:
    engine, eager = only(made.steps[NARROW], NARROW), served()
    ours, theirs = texts(engine), texts(eager)
    for count in (4, 1, 3):
        assert run(engine, ours[:count], 4) == run(eager, theirs[:count], 4)


def test_a_compiled_step_of_several_tokens_a_row_answers_like_an_eager_one(made: Compiled) -> None:
    engine, eager = only(made.steps[WIDE], WIDE), served()
    ours, theirs = texts(engine), texts(eager)
    for guesses in ([(7, 8, 9), (4,), (), ()], [(), (), (), (1, 2, 3, 4)], [(5, 5, 5, 5, 5, 5, 5)]):
        work = [[text.work(*more) for text, more in zip(each, guesses, strict=False)] for each in (ours, theirs)]
        assert engine.step(work[0]) == eager.step(work[1])
    assert run(engine, ours, 2) == run(eager, theirs, 2)


def test_the_compiled_code_calls_the_libraries_own_products(made: Compiled) -> None:
    for code in made.code.values():
        products = [len(re.findall(rf"= torch\.ops\.{name}\.default\(", code)) for name in (
            "bitsandbytes.gemm_4bit", "bitsandbytes.int8_scaled_mm", "blocks.attend")]  # fmt: skip
        assert products == [4, 1, 1]


def test_a_later_start_finds_the_compiled_code_again(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def anew(*_: object, **__: object) -> None:
        raise AssertionError("compiled anew")

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", anew)
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        step = compiled(served(), NARROW)
    found = counters["aot_autograd"]
    assert (found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"]) == (1, 0, 0)
    again, first = only(step, NARROW), only(made.steps[NARROW], NARROW)
    assert run(again, texts(again), 2) == run(first, texts(first), 2)


ALLOCATION = re.compile(r"empty_strided_cpu\(\(([\d, ]*)\)")


def allocated(code: str) -> list[int]:
    """Elements of each buffer that the code makes."""
    return [math.prod(int(size) for size in sizes.split(",") if size.strip()) for sizes in ALLOCATION.findall(code)]


def test_the_compiled_code_makes_no_buffer_as_large_as_a_block(made: Compiled) -> None:
    engine = served()
    block, vocabulary = engine.kv.keys[0][0].numel(), engine.model.config.vocab_size
    for bucket, code in made.code.items():
        sizes = allocated(code)
        assert bucket.tokens * vocabulary in sizes  # so that such a buffer would be seen
        assert max(sizes) < block


def as_recorded(engine: Runner, bucket: Bucket, step: Step) -> Step:
    """As a CUDA graph replays: over the tensors of the recording, whatever it is called with."""
    arguments = engine.arguments(engine.fill(bucket))
    return lambda *_: step(*arguments)


@pytest.mark.parametrize(("bucket", "counts"), [(NARROW, (1, 1, 1)), (WIDE, (3,)), (WIDE, (1, 2))])
def test_what_fills_a_bucket_up_touches_only_the_block_of_nobody(
    made: Compiled, bucket: Bucket, counts: tuple[int, ...]
) -> None:
    step, eager = made.steps[bucket], served()
    engine = only(step, bucket)
    engine.compiled[bucket] = as_recorded(engine, bucket, step)
    engine.step([Work(row, [9], 700, [22, 23, 24]) for row in range(7)])  # what the recording's tensors held before
    for tensor in (*engine.kv.keys, *engine.kv.values):
        tensor.normal_(generator=torch.Generator().manual_seed(4))
    for mine, other in zip(engine.kv.tensors, eager.kv.tensors, strict=True):
        other[0].copy_(mine[0])
    for each in (engine, eager):
        for row in range(8):
            each.begin(row, DRAWN if row % 2 else GREEDY, row, [row])
    work = [Work(row, [40 + row] * count, 254 + row, [5 + 3 * row, 1 + row]) for row, count in enumerate(counts)]
    before, seen = [tensor.clone() for side in engine.kv.tensors for tensor in side], engine.rules.seen.clone()
    assert engine.step(work) == eager.step(work)
    places = [one.blocks[at // BLOCK] * BLOCK + at % BLOCK for one in work for at in
              range(one.position, one.position + len(one.tokens))]  # fmt: skip
    for old, new in zip(before, (tensor for side in engine.kv.tensors for tensor in side), strict=True):
        changed = (old != new).flatten(0, 1).flatten(1).any(-1).nonzero()[:, 0].tolist()
        assert {at for at in changed if at >= BLOCK} == set(places)
    rows = [one.row for one in work]
    others = [row for row in range(8) if row not in rows]
    assert torch.equal(engine.rules.seen[others], seen[others])
    assert torch.equal(engine.rules.seen[rows], eager.rules.seen[rows])


# No waiting for the GPU, and no copy of KV, in the step that CUDA records.


class Watch(TorchDispatchMode):
    """Notes operators that a CUDA graph cannot hold, and results as large as a block of KV."""

    WAITING = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "equal",
        "masked_select",
        "_unique2",
        "lift_fresh",
    )

    def __init__(self, block: int) -> None:
        super().__init__()
        self._block, self.operators, self.waits, self.copies = block, set[str](), set[str](), set[str]()

    def __torch_dispatch__(
        self, operator: Any, types: object, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        self.operators.add(name)
        mask = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(arguments[1])
        )
        if name in self.WAITING or mask:
            self.waits.add(name)
        if operator is torch.ops.torch_attn._varlen_attn.default:
            return torch.zeros_like(arguments[0]), arguments[0], arguments[0]
        if name in ("copy_", "fill_", "zero_") and given[0].numel() >= self._block:
            self.copies.add(name)
        result, held = operator(*arguments, **(options or {})), {each.untyped_storage().data_ptr() for each in given}
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(each.numel() >= self._block and each.untyped_storage().data_ptr() not in held for each in new):
            self.copies.add(name)
        return result


def watched(architecture: str, bucket: Bucket, step: Step | None = None) -> Watch:
    engine = served(architecture)
    watch = Watch(engine.kv.keys[0][0].numel())
    arguments = engine.arguments(engine.fill(bucket))
    with torch.inference_mode(), watch:
        (step or make_step(bucket.longest))(*arguments)
    return watch


@pytest.mark.parametrize("bucket", [NARROW, WIDE])
@pytest.mark.parametrize("architecture", KERNEL_ARCHITECTURES)
def test_a_step_never_waits_for_the_gpu_nor_copies_kv(
    monkeypatch: pytest.MonkeyPatch, architecture: str, bucket: Bucket
) -> None:
    monkeypatch.setattr(attention, "attend_by_definition", varlen_attn)  # which only notes: no FlashAttention here
    watch = watched(architecture, bucket)
    assert {"_varlen_attn", "gemm_4bit", "int8_scaled_mm", "index_put_"} <= watch.operators
    assert (watch.waits, watch.copies) == (set(), set())


@pytest.mark.parametrize(
    ("spoil", "waits", "copies"),
    [
        (lambda keys, tokens: tokens[0, 0].item(), {"item"}, set()),
        (lambda keys, tokens: bool(tokens[0, 0]), {"is_nonzero"}, set()),
        (lambda keys, tokens: tokens.nonzero(), {"nonzero"}, set()),
        (lambda keys, tokens: tokens[tokens > 0], {"index"}, set()),
        (lambda keys, tokens: tokens + torch.tensor([1]), {"lift_fresh"}, set()),
        (lambda keys, tokens: keys[0] * 2, set(), {"mul"}),
        (lambda keys, tokens: keys[0].copy_(keys[0]), set(), {"copy_"}),
        (lambda keys, tokens: keys[0][torch.zeros(1, dtype=torch.int64)], set(), {"index"}),
    ],
)
def test_a_step_that_does_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[list[Tensor], Tensor], object], waits: set[str], copies: set[str]
) -> None:
    monkeypatch.setattr(attention, "attend_by_definition", varlen_attn)

    def step(model: nn.Module, keys: list[Tensor], values: list[Tensor], tokens: Tensor, *rest: Tensor) -> Tensor:
        spoil(keys, tokens)
        return make_step(1)(model, keys, values, tokens, *rest)

    watch = watched("LlamaForCausalLM", NARROW, step)
    assert (watch.waits, watch.copies) == (waits, copies)


# Attention: what varlen_attn is called with, and what it is replaced by here.


def test_varlen_attn_understands_everything_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own signature, and what FlashAttention 2 demands of paged KV."""
    calls: list[inspect.BoundArguments] = []

    def noted(*given: Any, **options: Any) -> Tensor:
        calls.append(inspect.signature(varlen_attn).bind(*given, **options))
        return given[0]

    here, theirs = (inspect.signature(each).parameters for each in (attention.attend_by_definition, varlen_attn))
    assert [(name, here[name].kind) for name in here] == [(name, theirs[name].kind) for name in theirs if name in here]
    monkeypatch.setattr(attention, "attend_by_definition", noted)
    engine = served()
    works = [[Work(0, [5], 300, [4, 2])], [Work(0, [5, 6, 7], 0, [1]), Work(1, [8], 600, [3, 9, 7])]]
    for work in works:
        engine._eager(work)
    engine.prefill(works[1])
    for call, sequences in zip(calls, (1, 2, 2), strict=True):
        given = call.arguments
        q, k, table = given["query"], given["key"], given["block_table"]
        assert q.is_contiguous() and q.shape[1:] == (4, 16) and k.shape == given["value"].shape == (25, BLOCK, 2, 16)
        assert BLOCK % 256 == 0 and k.stride(-1) == table.stride(-1) == 1
        assert all(given[name].dtype == torch.int32 for name in ("cu_seq_q", "seqused_k", "block_table"))
        assert given["seqused_k"].is_contiguous() and given["cu_seq_q"].is_contiguous() and given["cu_seq_k"] is None
        assert (len(given["cu_seq_q"]) - 1, len(given["seqused_k"]), len(table)) == (sequences,) * 3
        assert given["max_q"] == given["cu_seq_q"].diff().max() and given["max_k"] >= given["seqused_k"].max()
        assert given["window_size"] == (-1, 0) and given["enable_gqa"] and given["scale"] == 16**-0.5
        assert sequences == 1 or given["num_splits"] == 1  # several with splits leave rows unwritten


def by_softmax(q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float) -> Tensor:
    """Causal attention of the last len(q) tokens in float64; keys, values [tokens, kv_heads, d], grouped heads."""
    out, group = torch.zeros_like(q, dtype=torch.float64), q.shape[1] // keys.shape[1]
    for index, head in ((i, h) for i in range(len(q)) for h in range(q.shape[1])):
        visible = length - len(q) + index + 1
        scores = keys[:visible, head // group].double() @ q[index, head].double() * scale
        out[index, head] = torch.softmax(scores, 0) @ values[:visible, head // group].double()
    return out


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    ("queries", "lengths"),
    [((1,), (1,)), ((1, 1, 1), (300, 1, 768)), ((7, 1, 300, 2), (7, 256, 300, 600)), ((1, 0, 4, 0), (257, 0, 512, 0))],
)
def test_attention_by_definition_is_a_softmax_over_each_sequences_blocks(
    heads: tuple[int, int], queries: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    torch.manual_seed(len(queries))
    keys, values = (torch.randn(14, BLOCK, heads[1], 16) for _ in range(2))
    blocks = iter((torch.randperm(13) + 1).tolist())
    tables = [[next(blocks) for _ in range(blocks_for(length))] for length in lengths]
    width, q = max(map(len, tables)), torch.randn(sum(queries), heads[0], 16)
    ends = torch.tensor([0, *queries]).cumsum(0)
    got = attention.attend_by_definition(
        q, keys, values, ends.int(), None, max(queries), width * BLOCK, scale=0.3, window_size=(-1, 0), enable_gqa=True,
        seqused_k=torch.tensor(lengths, dtype=torch.int32), num_splits=1,
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
    )  # fmt: skip
    for (begin, end), length, table in zip(pairwise(ends.tolist()), lengths, tables, strict=True):
        own = (side[table].flatten(0, 1)[:length] for side in (keys, values))
        torch.testing.assert_close(
            got[begin:end].double(), by_softmax(q[begin:end], *own, length, 0.3), rtol=1e-4, atol=1e-5
        )


# Memory: every model of the catalogue on GPUs of five sizes.


def fitted(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, size: int) -> tuple[Estimate, int, tuple[int, int, int]]:
    """What was estimated for a GPU of `size` GB; what is free once the weights are there; slots, blocks, context."""
    sizes = estimate(spec, spec.shape, "nf4", size * 10**9, "cuda")
    free = size * 10**9 - sizes.weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, size * 10**9))
    return sizes, free, fit(Settings(), config_of(spec), torch.bfloat16, "cuda")


@pytest.mark.parametrize("size", [12, 16, 24, 48, 80])
@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=list(CATALOGUE))
def test_slots_and_blocks_fit_the_gpu_as_was_estimated(
    monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, size: int
) -> None:
    if estimate(spec, spec.shape, "nf4", size * 10**9, "cuda").missing:
        with pytest.raises(ModelError, match="no memory is left for KV"):
            fitted(monkeypatch, spec, size)
        return
    sizes, free, (slots, blocks, context) = fitted(monkeypatch, spec, size)
    block, wanted = BLOCK * spec.shape.kv_bytes, 16 * blocks_for(spec.context)
    assert KvShape.of(config_of(spec), torch.bfloat16).bytes_per_token == spec.shape.kv_bytes
    assert slots == min(16, blocks) and 1 <= blocks <= wanted
    assert (blocks + 1) * block <= for_kv(free, "cuda") < free
    assert blocks == wanted or (blocks + 2) * block > for_kv(free, "cuda")  # no block was left out
    assert context == min(spec.context, blocks * BLOCK)
    assert blocks * BLOCK == min(sizes.tokens, wanted * BLOCK)


def test_the_14b_holds_64_000_tokens_on_an_rtx_4090(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, (slots, blocks, context) = fitted(monkeypatch, CATALOGUE["deepseek-r1-distill-qwen-14b"], 24)
    assert slots == 16 and context == blocks * BLOCK and 64_000 <= context < 65_000


# bitsandbytes' own choice of kernels.

GPUS = {  # multiprocessors and compute capability
    "RTX 4090": (128, 8, 9),
    "A100": (108, 8, 0),
    "L40S": (142, 8, 9),
    "H100": (132, 9, 0),
}


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether bitsandbytes multiplies with the codes as they are: (index in GPUS, dtype, rows, n, k)."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    from bitsandbytes.backends.cuda import ops

    monkeypatch.setattr(ops, "_gpu_dispatch_props", lambda index: list(GPUS.values())[index])
    ops._gemm_4bit_use_custom_cuda.cache_clear()
    return ops._gemm_4bit_use_custom_cuda


def products(spec: ModelSpec) -> Iterator[tuple[int, int, bool]]:
    """Rows and columns of the 4-bit matrices of one layer as they are multiplied, and whether FewRows does it."""
    shape: Shape = spec.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if not spec.skip_modules:
        yield queries + 2 * keys, shape.hidden, True
    yield shape.hidden, queries, not spec.skip_modules  # where q, k and v stay bf16, o stays what transformers made
    yield 2 * shape.intermediate, shape.hidden, True
    yield shape.hidden, shape.intermediate, True


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=list(CATALOGUE))
def test_no_step_makes_floats_of_a_4_bit_matrix(takes: Callable[..., bool], spec: ModelSpec, gpu: str) -> None:
    index = list(GPUS).index(gpu)
    for n, k, split in products(spec):
        assert k % 64 == 0  # else bitsandbytes dequantises whatever the rows
        parts: list[int] = []

        def layer(x: Tensor, parts: list[int] = parts) -> Tensor:
            parts.append(x.shape[-2])
            return x

        most = fused_rows(n, k, SimpleNamespace(type="cuda", index=index))
        few = FewRows(layer, most) if split else layer
        for rows in range(1, FEW + 1):
            parts.clear()
            x = torch.arange(rows)[None, :, None]
            assert torch.equal(few(x), x) and sum(parts) == rows
            assert all(takes(index, torch.bfloat16, part, n, k) for part in parts), (n, k, rows, parts)


def test_without_splitting_floats_would_be_made(takes: Callable[..., bool]) -> None:
    """The shapes at stake: what an RTX 4090 and an H100 refuse of the 14B at 16 rows."""
    shapes = [(n, k) for n, k, _ in products(CATALOGUE["deepseek-r1-distill-qwen-14b"])]
    refused = [[shape for shape in shapes if not takes(gpu, torch.bfloat16, 16, *shape)] for gpu in (0, 3)]
    assert refused == [[(5120, 5120)], [(5120, 5120), (5120, 13_824)]]
