"""Parameters, sizes and verdicts for the models of the catalogue and for folders, without a file of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from model.runtime import gpu
from model.weights import loader
from model.weights.catalogue import CATALOGUE, ModelError, Shape, find, read_json
from model.weights.estimate import Estimate, estimate, report, shape_of
from settings import Settings
from tests.model.preparing import prepare, settings_for
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model

PUBLISHED = {  # parameters, as the hub counts them in the safetensors files
    "smollm2-135m-instruct": 134_515_008,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
    "deepseek-r1-0528-qwen3-8b": 8_190_735_360,
}
FITS = {  # the GB of the smallest of these GPUs that holds the model
    "smollm2-135m-instruct": 12, "deepseek-r1-distill-qwen-1.5b": 12, "deepseek-r1-distill-qwen-7b": 12,
    "deepseek-r1-distill-qwen-14b": 12, "deepseek-r1-distill-qwen-32b": 24, "deepseek-r1-distill-llama-8b": 12,
    "deepseek-r1-distill-llama-70b": 48, "deepseek-r1-0528-qwen3-8b": 12,
}  # fmt: skip


def sizes(name: str, memory: float, quantization: str = "nf4", device: str = "cuda") -> Estimate:
    spec = CATALOGUE[name]
    return estimate(spec, shape_of(spec), quantization, int(memory * 1e9), device)


@pytest.mark.parametrize("name", CATALOGUE)
def test_parameters_are_those_that_are_published(name: str) -> None:
    assert shape_of(CATALOGUE[name]).parameters == pytest.approx(PUBLISHED[name], rel=0.001)


@pytest.mark.parametrize("memory", [12, 16, 24, 48, 80])
@pytest.mark.parametrize("name", CATALOGUE)
def test_a_model_fits_a_gpu_or_says_how_much_is_missing(name: str, memory: int) -> None:
    found = sizes(name, memory)
    assert (found.missing == 0) is (found.tokens >= 256) is (memory >= FITS[name])
    if found.missing:
        assert sizes(name, memory + found.missing / 1e9 + 0.001).missing == 0
        assert sizes(name, memory + found.missing / 1e9 - 0.001).missing > 0


def test_the_figures_of_the_14b_on_an_rtx_4090() -> None:
    found = sizes("deepseek-r1-distill-qwen-14b", 24)
    assert 60_000 < found.tokens < 70_000
    assert [round(size / 1e9, 1) for size in (found.weights, found.fetched, found.stored, found.quantising)] == [
        9.2, 29.5, 9.9, 12.1,
    ]  # fmt: skip


def test_other_quantizations_and_a_cpu_take_more() -> None:
    name = "deepseek-r1-distill-qwen-14b"
    weights = [sizes(name, 80, quantization).weights / 1e9 for quantization in ("nf4", "int8", "none")]
    assert weights == pytest.approx([9.15, 16.33, 29.54], abs=0.01)
    assert (sizes(name, 80, "none").stored, sizes(name, 80, "none").quantising) == (0, 0)
    assert sizes(name, 80, "none", "cpu").weights == pytest.approx(59.07e9, rel=0.001)
    on_cpu = sizes(name, 24, device="cpu")  # an embedding in float32, and half of what is left for KV
    assert on_cpu.weights == pytest.approx(10.70e9, rel=0.001)
    assert on_cpu.tokens == ((24_000_000_000 - on_cpu.weights) // 2 // 196_608 // 256 - 1) * 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_is_read(tmp_path: Path, architecture: str) -> None:
    spec = find(Settings(model=str(tiny_checkpoint(tmp_path / "model", architecture))))
    shape, model = shape_of(spec), tiny_model(architecture)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert shape.parameters == matrices and shape.kv_bytes == 2 * 2 * 2 * 16 * 2
    assert estimate(spec, shape, "nf4", 1 << 40, "cpu").fetched == 0


def test_what_cannot_be_estimated_is_one_line(tmp_path: Path, source: Path) -> None:
    name = f"org/name@{'0' * 40}"
    with pytest.raises(ModelError, match=r"fetch its config\.json and tokenizer\.json"):
        shape_of(find(Settings(model=name, models_allowed=(name,))))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        shape_of(find(Settings(model=str(tmp_path))))
    (source / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ModelError, match="hidden_size"):
        shape_of(find(Settings(model=str(source))))


def test_quantised_files_are_as_large_as_was_estimated(source: Path) -> None:
    tiny_model(hidden_size=256, intermediate_size=512, vocab_size=2000).save_pretrained(source)
    file = prepare(source) / "model.safetensors"
    assert Shape.of(read_json(source / "config.json")).weight_bytes() == pytest.approx(file.stat().st_size, rel=0.03)


def test_this_machine_is_its_gpu_or_its_free_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model="deepseek-r1-distill-qwen-14b")
    monkeypatch.setattr(gpu, "memory", lambda device: (8_000_000_000, 11_000_000_000))
    monkeypatch.setattr(gpu, "choose_device", lambda wanted: "cuda")
    assert "on 11.0 GB of GPU memory: does not fit: 0.4 GB are missing" in report(settings, None)
    monkeypatch.setattr(gpu, "choose_device", lambda wanted: "cpu")
    assert "on 8.0 GB of free RAM: does not fit: 2.9 GB are missing" in report(settings, None)
    documented = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    assert "\n".join(report(settings, 24).splitlines()[:4]) in documented


def test_it_is_a_command_that_touches_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "MODEL": "deepseek-r1-distill-qwen-14b", "DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "model.weights.estimate", "24"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("deepseek-r1-distill-qwen-14b on 24.0 GB of GPU memory: fits") and not done.stderr
    assert not list(tmp_path.iterdir())
    env["MODEL"] = "x"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("MODEL=x is no folder") and done.stderr.count("\n") == 1


# The same sizes, held against the memory that is free.


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "memory", lambda device: (9_000_000_000, 1 << 40))
    settings = Settings(model="deepseek-r1-distill-qwen-14b", data_dir=tmp_path, device="cpu")
    with pytest.raises(ModelError, match=r"the weights take 9\.9 GB and 9\.0 GB are free .*`make estimate`"):
        loader.fetch(settings)


def test_weights_that_memory_cannot_hold_are_not_loaded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, settings = prepare(source), settings_for(source)
    size = (folder / "model.safetensors").stat().st_size
    free = [size - 1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 1 << 40))
    with pytest.raises(ModelError, match="free on this GPU"):
        loader.load_model(folder, settings, torch.device("cuda"), torch.bfloat16)
    # What quantising has left to PyTorch's allocator is free for the weights.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 1))
    gpu.require_memory(size, "cuda")


@pytest.mark.parametrize("prepared", [True, False])
def test_a_gpu_that_cannot_be_used_is_told_before_anything_is_made(
    source: Path, monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    if prepared:
        prepare(source)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ModelError, match="PyTorch's CPU build"):
        loader.fetch(settings_for(source).model_copy(update={"device": "auto"}))
    assert prepared or not list((source.parent / "data").glob("models/*nf4*/*"))
    loader.fetch(settings_for(source))
