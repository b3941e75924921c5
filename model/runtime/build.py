"""Checkpoint -> a Runner that fits this machine: device, linear backend, slots and context are chosen here, once."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from model.engine.blocks import BLOCK, blocks_for
from model.engine.scheduler import Work
from model.kernels import native
from model.runtime import gpu, linear
from model.runtime.attention import verify
from model.runtime.kv import KvShape
from model.runtime.layers import shrink_head
from model.runtime.runner import Runner
from model.types import Sampling
from model.weights.catalogue import DEFAULT_CONTEXT, ModelError, kernels_take, read_json
from model.weights.checkpoint import as_model_error
from model.weights.loader import load_model, load_tokenizer, stop_ids
from settings import Settings

_log = logging.getLogger(__name__)


def build(checkpoint: Path, settings: Settings, progress: Callable[[str, int], None]) -> Runner:
    """Load `checkpoint` and try it out. Raises ModelError for a model that cannot be served here."""
    torch.set_num_threads(settings.compute_threads)
    device = gpu.choose_device(settings.device)
    with as_model_error(f"config.json of {checkpoint.name}"):
        kernels = device == "cpu" and kernels_take(read_json(checkpoint / "config.json"))
    plan = linear.plan(device, settings.quantization, kernels and native.load(settings.data_dir / "compiled"))
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(
        checkpoint, settings, torch.device(device), plan.dtype, lambda stage, part: progress(stage, part * 9 // 10)
    )
    require_embeddings(tokenizer, model.config.vocab_size)
    try:
        shrink_head(model, plan)
        slots, blocks, context = fit(settings, model.config, plan.kv, device)
        guesses = {} if settings.speculate else {"guesses": 0}
        runner = Runner(model, plan, slots, blocks, context, device, stop_ids(checkpoint, tokenizer), **guesses)
        if plan.kernels:
            torch.ops.slots.set_threads(settings.compute_threads)
            if plan.linear_backend == "packed":  # no product is left for OpenMP's threads, which spin at barriers
                torch.set_num_threads(1)
        try_out(runner)
    except (ValueError, RuntimeError) as error:  # CUDA's errors are of the second kind, out of memory among them
        raise ModelError(f"this model cannot be served: {str(error).splitlines()[0]}") from error
    _log.info("model loaded: %s", " ".join(f"{name}={value}" for name, value in runner.details().items()))
    return runner


def require_embeddings(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Raises ModelError where a prompt may hold a token that has none of the model's `count` embeddings.

    Gemma 3 1B has a token for images like that: typed text never becomes an added token, and its template writes none.
    """
    written = f"{tokenizer.chat_template}{tokenizer.bos_token}{tokenizer.eos_token}"
    harmless = {token for token in tokenizer.get_added_vocab() if token not in written}
    lacking = [token for token, id in tokenizer.get_vocab().items() if id >= count and token not in harmless]
    if lacking:
        raise ModelError(f"the model has {count} embeddings, and none for {len(lacking)} tokens of its tokenizer")


def fit(settings: Settings, config: PretrainedConfig, dtype: torch.dtype, device: str) -> tuple[int, int, int]:
    """Slots, KV blocks for all of them, and the tokens that one request may have: what memory holds within settings.

    A slot needs a block to begin with. A request may take all blocks.
    """
    context = min(settings.max_context or 1 << 20, getattr(config, "max_position_embeddings", DEFAULT_CONTEXT))
    memory = gpu.for_kv(gpu.memory(device)[0], device)
    held = memory // (BLOCK * KvShape.of(config, dtype).bytes_per_token) - 1  # block 0 is nobody's
    if held < 1:
        raise ModelError(f"no memory is left for KV ({memory >> 20} MiB): use a smaller model or QUANTIZATION=nf4")
    wanted = settings.slots * blocks_for(context)
    blocks = min(held, wanted)
    if held < wanted:
        _log.info("memory holds %d tokens of KV, for all requests together", blocks * BLOCK)
    return min(settings.slots, blocks), blocks, min(context, blocks * BLOCK)


def try_out(runner: Runner) -> None:
    """One eager prefill and step: what fails at all fails here, not in front of a user.

    Raises ValueError for attention that is not understood or goes wrong, ModelError where numbers are not finite.
    """
    if runner.device == "cuda":
        verify(runner.model.config.num_attention_heads, runner.kv.keys[0])
    runner.begin(0, Sampling(temperature=0), 0, [0, 0])
    finite = runner.prefill([Work(0, [0], 0, [0])]) == [True]
    if not finite or runner.step([Work(0, [0], 1, [0])]) == [[None]]:
        raise ModelError("the model's numbers are not finite: its weights are damaged or its dtype overflows")
