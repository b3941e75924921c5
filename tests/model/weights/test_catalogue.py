from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.weights.catalogue import CATALOGUE, DEMO_WHEEL, ModelError, find, with_config
from settings import Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_default_model_needs_no_hub() -> None:
    assert find(Settings()).source == DEMO_WHEEL


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - {"smollm2-135m-instruct"}))
def test_every_hub_model_is_pinned_to_a_commit(name: str) -> None:
    spec = find(Settings(model=name))
    assert spec.source == f"deepseek-ai/{spec.source.split('/')[1]}" and spec.source.split("/")[1].lower() == name
    assert re.fullmatch(r"[0-9a-f]{40}", spec.revision or "")
    assert spec.think == ("<think>", "</think>")


def test_no_two_models_share_a_revision() -> None:
    revisions = [spec.revision for spec in CATALOGUE.values()]
    assert len(set(revisions)) == len(revisions)


def test_a_hub_model_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(ModelError, match=f"MODELS_ALLOWED=org/name@{COMMIT}"):
        find(Settings(model=f"org/name@{COMMIT}"))


def test_an_allowed_hub_id_serves_when_pinned() -> None:
    name = f"org/name@{COMMIT}"
    spec = find(Settings(model=name, models_allowed=(name,)))
    assert (spec.name, spec.source, spec.revision) == ("org/name", "org/name", COMMIT)


@pytest.mark.parametrize("name", ["org/name", "org/name@main", f"http://host/name@{COMMIT}", f"../../x@{COMMIT}", "x"])
def test_a_name_that_is_neither_a_folder_nor_pinned_is_refused_though_allowed(name: str) -> None:
    with pytest.raises(ModelError, match="commit"):
        find(Settings(model=name, models_allowed=(name,)))


def test_a_gguf_file_is_one_line_that_says_what_to_name_instead(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"GGUF is not served; name the folder of the original safetensors"):
        find(Settings(model=str(tmp_path / "model.gguf")))


def test_a_local_directory_is_named_without_its_path_and_completed_from_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 4096})
    )
    spec = find(Settings(model=f"{folder}/"))
    assert spec.name == "mine" and spec.context == 0
    assert with_config(spec, folder).context == 4096


def test_a_listed_model_is_not_rewritten_by_a_folder(tmp_path: Path) -> None:
    spec = CATALOGUE["smollm2-135m-instruct"]
    assert with_config(spec, tmp_path) is spec


def test_the_torch_free_rooms_import_no_torch() -> None:
    names = "model.weights.catalogue, model.text.detokenizer, model.weights.checkpoint"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
