"""The GPU's row as far as it runs without one: its loop on the CPU, the floor's arithmetic, the line without a GPU."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from benchmarks import gpu
from benchmarks.record import Record
from model.runtime.compile import ThreadCompiler
from model.runtime.linear import Plan
from model.runtime.runner import Bucket, Runner, Step, make_step
from model.weights.catalogue import CATALOGUE, ModelSpec, Shape
from settings import Settings

SHAPE = Shape(2, 64, 128, 4, 2, 16, 1024)
TINY = [ModelSpec(f"tiny-{kind}", "", None, 1024, SHAPE) for kind in ("llama", "qwen", "qwen3")]
BITSANDBYTES = Plan("bitsandbytes", torch.float32, torch.float32)


def chosen(**changed: object) -> argparse.Namespace:
    small = {"shape": TINY[0].name, "rows": [1, 2, 20], "contexts": [16, 300], "prompts": [24, 2048], "steps": 2}
    return argparse.Namespace(**vars(gpu.options().parse_args([])) | small | changed)


def runner(spec: ModelSpec = TINY[0]) -> Runner:
    return gpu.random_runner(spec, Settings(slots=4), "cpu", BITSANDBYTES)


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--shape", "deepseek-r1-distill-qwen-14b"])
    gpu.main()
    said = capsys.readouterr().out
    assert said.startswith("Nothing to measure: no NVIDIA GPU is seen") and said.count("\n") == 1
    assert "DEVICE" not in said


def test_the_floor_is_what_a_step_reads_over_the_bandwidth() -> None:
    facts = {"weights": 8e9, "kv_bytes_per_token": 200_000}
    assert gpu.floor(facts, 1e12, 1, 0) == 0.008
    assert gpu.floor(facts, 1e12, 10, 1000) == 0.008 + 0.002


def test_a_copy_reads_and_writes_each_byte() -> None:
    ticks = itertools.accumulate(itertools.cycle([0.5, 1.0, 0.25, 1.0]))  # 1.0 s and 1.0 s pass in between
    assert gpu.bandwidth("cpu", 1000, lambda: next(ticks)) == 2000 / 1.0
    ticks = itertools.accumulate(itertools.cycle([9.0, 2.0, 9.0, 0.5]))
    assert gpu.bandwidth("cpu", 1000, lambda: next(ticks)) == 2000 / 0.5  # the best of them


@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.name)
def test_random_weights_are_served_and_counted(spec: ModelSpec) -> None:
    made = runner(spec)
    queries, keys, hidden, mlp = 4 * 16, 2 * 16, 64, 128
    matrices = 2 * (hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * mlp)
    parts = 2 * [hidden * (queries + 2 * keys), queries * hidden, 2 * hidden * mlp, hidden * mlp]
    nested = sum(-(-part // 64 // 256) * 4 for part in parts)
    floats = (2 * 2 + 1) * hidden + {"tiny-llama": 0, "tiny-qwen": 2 * (queries + 2 * keys), "tiny-qwen3": 2 * 2 * 16}[
        spec.name
    ]
    assert gpu.weights_read(made.model) == matrices // 2 + matrices // 64 + nested + floats * 4 + 1024 * (64 + 4)
    assert made.details()["linear_backend"] == "bitsandbytes" and made.context == 1024


@pytest.mark.parametrize("spec", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_model_of_the_catalogue_can_be_made(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = gpu.AutoModelForCausalLM.from_config(gpu.config_of(spec))
    matrices = {id(each): each.numel() for each in model.parameters() if each.dim() == 2}
    assert spec.shape and sum(matrices.values()) == spec.shape.parameters


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> gpu.Start:
    """An engine in this process, whose steps are taken over as those of CUDA are, without being compiled."""

    def compiled(_: Runner, bucket: Bucket) -> Step:
        return make_step(bucket.longest)

    def recorded(step: Step, arguments: tuple[object, ...]) -> Step:
        return lambda *_: step(*arguments)

    monkeypatch.setattr(gpu, "compiler_for", lambda runner, _: ThreadCompiler(runner, compiled, recorded))
    monkeypatch.setattr(gpu, "_COPIED", 1 << 20)

    @contextmanager
    def start(chosen: argparse.Namespace, data: Path) -> Iterator[SimpleNamespace]:
        assert (data / "models").is_symlink() and not list((data / "compiled").iterdir())
        engine = gpu.OnGpu(*gpu.started(runner, Settings(), 60))
        yield SimpleNamespace(ask=lambda do, **given: getattr(engine, do)(**given))
        assert engine.runner.compile_state() == (len(engine.runner.compiler.wanted), 0)

    return start


def test_the_whole_row_runs(tmp_path: Path, on_the_cpu: gpu.Start, monkeypatch: pytest.MonkeyPatch) -> None:
    options = chosen(gpu="a GPU", model="tiny")
    kept = Record.open("gpu", options, tmp_path)
    gpu.measure(kept, Settings(data_dir=tmp_path / "data"), options, on_the_cpu)
    decodes = [f"decode, {rows} rows, context {context}" for rows in (1, 2) for context in (16, 300)]
    assert set(kept.turns) == {"first start", "bandwidth", *decodes, "prefill, 24 tokens", "memory", "second start"}
    for start in (kept.turns["first start"][0], kept.turns["second start"][0]):
        assert 0 < start["ready"] < start["recorded"] < start["compiled"]
    circumstances, tables = gpu._told(kept, options)
    assert circumstances.startswith("a GPU; tiny, bitsandbytes, PyTorch ")
    lines = {line.split(" |")[0]: line.split(" | ")[1:] for line in tables.splitlines()}
    assert "| 20 | 300 | - | - | - |" in tables and "| 2048 | - | - |" in tables  # neither the rows nor the tokens fit
    assert float(lines["| first start, until ready, s"][0].split()[0]) > 0

    def again(*_: object) -> object:
        raise AssertionError("measured again")

    gpu.measure(Record.open("gpu", options, tmp_path), Settings(), options, again)


def test_tables_show_speed_and_the_share_of_the_floor() -> None:
    facts = {"weights": 8e9, "kv_bytes_per_token": 200_000, "kv_bytes": 4e9}
    turns = {"bandwidth": [1e12], "decode, 4 rows, context 936": [0.016], "prefill, 512 tokens": [0.256]}
    shown = gpu.shown(turns, facts, chosen(rows=[4], contexts=[936], prompts=[512], steps=120))
    # 936 tokens, 4 of the warm steps and half of the 120: 1,000 of 4 rows, 0.8 GB
    assert "| 4 | 936 | 16.00 | 250.0 | 0.55 |" in shown and "| 512 | 256.00 | 2000 |" in shown
    assert "| KV, GB | 4.00 |" in shown and "| bandwidth of a copy, GB/s | 1000.00 |" in shown


@pytest.mark.parametrize(
    ("rows", "tokens", "there_is_room"),
    [(4, 1024, True), (4, 1025, False), (5, 256, False), (3, 1024, True), (1, 4096, True), (1, 4097, False)],
)
def test_only_batches_that_memory_holds_are_measured(rows: int, tokens: int, there_is_room: bool) -> None:
    facts = {"kv_bytes": 16 * 256 * 100, "kv_bytes_per_token": 100, "slots": 4, "context": 4096}
    assert gpu.fits(facts, rows, tokens) is there_is_room


def test_a_worker_serves_this_data_folder_on_the_gpu(tmp_path: Path) -> None:
    for shape, quantization in (("smollm2-135m-instruct", {"QUANTIZATION": "nf4"}), (None, {})):
        made = gpu.worker(chosen(shape=shape), tmp_path)
        assert made._settings == {"DEVICE": "cuda", "DATA_DIR": str(tmp_path)} | quantization
        assert gpu.options().parse_args(made._command[3:]).shape == shape
