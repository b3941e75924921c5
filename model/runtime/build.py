"""Checkpoint -> a Runner that fits this machine: device, linear backend, slots and context are chosen here, once."""

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from model.kernels import native
from model.runtime import linear
from model.runtime.gpu import choose_device
from model.runtime.kv import KvShape
from model.runtime.runner import Runner
from model.types import Sampling
from model.weights.catalogue import DEFAULT_CONTEXT, ModelError
from model.weights.loader import load_model, load_tokenizer, stop_ids
from settings import Settings

_log = logging.getLogger(__name__)

_CUDA_RESERVE = 2 << 30  # bytes left for activations, CUDA graphs and fragmentation
_CPU_SHARE = 0.5  # of the available memory: the most that all slots, filled to the end, may take


def build(checkpoint: Path, settings: Settings, progress: Callable[[str, int], None]) -> Runner:
    """Load `checkpoint` and try it out. Raises ModelError for a model that cannot be served here."""
    torch.set_num_threads(settings.compute_threads)
    device = choose_device(settings.device)
    plan = linear.plan(device, settings.quantization, device == "cpu" and native.load(settings.data_dir / "compiled"))
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(
        checkpoint, settings, torch.device(device), plan.dtype, lambda stage, part: progress(stage, part * 9 // 10)
    )
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(f"the tokenizer knows {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    if plan.kernels and KvShape.of(model.config, plan.kv).head_dim % 16:
        raise ModelError("heads of this width are not served on a CPU: the kernels take multiples of 16")
    slots, context = fit(settings, model.config, plan.kv, device)
    try:
        runner = Runner(model, plan, slots, context, device, stop_ids(checkpoint, tokenizer))
        if plan.kernels:
            torch.ops.slots.set_threads(settings.compute_threads)
            if plan.linear_backend == "packed":  # no product is left for OpenMP's threads, which spin at barriers
                torch.set_num_threads(1)
        try_out(runner)
    except ValueError as error:
        raise ModelError(f"this model cannot be served: {error}") from error
    _log.info("model loaded: %s", " ".join(f"{name}={value}" for name, value in runner.details().items()))
    return runner


def fit(settings: Settings, config: PretrainedConfig, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Slots, and tokens of context each: what memory holds within SLOTS and MAX_CONTEXT; first slots give way."""
    context = min(settings.max_context or DEFAULT_CONTEXT, getattr(config, "max_position_embeddings", DEFAULT_CONTEXT))
    if device == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for later counts as used
        memory = torch.cuda.mem_get_info()[0] - _CUDA_RESERVE
    else:
        memory = int(psutil.virtual_memory().available * _CPU_SHARE)
    tokens = memory // KvShape.of(config, dtype).bytes_per_token
    if tokens < 256:
        raise ModelError(f"no memory is left for KV ({memory >> 20} MiB): use a smaller model or QUANTIZATION=nf4")
    slots = min(settings.slots, max(1, tokens // context))
    if slots < settings.slots:  # a power of two where memory decides: free memory is never twice the same
        slots = 1 << slots.bit_length() - 1
    fitted, wanted = (slots, min(context, tokens)), (settings.slots, context)
    if fitted != wanted:
        _log.warning("memory holds %d slots of %d tokens, fewer than SLOTS=%d of %d", *fitted, *wanted)
    return fitted


def try_out(runner: Runner) -> None:
    """One eager prefill and step: what fails at all fails here, not in front of a user.

    Raises ValueError for attention that is not understood, ModelError where numbers are not finite.
    """
    runner.init_row(0, Sampling(temperature=0), 0, [0, 0])
    runner.prefill([(0, [0], 0)])
    runner.activate(0, 0, 1)
    finite = runner.step([0])[0] is not None
    runner.deactivate(0, 0)
    if not finite:
        raise ModelError("the model's numbers are not finite: its weights are damaged or its dtype overflows")
