"""Model folders on disk: which are safe to open, and how one becomes ready in a single step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm  # type: ignore[import-untyped]

from model.weights.catalogue import ARCHITECTURES, ModelError, has_experts, read_json, require_window

Percent = Callable[[int], None]  # takes how many percent are done

MANIFEST = "manifest.json"
CONFIGS = ("config.json", "generation_config.json")
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
# What prompts, limits and stop tokens need.
TEXT_FILES = (*CONFIGS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# What config.json may hold beside numbers, switches and nulls, which can ask for no code.
_WORDS = {
    "architectures", "model_type", "hidden_act", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "_model_name_or_path", "rope_scaling", "rope_parameters", "layer_types", "quantization_config", "eos_token_id",
    "bos_token_id", "pad_token_id", "id2label", "label2id", "pruned_heads", "unsloth_version", "model_name",
    "transformers.js_config", "hidden_activation", "mlp_only_layers", "cache_implementation",
}  # fmt: skip
_CODE = {"auto_map", "custom_pipelines", "custom_generate", "attn_implementation", "_attn_implementation", "gguf_file"}
# What attention or head would have to compute, and transformers passes on by no argument.
_UNSERVED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
# Four times the largest model of these families; transformers allocates for whatever config.json says.
_BOUNDS = {
    "num_hidden_layers": 512, "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 1024,
    "hidden_size": 65_536, "intermediate_size": 262_144, "vocab_size": 2_000_000, "max_position_embeddings": 1 << 24,
    "num_experts": 512, "num_local_experts": 512, "num_experts_per_tok": 512, "moe_intermediate_size": 262_144,
    "decoder_sparse_step": 512, "sliding_window": 1 << 24, "query_pre_attn_scalar": 65_536,
}  # fmt: skip


def check_config(folder: Path) -> None:
    """Raises ModelError unless the folder is of a known kind and size, asks for no code and for no file elsewhere."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is a LoRA adapter: merge it into its base model and name the merged folder (peft: "
                         "merge_and_unload, then save_pretrained)")  # fmt: skip
    if any(folder.glob("*.gguf")) and not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        raise ModelError(f"{folder} holds GGUF, which is not served; name the folder of the original safetensors")
    _check_links(folder)
    config = read_json(folder / "config.json")
    for file in (folder / name for name in (*CONFIGS, "tokenizer_config.json")):
        if file.is_file() and (asked := _CODE & read_json(file).keys()):
            keys = ", ".join(sorted(asked))
            raise ModelError(f"{file} asks for code of its own, which is never run: remove {keys} if the model works "
                             "without it")  # fmt: skip
    named = config.get("architectures")
    if named not in [[name] for name in ARCHITECTURES]:
        raise ModelError(f"{folder}: architecture {named} is not one of {', '.join(ARCHITECTURES)}")
    for name, value in config.items():
        if isinstance(value, (str, list, dict)) and name not in _WORDS:
            raise ModelError(f"{folder}/config.json: {name} is not known here; remove it if the model works without it")
    for name in _UNSERVED:
        if config.get(name):
            raise ModelError(f"{folder}: {name} is not served; name a model without it")
    if other := set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"{folder}: layers of {', '.join(map(str, other))} are not served; name a model without them")
    for name, limit in _BOUNDS.items():
        if (value := config.get(name)) is not None and not (type(value) is int and 1 <= value <= limit):
            raise ModelError(f"{folder}/config.json: {name} must be a whole number from 1 to {limit}")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: tokenizer.json is missing")


def check_served(folder: Path, quantization: str, max_context: int) -> None:
    """Raises ModelError where a folder of a known kind is not served with QUANTIZATION and MAX_CONTEXT (0: unset)."""
    config = read_json(folder / "config.json")
    stored = config.get("quantization_config")
    if has_experts(config) and (quantization != "none" or stored is not None):
        # It sees nn.Linear alone (bitsandbytes issue 1849): experts, most of the weights, would stay as they are.
        raise ModelError(f"{folder}: bitsandbytes quantises no experts: name the original weights, and set "
                         "QUANTIZATION=none")  # fmt: skip
    nf4 = isinstance(stored, dict) and stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
    if stored is not None and not nf4:
        raise ModelError(f"{folder} is quantised in a way that is not served: name the original weights, or NF4 of "
                         "bitsandbytes")  # fmt: skip
    if nf4 and quantization != "nf4":
        raise ModelError(f"{folder} is stored in 4 bits: set QUANTIZATION=nf4, or name the original weights")
    # Llama has no window, and which layers of a Qwen have one, the loaded layers say (layers.use_whole_context).
    if config["architectures"] != ["LlamaForCausalLM"] and "use_sliding_window" not in config:
        known = config.get("max_position_embeddings") or max_context
        require_window(config.get("sliding_window"), min(max_context or known, known))


def _check_links(folder: Path) -> None:
    """A file is one of this folder; in the hub's own layout it is a link into the `blobs` beside `snapshots`."""
    blobs = folder.resolve().parent.parent / "blobs"
    for path in folder.iterdir():
        target = path.resolve()
        if path.is_symlink() and (folder.parent.name != "snapshots" or target.parent != blobs):
            raise ModelError(f"{path} is a link, which could lead to any file: put the file itself there")
        if not target.is_file() and not target.is_dir():
            raise ModelError(f"{path} is no file")


def check_weights(folder: Path) -> None:
    """Raises ModelError unless all weights are there as whole safetensors files."""
    shards = {shard.name for shard in folder.glob("*.safetensors")}
    if not shards:
        raise ModelError(f"{folder}: no safetensors file (pickled .bin weights are never opened)")
    index = folder / "model.safetensors.index.json"
    listed = read_json(index).get("weight_map") if index.is_file() else {}
    missing = set(listed.values()) - shards if isinstance(listed, dict) else {index.name}
    if missing:
        raise ModelError(f"{folder}: shards are missing: {', '.join(sorted(map(str, missing)))}")
    for name in sorted(shards):
        try:
            safe_open(folder / name, "np")  # reads the header, which must agree with the file's length
        except SafetensorError as error:
            raise ModelError(f"{folder / name}: {error}: fetch it again") from None


def is_ready(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def verify(folder: Path, progress: Percent = lambda percent: None, full: bool = False) -> None:
    """Raises ModelError unless every file is as it was written.

    A file of the size and time in the manifest counts as unchanged; any other one is hashed. full: all are hashed.
    """
    manifest = {
        name: entry if isinstance(entry, dict) else {"sha256": entry}  # earlier versions kept the hashes alone
        for name, entry in read_json(folder / MANIFEST).items()
    }
    present = [name for name in manifest if (folder / name).is_file()]
    found = _manifest(folder, present, {} if full else manifest, progress)
    for name, entry in manifest.items():
        if name not in found or found[name]["sha256"] != entry["sha256"]:
            raise ModelError(f"{folder / name} does not match its checksum: delete {folder} and start again")
    if found != manifest:
        with suppress(OSError):  # a read-only folder is hashed at every start
            _write_manifest(folder, found)


def sha256(file: Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """The file's hash in hex. `advance` takes the bytes of each piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(8 << 20):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _manifest(folder: Path, names: Iterable[str], known: dict[str, Any], progress: Percent) -> dict[str, Any]:
    """Hash, size and time of each file; one of the size and time that `known` has is not hashed again."""
    states = {name: (folder / name).stat() for name in names}
    found = {name: {"size": state.st_size, "mtime_ns": state.st_mtime_ns} for name, state in states.items()}
    changed = {name for name, entry in found.items() if not entry.items() <= known.get(name, {}).items()}
    with percent_bar(progress)(total=sum(states[name].st_size for name in changed)) as bar:
        return {
            name: entry | {"sha256": sha256(folder / name, bar.update)} if name in changed else known[name]
            for name, entry in found.items()
        }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    draft = folder / f".{MANIFEST}"
    draft.write_text(json.dumps(manifest, indent=1), "utf-8")
    _sync(draft)
    os.replace(draft, folder / MANIFEST)


@contextmanager
def building(final: Path, progress: Percent = lambda percent: None) -> Iterator[Path]:
    """An empty folder that becomes `final` when the block ends well, and vanishes when it does not.

    Only a folder with a manifest counts as ready, and it gets its name last: whenever the power goes, there is a whole
    checkpoint or none. Call it, and `is_ready` before it, inside `exclusive`. `progress` tells of the hashing.
    """
    work = final.with_name(f".{final.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # left behind by a kill -9
    work.mkdir(parents=True)
    try:
        yield work
        files = sorted(work.iterdir())
        _write_manifest(work, _manifest(work, [file.name for file in files], {}, progress))
        for path in [*files, work]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)  # it has no manifest
        os.replace(work, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def exclusive(folder: Path) -> FileLock:
    """One process (and thread) at a time makes `folder`, inside; the others wait here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def adopt(source: Path, target: Path, *patterns: str) -> None:
    """Bring files that `target` lacks into it as they are: linked where the file system can, else copied."""
    for file in sorted(match for pattern in patterns for match in source.glob(pattern)):
        if (target / file.name).exists():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Turn what a library says about a bad disk or a bad file into a ModelError of one line that names `what`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError, StrictDataclassError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ModelError(f"{what}: no space left on the disk of DATA_DIR") from error
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {first[:300]}") from error


def percent_bar(progress: Percent, unit: str = "it") -> type[tqdm]:
    """A library's progress bar that calls `progress` with percent instead of drawing; it counts in `unit`."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"file": StringIO()})  # closing it writes a line end

        def display(self, *_: object, **__: object) -> None:
            if self.unit == unit and self.total:
                progress(min(100, int(100 * self.n / self.total)))

    return Bar


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
