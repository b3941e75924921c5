"""Which models there are: names, sources, pinned revisions, licences and shapes.

Fetches and opens no weights: `loader.py` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from settings import Settings

DEMO_WHEEL = "demo-wheel"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DEFAULT_CONTEXT = 8192  # tokens a slot where MAX_CONTEXT is not set and the model could do more
THINK = ("<think>", "</think>")

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
# bitsandbytes: half a byte a weight, one byte of scale per 64, one float32 per 256 of these.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class ModelError(Exception):
    """The model cannot be served: one line for the operator, who may see paths. Clients get a ServiceError."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. `in_bf16` of its `parameters` are not quantised; `context` counts tokens (0: not known yet).

    source: a hub id, DEMO_WHEEL, or a local directory. revision: a commit of the hub, None elsewhere.
    spared: names of linear layers among those, beside embedding and head: 4 bits would cost more than they save.
    think: the tags around the reasoning; think_open: the template starts the answer inside them.
    """

    name: str
    source: str
    revision: str | None
    licence: str
    architecture: str
    context: int
    parameters: int
    in_bf16: int = 0
    spared: tuple[str, ...] = ()
    think: tuple[str, str] | None = None
    think_open: bool = False

    @property
    def memory_bytes(self) -> int:
        """About what the NF4 weights take; KV and activations come on top."""
        return int((self.parameters - self.in_bf16) * _NF4_BYTES) + 2 * self.in_bf16


def _distill(size: str, revision: str, parameters: int, in_bf16: int) -> ModelSpec:
    family = size.split("-")[0]
    licence = {"Qwen": "MIT (base: Apache-2.0)", "Llama": "MIT (base: Llama 3.x Community License)"}[family]
    architecture = {"Qwen": "Qwen2ForCausalLM", "Llama": "LlamaForCausalLM"}[family]
    title = f"DeepSeek-R1-Distill-{size}"
    return ModelSpec(
        title.lower(),
        f"deepseek-ai/{title}",
        revision,
        licence,
        architecture,
        131_072,
        parameters,
        in_bf16,
        think=THINK,
        think_open=True,
    )


_SPECS = (
    # Queries, keys and values are an eighth of its weights, and two fifths of what NF4 costs so small a model.
    ModelSpec(
        "smollm2-135m-instruct",
        DEMO_WHEEL,
        None,
        "Apache-2.0",
        "LlamaForCausalLM",
        8192,
        134_515_008,
        44_900_352,
        spared=("q_proj", "k_proj", "v_proj"),
    ),
    _distill("Qwen-1.5B", "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562", 1_777_088_000, 466_747_392),
    _distill("Qwen-7B", "916b56a44061fd5cd7d6a8fb632557ed4f724f60", 7_615_616_512, 1_089_994_752),
    _distill("Qwen-14B", "1df8507178afcc1bef68cd8c393f61a886323761", 14_770_033_664, 1_557_135_360),
    _distill("Qwen-32B", "711ad2ea6aa40cfca18895e8aca02ab92df1a746", 32_763_876_352, 1_557_135_360),
    _distill("Llama-8B", "6a6f4aa4197940add57724a7707d069478df56b1", 8_030_261_248, 1_050_673_152),
    _distill("Llama-70B", "b1c0b44b4369b597ad119a196caf79a9c40e141e", 70_553_706_496, 2_101_346_304),
    # Its template leaves the opening tag to the model.
    ModelSpec(
        "deepseek-r1-0528-qwen3-8b",
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        "6e8885a6ff5c1dc5201574c8fd700323f23c25fa",
        "MIT (base: Apache-2.0)",
        "Qwen3ForCausalLM",
        131_072,
        8_190_735_360,
        1_244_659_712,
        think=THINK,
    ),
)
CATALOGUE: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def find(settings: Settings) -> ModelSpec:
    """The model that MODEL names. Raises ModelError when it is neither in the catalogue nor in MODELS_ALLOWED."""
    name = settings.model
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name not in settings.models_allowed:
        raise ModelError(f"MODEL={name} is not in the catalogue ({', '.join(CATALOGUE)}) nor in MODELS_ALLOWED")
    if Path(name).is_dir():
        return _unlisted(Path(name).resolve().name, str(Path(name).resolve()), None)
    if not (hub := _HUB_ID.fullmatch(name)):
        raise ModelError(f"MODEL={name} is no directory; a model of the hub is named org/name@<40-digit commit>")
    return _unlisted(hub["id"], hub["id"], hub["revision"])


def completed(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of an unlisted model, with what only its prepared folder tells. Catalogue entries stay as they are."""
    if spec.context:
        return spec
    config = read_json(folder / "config.json")
    (architecture, *_) = _strings(config.get("architectures")) or ("unknown",)
    context = config.get("max_position_embeddings")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return replace(
        spec, architecture=architecture, context=context if isinstance(context, int) else 2048, parameters=size // 2
    )


def read_json(file: Path) -> dict[str, object]:
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


def _unlisted(name: str, source: str, revision: str | None) -> ModelSpec:
    return ModelSpec(name, source, revision, "unknown", "unknown", context=0, parameters=0)


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, Iterable) else ()
