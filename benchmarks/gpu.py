"""This engine on a CUDA GPU: decode beside the memory's own limit, prefill, starts and memory.

    python -m benchmarks.gpu [--shape NAME] [--rows 1 4 8 16] [--contexts 128 2048 8192] [--prompts 512 2048] [--fresh]

MODEL as the service loads it. With --shape, random NF4 weights in the dimensions of a catalogue model, made on the GPU:
nothing is fetched, and its starts read no weights from disk. The floor of a step is the bytes of weights and KV that it
reads over the bandwidth of a copy in the same run. No peer stands beside it: the llama.cpp and onnxruntime-genai of
engines.py are CPU builds, and vLLM and `transformers serve` offer no bare step. Without a usable GPU it says why.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks import record, table
from benchmarks.engines import OURS
from benchmarks.ours import WARM, Ours, adopt_all
from benchmarks.record import Record
from benchmarks.servers import data_folder
from benchmarks.worker import ROOT, Turn, Worker, WorkerFailed, serve
from model.engine.blocks import BLOCK, blocks_for
from model.runtime import gpu, linear
from model.runtime.build import build, fit, try_out
from model.runtime.compile import compiler_for
from model.runtime.layers import RotaryTable
from model.runtime.linear import Plan
from model.runtime.runner import Runner
from model.weights.catalogue import CATALOGUE, ModelError, ModelSpec, find
from model.weights.loader import prepare
from settings import Settings

_COPIED = 1 << 30  # bytes, far more than a GPU's cache holds (50 MB in an H100, 72 MB in an RTX 4090)

Start = Callable[[argparse.Namespace, Path], AbstractContextManager[Worker]]  # an engine over a folder for DATA_DIR


def config_of(spec: ModelSpec) -> PretrainedConfig:
    """transformers' configuration of a catalogue model."""
    assert spec.shape
    kind = "qwen3" if "qwen3" in spec.name else "qwen2" if "qwen" in spec.name else "llama"
    return AutoConfig.for_model(
        kind, num_hidden_layers=spec.shape.layers, hidden_size=spec.shape.hidden, vocab_size=spec.shape.vocabulary,
        intermediate_size=spec.shape.intermediate, num_attention_heads=spec.shape.heads, head_dim=spec.shape.head_dim,
        num_key_value_heads=spec.shape.kv_heads, max_position_embeddings=spec.context,
        tie_word_embeddings=spec.shape.tied,
    )  # fmt: skip


def random_runner(spec: ModelSpec, settings: Settings, device: str, plan: Plan) -> Runner:
    """As build.build, of random weights; no more than one layer is on the device unquantised."""
    config = config_of(spec)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=plan.dtype)
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    for part in (body.embed_tokens, body.norm, model.lm_head):
        _fill(part, device)
    for layer in body.layers:
        _fill(layer, device)
        for owner in (layer.self_attn, layer.mlp):
            for name, each in list(owner.named_children()):
                if isinstance(each, nn.Linear) and name not in spec.skip_modules:
                    setattr(owner, name, _nf4(each))
    slots, blocks, context = fit(settings, config, plan.kv, device)
    runner = Runner(model.eval().requires_grad_(False), plan, slots, blocks, context, device, frozenset())
    try_out(runner)
    return runner


def _fill(part: nn.Module, device: str) -> None:
    with torch.no_grad():
        for weight in part.to_empty(device=device).parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)


def _nf4(layer: nn.Linear) -> bnb.nn.Linear4bit:
    weight, bias = layer.weight.data, layer.bias
    made = bnb.nn.Linear4bit(*reversed(weight.shape), bias is not None, weight.dtype, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64).to(weight.device)
    made.bias = bias
    return made


def started(make: Callable[[], Runner], settings: Settings, patience: float) -> tuple[Runner, Turn]:
    """A runner with its compiled steps, and the seconds of this process until it was ready, recorded and compiled.

    patience: see ours.adopt_all.
    """
    runner, begin = make(), psutil.Process().create_time()
    times = {"ready": time.time() - begin}
    runner.compiler = compiler_for(runner, settings)
    while runner.load_compiled(idle=False):
        pass
    times["recorded"] = time.time() - begin
    adopt_all(runner, patience)
    times["compiled"] = time.time() - begin
    if runner.compiler:
        runner.compiler.close()
    return runner, times


class OnGpu(Ours):
    """The turns of one runner that was just started."""

    def __init__(self, runner: Runner, times: Turn) -> None:
        super().__init__(runner)
        self._times = times

    def start(self) -> Turn:
        """What `started` measured."""
        return self._times

    def memory(self) -> Turn:
        """bytes: the most that PyTorch has taken of the GPU so far, beside which CUDA itself takes half a GB."""
        on_gpu = self.runner.device == "cuda"
        return {"bytes": torch.cuda.max_memory_reserved() if on_gpu else psutil.Process().memory_info().rss}

    def bandwidth(self) -> Turn:
        """bytes: read and written in a second by a copy, the best of several."""
        return {"bytes": bandwidth(self.runner.device, _COPIED)}

    def _weights(self) -> float:
        return float(weights_read(self.runner.model))


def bandwidth(device: str, size: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that copying `size` bytes reads and writes, the best of 8."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        _wait(device)
        begin = clock()
        target.copy_(source)
        _wait(device)
        best = min(best, clock() - begin)
    return 2 * size / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def weights_read(model: nn.Module) -> int:
    """Bytes of what a step reads whole: all but the embedding and the table of positions, of which it reads rows."""
    whole = [part for part in model.modules() if not isinstance(part, nn.Embedding | RotaryTable)]
    held = {id(each): each for part in whole for each in (*part.parameters(False), *part.buffers(False))}
    return sum(each.nbytes + _scale_bytes(getattr(each, "quant_state", None)) for each in held.values())


def _scale_bytes(state: bnb.functional.QuantState | None) -> int:
    if state is None:
        return 0
    return int(state.absmax.nbytes) + (int(state.state2.absmax.nbytes) if state.nested else 0)


def floor(facts: Mapping[str, Any], bandwidth: float, rows: int, tokens: float) -> float:
    """Seconds that a step takes at least: bytes of weights, and of KV of `rows` times `tokens`, over the bandwidth."""
    return float((facts["weights"] + rows * tokens * facts["kv_bytes_per_token"]) / bandwidth)


def fits(facts: Mapping[str, Any], rows: int, tokens: int) -> bool:
    """Whether so many rows of so many tokens have room in the KV blocks."""
    blocks = facts["kv_bytes"] // (BLOCK * facts["kv_bytes_per_token"])
    return bool(rows <= facts["slots"] and tokens <= facts["context"] and rows * blocks_for(tokens) <= blocks)


def worker(chosen: argparse.Namespace, data: Path) -> Worker:
    """The engine in a process of its own."""
    shape = ["--shape", chosen.shape] if chosen.shape else []
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--patience", str(chosen.patience), *shape]
    environment = {"DEVICE": "cuda", "DATA_DIR": str(data)} | ({"QUANTIZATION": "nf4"} if shape else {})
    return Worker(command, data.parent / "gpu.log", environment)


def measure(kept: Record, settings: Settings, chosen: argparse.Namespace, start: Start = worker) -> None:
    """All turns that are not kept yet. A round begins with a start that finds nothing compiled."""
    if kept.has(["second start"], chosen.rounds):
        return
    if not chosen.shape:  # in a process of its own, which leaves the GPU's memory free
        subprocess.run([sys.executable, "-m", "model"], cwd=ROOT, check=True)
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            data = data_folder(settings, Path(folder))
            (data / "compiled").unlink()  # the service's own, which is not empty
            (data / "compiled").mkdir()
            with start(chosen, data) as engine:
                kept.facts[OURS] = engine.ask("facts")
                kept.turn("first start", number, partial(engine.ask, "start"))
                for name, turn in _turns(engine, kept.facts[OURS], chosen):
                    kept.turn(name, number, turn)
            with start(chosen, data) as engine:
                kept.turn("second start", number, partial(engine.ask, "start"))


def _turns(
    engine: Worker, facts: Mapping[str, Any], chosen: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], float]]]:
    yield "bandwidth", lambda: float(engine.ask("bandwidth")["bytes"])
    for rows in chosen.rows:
        for context in chosen.contexts:
            if fits(facts, rows, context + WARM + chosen.steps):
                yield _decode(rows, context), partial(_step, engine, rows, context, chosen.steps)
    for tokens in chosen.prompts:
        if fits(facts, 1, tokens + 1):
            yield _prefill(tokens), partial(_prompt, engine, tokens)
    yield "memory", lambda: float(engine.ask("memory")["bytes"])


def _step(engine: Worker, rows: int, context: int, steps: int) -> float:
    seconds: list[float] = engine.ask("decode", rows=rows, context=context, steps=steps)["seconds"]
    return statistics.median(seconds)


def _prompt(engine: Worker, tokens: int) -> float:
    engine.ask("prefill", tokens=tokens)  # the first of a length waits for libraries that choose their kernels
    return float(engine.ask("prefill", tokens=tokens)["seconds"])


def _decode(rows: int, context: int) -> str:
    return f"decode, {rows} rows, context {context}"


def _prefill(tokens: int) -> str:
    return f"prefill, {tokens} tokens"


def shown(turns: Mapping[str, Any], facts: Mapping[str, Any], chosen: argparse.Namespace) -> str:
    """The tables of this row; a dash where memory holds no such batch."""
    decode = []
    for rows in chosen.rows:
        for context in chosen.contexts:
            seconds, tokens = turns.get(_decode(rows, context), []), context + WARM + chosen.steps / 2
            floors = [floor(facts, each, rows, tokens) for each in turns.get("bandwidth", [])]
            speeds = table.median([rows / each for each in seconds])
            decode.append([str(rows), str(context), _ms(seconds), speeds, table.ratio(floors, seconds)])
    prefill = [
        [str(tokens), _ms(found), table.median([tokens / each for each in found], ".0f")]
        for tokens in chosen.prompts
        for found in [turns.get(_prefill(tokens), [])]
    ]
    starts = [
        [f"{name}, until {stage}, s", table.median([each[stage] for each in turns.get(name, [])])]
        for name in ("first start", "second start")
        for stage in ("ready", "recorded", "compiled")
    ]
    sizes = {"most memory, GB": turns.get("memory", []), "weights that a step reads, GB": [facts["weights"]],
             "KV, GB": [facts["kv_bytes"]], "bandwidth of a copy, GB/s": turns.get("bandwidth", [])}  # fmt: skip
    starts += [[name, table.median([each / 1e9 for each in found], ".2f")] for name, found in sizes.items()]
    return "\n\n".join([
        table.markdown(["rows", "context", "ms a step", "tokens/s", "of the floor"], decode),
        table.markdown(["prompt, tokens", "ms to the first token", "tokens/s"], prefill),
        table.markdown(["start and memory", ""], starts),
    ])  # fmt: skip


def _ms(seconds: list[float]) -> str:
    return table.median([each * 1000 for each in seconds], ".2f")


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    facts = kept.facts[OURS]
    said = f"{chosen.gpu}; {chosen.model}, {facts['linear_backend']}, PyTorch {facts['version']}"
    return f"{said}, medians of {chosen.rounds} rounds", shown(kept.turns, facts, chosen)


def options() -> argparse.ArgumentParser:
    parser = record.options(__doc__ or "", rounds=1, minutes=60)
    parser.add_argument("--shape", choices=list(CATALOGUE), help="random weights in the dimensions of this model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192], help="tokens that a row holds")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048], help="tokens")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def answer(settings: Settings, chosen: argparse.Namespace) -> None:
    """The child's side: start the engine, then answer turns."""

    def make() -> Runner:
        if chosen.shape:
            return random_runner(CATALOGUE[chosen.shape], settings, "cuda", linear.plan("cuda", "nf4", False))
        return build(prepare(find(settings), settings), settings, lambda stage, percent: None)

    engine = OnGpu(*started(make, settings, chosen.patience))
    serve({name: getattr(engine, name) for name in ("facts", "start", "decode", "prefill", "bandwidth", "memory")})


def main() -> None:
    parser = options()
    chosen, settings = parser.parse_args(), Settings.from_environment()
    try:
        gpu.choose_device("cuda")
    except ModelError as error:
        print(f"Nothing to measure: {str(error).removeprefix('DEVICE=cuda: ').removesuffix(', or set DEVICE=cpu')}")
        return
    if chosen.worker:
        answer(settings, chosen)
        return
    stored = "nf4" if chosen.shape else settings.quantization
    parser.set_defaults(gpu=torch.cuda.get_device_name(), model=chosen.shape or settings.model, quantization=stored)
    try:
        record.run("gpu", parser, measure, _told)
    except WorkerFailed as failed:
        sys.exit(f"The engine failed: {failed}")


if __name__ == "__main__":
    main()
