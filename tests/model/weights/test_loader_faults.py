"""Checkpoints that are wrong, damaged or half made: one line for each, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import ne
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.weights import checkpoint, loader
from model.weights.catalogue import ModelError, find
from tests.model.preparing import left_behind, prepare, settings_for
from tests.model.tiny import tiny_checkpoint

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def gguf_beside_a_config(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def link(name: str) -> Callable[[Path], None]:
    """The file as a link to one elsewhere, as the keys in DATA_DIR are."""

    def apply(folder: Path) -> None:
        elsewhere = folder.parent / "keys"
        elsewhere.write_text("0" * 64)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(elsewhere)

    return apply


BAD = {
    "a template that is a link": (link("chat_template.jinja"), "chat_template.jinja is a link"),
    "weights that are a link": (link("model.safetensors"), "model.safetensors is a link"),
    "a pipe": (lambda folder: os.mkfifo(folder / "extra.json"), "extra.json is no file"),
    "attention from a hub": (edit("config.json", attn_implementation="org/name"), "attn_implementation"),
    "attention from a hub, as stored": (edit("config.json", _attn_implementation="org/name"), "_attn_implementation"),
    "pipelines of its own": (edit("config.json", custom_pipelines={"x": {"impl": "x.Y"}}), "custom_pipelines"),
    "a word that is not known": (edit("config.json", kernel_repo="org/name"), "kernel_repo is not known here"),
    "a table that is not known": (edit("config.json", extra={"a": 1}), "extra is not known here"),
    "generation of its own": (edit("generation_config.json", custom_generate="org/name"), "custom_generate"),
    "a tokenizer in another file": (edit("tokenizer_config.json", gguf_file="/etc/passwd"), "gguf_file"),
    "3,000,000 layers": (edit("config.json", num_hidden_layers=3_000_000), "num_hidden_layers must be .* to 512"),
    "too many heads": (edit("config.json", num_attention_heads=1 << 20), "num_attention_heads"),
    "no heads": (edit("config.json", num_key_value_heads=0), "num_key_value_heads"),
    "too many words": (edit("config.json", vocab_size=1 << 40), "vocab_size"),
    "too wide": (edit("config.json", hidden_size=1 << 30), "hidden_size"),
    "an endless context": (edit("config.json", max_position_embeddings=1 << 60), "max_position_embeddings"),
    "GGUF": (gguf, "holds GGUF, which is not served; name the folder of the original safetensors"),
    "GGUF beside a config": (gguf_beside_a_config, "holds GGUF, which is not served; name the folder of the original"),
    "LoRA": (write("adapter_config.json", "{}"), "is a LoRA adapter: merge it into its base model"),
    "4 bits of another kind": (
        edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "name the original weights",
    ),
    "truncated shard": (truncate, "fetch it again"),
    "absurd header length": (absurd_header, "header too large: fetch it again"),
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
    injected="bad models: cut, absurd header, pickled, code of its own, links, absurd numbers",
)
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_model_is_refused_in_one_line_and_leaves_nothing_ready(
    source: Path, fault: str, counted: Callable[..., None]
) -> None:
    spoil, words = BAD[fault]
    spoil(source)
    with pytest.raises(ModelError, match=words) as caught:
        prepare(source)
    settings, said = settings_for(source), str(caught.value).split("\n")
    left = [*left_behind(settings), *(settings.data_dir / "models").glob("source-nf4-*")]
    counted(lines_said=len(said), folders_left=len(left))
    assert len(said) == 1 and left == []


@pytest.mark.promise("P7", injected="one changed byte in weights, tokenizer or config", counted="by checksum")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_changed_byte_is_found_at_the_next_start(source: Path, name: str, counted: Callable[..., None]) -> None:
    file = prepare(source) / name
    good = file.read_bytes()
    content = bytearray(good)
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(ModelError, match="checksum") as caught:
        prepare(source)
    counted(bytes_changed=sum(map(ne, good, content)), lines_said=len(str(caught.value).splitlines()))


STORED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
FP4 = {"quantization_config": STORED["quantization_config"] | {"bnb_4bit_quant_type": "fp4"}}
MOE, GEMMA, MISTRAL = "Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "change", "settings", "words"),
    [
        (MOE, {}, {}, "bitsandbytes quantises no experts: name the original weights, and set QUANTIZATION=none"),
        (MOE, {}, {"quantization": "int8"}, "set QUANTIZATION=none"),
        (MOE, STORED, {"quantization": "none"}, "name the original weights"),
        (MOE, {"decoder_sparse_step": 0}, {"quantization": "none"}, "decoder_sparse_step"),
        (MOE, {"num_local_experts": 1 << 20}, {"quantization": "none"}, "num_local_experts must be"),
        (MISTRAL, FP4, {}, "name the original weights, or NF4 of bitsandbytes"),
        (MISTRAL, STORED, {"quantization": "int8"}, "set QUANTIZATION=nf4, or name the original weights"),
        (MISTRAL, {"sliding_window": 512}, {}, r"sliding_window=512 is not served: set MAX_CONTEXT=512, .* or name a"),
        ("Phi3ForCausalLM", {"sliding_window": 512}, {"max_context": 513}, "sliding_window=512"),
        (GEMMA, {"sliding_window": 512}, {"max_context": 513}, "sliding_window=512"),
        (GEMMA, {"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping is not served"),
        (GEMMA, {"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping is not served"),
        (GEMMA, {"use_bidirectional_attention": True}, {}, "use_bidirectional_attention is not served"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}, {}, "layers of chunked_att"),
    ],
)
def test_what_is_not_served_is_told_before_weights_are_fetched(
    tmp_path: Path, architecture: str, change: dict[str, object], settings: dict[str, object], words: str
) -> None:
    source = tiny_checkpoint(tmp_path / "source", architecture)
    edit("config.json", **change)(source)
    told = settings_for(source, **settings)
    with pytest.raises(ModelError, match=words) as caught:
        loader.prepare_tokenizer(find(told), told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", [MISTRAL, "Phi3ForCausalLM", GEMMA])
def test_a_window_that_all_texts_fit_into_is_served(tmp_path: Path, architecture: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", architecture)
    edit("config.json", sliding_window=512)(source)
    assert checkpoint.is_ready(prepare(source, max_context=512))
    with pytest.raises(ModelError, match="sliding_window=512"):  # though all is prepared
        prepare(source, max_context=513)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", MISTRAL])
def test_a_folder_in_nf4_is_served_as_it_is_or_says_which_setting(tmp_path: Path, architecture: str) -> None:
    source = tiny_checkpoint(tmp_path / "source", architecture)
    folder = prepare(source)
    again = prepare(folder)
    assert again != folder and (again / "model.safetensors").samefile(folder / "model.safetensors")
    model = loader.load_model(again, settings_for(folder), CPU, torch.float32)
    assert type(model.model.layers[0].self_attn.o_proj).__name__ == "Linear4bit"
    with pytest.raises(ModelError, match="set QUANTIZATION=nf4, or name the original weights"):
        prepare(folder, quantization="none")


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from here on."""
    names: list[str] = []
    real = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file, *rest: (names.append(file.name), real(file, *rest))[1])
    return names


def test_what_is_unchanged_is_hashed_once_when_it_is_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(source)
    names = hashed(monkeypatch)
    assert checkpoint.is_ready(prepare(source)) and names == []


def test_verifying_hashes_all_of_it_and_finds_what_size_and_time_hide(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = prepare(source), settings_for(source)
    names = hashed(monkeypatch)
    percents: list[int] = []
    loader.prepare(find(settings), settings, lambda _, percent: percents.append(percent), full=True)
    assert set(names) == {file.name for file in folder.iterdir()} - {checkpoint.MANIFEST} and percents[-1] == 25
    file = folder / "model.safetensors"
    state, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert prepare(source) == folder  # a disk that flips a bit tells nobody: that is what VERIFY=1 is for
    with pytest.raises(ModelError, match="checksum"):
        loader.prepare(find(settings), settings, full=True)


def test_a_copy_of_the_folder_is_hashed_once_and_taken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(source)
    for file in list(folder.iterdir()):  # as `cp -r` or a restored backup leaves them
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    names = hashed(monkeypatch)
    assert prepare(source) == folder and "model.safetensors" in names
    names.clear()
    assert prepare(source) == folder and names == []


def test_a_manifest_of_an_earlier_version_holds_hashes_alone_and_is_taken(source: Path) -> None:
    folder = prepare(source)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({name: each["sha256"] for name, each in manifest.items()}))
    assert prepare(source) == folder
    assert json.loads((folder / checkpoint.MANIFEST).read_text()) == manifest


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


@pytest.mark.promise("P7", injected="a disk of 128 KiB")
def test_a_full_disk_is_one_clear_line(source: Path, tiny_disk: Path, counted: Callable[..., None]) -> None:
    settings = settings_for(source).model_copy(update={"data_dir": tiny_disk})
    with pytest.raises(ModelError, match="no space left on the disk of DATA_DIR") as caught:
        loader.prepare(find(settings), settings)
    left, said = left_behind(settings), str(caught.value).split("\n")
    counted(lines_said=len(said), folders_left=len(left))
    assert len(said) == 1 and left == []


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
        "import sys; from pathlib import Path; from model.weights import checkpoint\n"
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
