"""The bare engines as workers: ours, llama.cpp, and with PEERS=all onnxruntime-genai.

Asks them nothing; the rows do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.peers import LLAMA, ONNX, PeerMissing, gguf, int4_export, wanted_all
from benchmarks.record import Record
from benchmarks.worker import Worker, WorkerFailed
from model.weights.catalogue import find
from model.weights.loader import prepare
from settings import Settings

OURS, THEIRS = "this engine", LLAMA.name


def ours(settings: Settings, folder: Path, patience: float) -> Worker:
    """Our engine. patience: see ours.py."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(settings.data_dir.resolve() / "compiled" / "torchinductor")}
    return Worker([sys.executable, "-m", "benchmarks.ours", str(patience)], folder / "ours.log", caches)


def llama(settings: Settings, folder: Path) -> Worker:
    """llama.cpp on the same weights and threads. Raises PeerMissing."""
    command: list[str | Path] = [LLAMA.bin() / "python", "-m", "benchmarks.llama", gguf(settings, folder)]
    return Worker([*command, str(settings.compute_threads)], folder / "llama.log", {})


def onnx(settings: Settings, folder: Path) -> Worker:
    """onnxruntime-genai on its own int4 export of the same weights. Raises PeerMissing."""
    python, log = ONNX.bin() / "python", folder / "onnx.log"
    model = int4_export(dense(settings), settings.compute_threads, log)
    return Worker([python, "-m", "benchmarks.onnx", model, str(settings.compute_threads)], log, {})


def dense(settings: Settings) -> Path:
    """The same weights unquantised, in bf16, made once (a minute)."""
    return prepare(find(settings), settings.model_copy(update={"quantization": "none"}))


@contextmanager
def side_by_side(settings: Settings, folder: Path, patience: float, record: Record) -> Iterator[dict[str, Worker]]:
    """All, loaded and waiting for turns; what each is goes to record.facts. One that cannot be had is left out."""
    makers = {OURS: partial(ours, settings, folder, patience), THEIRS: partial(llama, settings, folder)}
    makers |= {ONNX.name: partial(onnx, settings, folder)} if wanted_all() else {}
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        for name, make in makers.items():
            try:
                worker = stack.enter_context(make())
                record.facts[name] = worker.ask("facts")
                running[name] = worker
            except (PeerMissing, WorkerFailed) as missing:
                print(f"{name}: {missing}", file=sys.stderr)
        yield running
