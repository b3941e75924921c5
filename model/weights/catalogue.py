"""The models there are: names, sources and pinned revisions; README has their licences and sizes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from settings import Settings

DEMO_WHEEL = "demo-wheel"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DEFAULT_CONTEXT = 8192  # tokens, where neither MAX_CONTEXT nor the model says how many
THINK = ("<think>", "</think>")

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


class ModelError(Exception):
    """The model cannot be served: one line for the operator, who may see paths. Clients get a ServiceError."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. `context` counts tokens (0: not known yet).

    source: a hub id, DEMO_WHEEL, or a local directory. revision: a commit of the hub, None elsewhere.
    skip_modules: linear layers that stay bf16 beside the head: 4 bits would cost more than they save.
    think: the tags around the reasoning; think_open: the template starts the answer inside them.
    """

    name: str
    source: str
    revision: str | None
    context: int = 0
    skip_modules: tuple[str, ...] = ()
    think: tuple[str, str] | None = None
    think_open: bool = False


def _r1(title: str, revision: str, think_open: bool = True) -> ModelSpec:
    name, source = f"deepseek-r1-{title.lower()}", f"deepseek-ai/DeepSeek-R1-{title}"
    return ModelSpec(name, source, revision, 131_072, think=THINK, think_open=think_open)


_SPECS = (
    # Queries, keys and values are an eighth of its weights, and two fifths of what NF4 costs so small a model.
    ModelSpec("smollm2-135m-instruct", DEMO_WHEEL, None, 8192, skip_modules=("q_proj", "k_proj", "v_proj")),
    _r1("Distill-Qwen-1.5B", "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"),
    _r1("Distill-Qwen-7B", "916b56a44061fd5cd7d6a8fb632557ed4f724f60"),
    _r1("Distill-Qwen-14B", "1df8507178afcc1bef68cd8c393f61a886323761"),
    _r1("Distill-Qwen-32B", "711ad2ea6aa40cfca18895e8aca02ab92df1a746"),
    _r1("Distill-Llama-8B", "6a6f4aa4197940add57724a7707d069478df56b1"),
    _r1("Distill-Llama-70B", "b1c0b44b4369b597ad119a196caf79a9c40e141e"),
    _r1("0528-Qwen3-8B", "6e8885a6ff5c1dc5201574c8fd700323f23c25fa", think_open=False),  # the model opens the tag
)
CATALOGUE: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def find(settings: Settings) -> ModelSpec:
    """The model that MODEL names: of the catalogue, a local folder, or a hub model that MODELS_ALLOWED names.

    Raises ModelError.
    """
    name = settings.model
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name.endswith(".gguf"):
        raise ModelError(f"MODEL={name}: GGUF is not served; name the folder of the original safetensors weights")
    if Path(name).is_dir():
        folder = Path(name).resolve()
        return ModelSpec(folder.name, str(folder), None)
    if not (hub := _HUB_ID.fullmatch(name)):
        raise ModelError(
            f"MODEL={name} is no folder and not in the catalogue ({', '.join(CATALOGUE)}); "
            "a model of the hub is named org/name@<40-digit commit>"
        )
    if name not in settings.models_allowed:
        raise ModelError(f"MODEL={name} is not in the catalogue: allow it with MODELS_ALLOWED={name}")
    return ModelSpec(hub["id"], hub["id"], hub["revision"])


def with_config(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of an unlisted model, with the context that its prepared folder tells. Others stay as they are."""
    if spec.context:
        return spec
    return replace(spec, context=read_json(folder / "config.json").get("max_position_embeddings") or 2048)


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object of a model folder. Raises ModelError when it is missing or anything else."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.name} is missing in {file.parent}") from None
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{file} is not readable JSON") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object")
    return value
