"""The models there are: names, sources and pinned revisions; README has their licences and sizes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from settings import Settings

DEMO_WHEEL = "demo-wheel"
# What layers.py has its own layers for; the others run as transformers' modules, on a CPU too.
KERNEL_ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
ARCHITECTURES = (*KERNEL_ARCHITECTURES, "Gemma3ForCausalLM", "Qwen3MoeForCausalLM")
DEFAULT_CONTEXT = 8192  # tokens, where neither MAX_CONTEXT nor the model says how many
THINK = ("<think>", "</think>")
# Of a weight: its code, and a share of its block's 8-bit scale and of that one's scale.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")


class ModelError(Exception):
    """The model cannot be served: one line for the operator, who may see paths. Clients get a ServiceError."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions, as its config.json has them. Norms and biases, under 0.1 % of it, are not counted."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # the embedding is the head too
    experts: int = 0  # feed-forward parts of a layer; 0: one, without a router
    kernels: bool = True  # whether this project's CPU kernels take it

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Raises KeyError where `config` does not say, ValueError where it is not understood here."""
        hidden, heads, experts = config["hidden_size"], config["num_attention_heads"], 0
        if has_experts(config):
            if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
                raise ValueError("sizes are not known where some layers have experts and others do not")
            experts = config.get("num_experts") or config["num_local_experts"]
        return cls(
            config["num_hidden_layers"], hidden, config["moe_intermediate_size" if experts else "intermediate_size"],
            heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads,
            config["vocab_size"], config.get("tie_word_embeddings", config["architectures"] == ["Gemma3ForCausalLM"]),
            experts, kernels_take(config),
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        return self._embeddings + self.layers * sum(self._matrices().values())

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def weight_bytes(self, bits: float = NF4_BITS, skip_modules: tuple[str, ...] = (), dense_bits: int = 16) -> int:
        """All weights: `bits` each, but `dense_bits` for embedding, head and skip_modules."""
        quantised = self.layers * sum(size for name, size in self._matrices().items() if name not in skip_modules)
        return int(quantised * bits + (self.parameters - quantised) * dense_bits) // 8

    @property
    def _embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def _matrices(self) -> dict[str, int]:
        """Weights of the matrices of one layer."""
        queries, keys = (self.hidden * heads * self.head_dim for heads in (self.heads, self.kv_heads))
        mlp = self.hidden * self.intermediate * max(1, self.experts)
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries,
                "gate": self.hidden * self.experts, "gate_proj": mlp, "up_proj": mlp, "down_proj": mlp}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. `context` counts tokens (0: not known yet); `shape` is known for models of the catalogue.

    source: a hub id, DEMO_WHEEL, or a local directory. revision: a commit of the hub, None elsewhere.
    skip_modules: linear layers that stay bf16 beside the head: 4 bits would cost more than they save.
    think: the tags around the reasoning; think_open: the template starts the answer inside them.
    """

    name: str
    source: str
    revision: str | None
    context: int = 0
    shape: Shape | None = None
    skip_modules: tuple[str, ...] = ()
    think: tuple[str, str] | None = None
    think_open: bool = False


def _r1(title: str, revision: str, shape: Shape, think_open: bool = True) -> ModelSpec:
    name, source = f"deepseek-r1-{title.lower()}", f"deepseek-ai/DeepSeek-R1-{title}"
    return ModelSpec(name, source, revision, 131_072, shape, think=THINK, think_open=think_open)


_SPECS = (
    ModelSpec(
        "smollm2-135m-instruct", DEMO_WHEEL, None, 8192, Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True),
        # Queries, keys and values are an eighth of its weights, and two fifths of what NF4 costs so small a model.
        skip_modules=("q_proj", "k_proj", "v_proj"),
    ),
    _r1("Distill-Qwen-1.5B", "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562", Shape(28, 1536, 8960, 12, 2, 128, 151_936)),
    _r1("Distill-Qwen-7B", "916b56a44061fd5cd7d6a8fb632557ed4f724f60", Shape(28, 3584, 18_944, 28, 4, 128, 152_064)),
    _r1("Distill-Qwen-14B", "1df8507178afcc1bef68cd8c393f61a886323761", Shape(48, 5120, 13_824, 40, 8, 128, 152_064)),
    _r1("Distill-Qwen-32B", "711ad2ea6aa40cfca18895e8aca02ab92df1a746", Shape(64, 5120, 27_648, 40, 8, 128, 152_064)),
    _r1("Distill-Llama-8B", "6a6f4aa4197940add57724a7707d069478df56b1", Shape(32, 4096, 14_336, 32, 8, 128, 128_256)),
    _r1("Distill-Llama-70B", "b1c0b44b4369b597ad119a196caf79a9c40e141e", Shape(80, 8192, 28_672, 64, 8, 128, 128_256)),
    _r1(
        "0528-Qwen3-8B", "6e8885a6ff5c1dc5201574c8fd700323f23c25fa", Shape(36, 4096, 12_288, 32, 8, 128, 151_936),
        think_open=False,  # the model opens the tag
    ),
)  # fmt: skip
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


def kernels_take(config: dict[str, Any]) -> bool:
    """Whether this project's CPU kernels compute the layers of a config.json."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turned = (config | (config.get("rope_parameters") or {})).get("partial_rotary_factor", 1)
    return config["architectures"][0] in KERNEL_ARCHITECTURES and (width % 16, turned) == (0, 1)


def has_experts(config: dict[str, Any]) -> bool:
    return bool(config["architectures"] == ["Qwen3MoeForCausalLM"])


def require_window(window: int | None, context: int) -> None:
    """Raises ModelError unless a text of `context` tokens fits into a sliding window, which has no effect then."""
    if window is not None and window < context:
        raise ModelError(f"sliding_window={window} is not served: set MAX_CONTEXT={window}, so that it has no effect, "
                         "or name a model without one")  # fmt: skip


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
