"""Compiled decode steps, one a bucket, made beside the engine so that it never waits for a compiler.

torch.compile runs ahead of time in a child process, on CUDA in a thread (ahead.py), and leaves one file a bucket in
DATA_DIR; the model thread picks each up in a fraction of a second, and a later start finds them ready. On CUDA they are
recorded as CUDA graphs, too (graphs.py). Compiling changes how fast a step is, never what it computes.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch._inductor import config

from model.runtime.ahead import Beside, Child, Job, file_of
from model.runtime.build import Room
from model.runtime.graphs import GraphCompiler
from model.runtime.runner import Bucket, Compiler, CompileState, Runner
from model.runtime.step import Step
from settings import Settings

_log = logging.getLogger(__name__)

# Seconds that the first answers of all have the processor to themselves before compiling begins, unless idle earlier.
_LET_FIRST_ANSWER = 30.0
_COMPILED_FROM = ("ahead", "attention", "kv", "packed", "linear", "sampler", "step")  # modules of this package


def buckets(device: str, slots: int, pages: int, kernels: bool) -> list[Bucket]:
    """The shapes worth compiling, the most useful first: one user, then everybody, then what lies between and beyond.

    Few, for each takes a minute or two once. This project's kernel reads each row's own length, whatever the bucket's;
    PyTorch's attention reads all pages of it. That costs little on a GPU, and beyond the last bucket eager steps cost
    much; on a CPU a longer context than the last bucket's runs eagerly.
    """
    if device != "cpu":
        wanted = [(1, pages), (slots, pages), (slots, 4), (8, 4), (4, pages), (8, pages)]
    elif kernels:
        wanted = [(1, pages), (slots, pages), (0, 0), (8, pages), (4, pages), (2, pages)]  # (0, 0): PREFILL
    else:
        wanted = [(1, 2), (slots, 1), (8, 1), (4, 2), (slots, 4), (1, 8)]
    return list(dict.fromkeys(Bucket(min(rows, slots), min(length, pages)) for rows, length in wanted))


def wanted_by(engine: Runner) -> list[Bucket]:
    """The buckets of this engine."""
    return buckets(engine.device, engine.slots, engine.kv.pages, engine.plan.kernels)


def compiler_for(engine: Runner, checkpoint: Path, settings: Settings) -> Compiler | None:
    """Where this engine's compiled steps come from; None when COMPILE=off."""
    if not settings.compile:
        return None
    try:
        compiler = BackgroundCompiler(engine, checkpoint, settings)
        # bitsandbytes' int8 product waits for the CPU to look for outliers, which no CUDA graph can hold.
        plain = engine.device == "cpu" or settings.quantization == "int8"
        return compiler if plain else GraphCompiler(engine, compiler, wanted_by(engine))
    except OSError as error:  # a full disk, no process left: a model that loads is served all the same
        _log.warning("nothing can be compiled here, serving eagerly, about half as fast: %s", error)
        return None


class BackgroundCompiler:
    """Adopts what is compiled beside the engine. Belongs to the model thread, but for `close`."""

    def __init__(self, engine: Runner, checkpoint: Path, settings: Settings) -> None:
        self._model = engine.model
        self._folder = settings.data_dir / "compiled" / fingerprint(engine, checkpoint, settings)
        self._left = wanted_by(engine)
        self._wanted = len(self._left)
        self._failed = 0
        self._job: Job | None = None
        self._start: Callable[[], Job] | None = None
        self._start_by = time.monotonic() + _LET_FIRST_ANSWER
        self._folder.mkdir(parents=True, exist_ok=True)
        _forget_old(self._folder)
        missing = self._missing()
        compiler = config.cpp.cxx[1]
        if missing and shutil.which(compiler) is None:
            self._stay_eager(f"no C++ compiler ({compiler}), apt install g++ mends it")
        elif missing and engine.device == "cpu":
            room = Room(engine.slots, engine.context)
            self._start = partial(Child, room, missing, checkpoint, self._folder, settings)
        elif missing:
            self._start = partial(Beside, engine, missing, self._folder)

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        """One step whose file is there; a file that does not load is removed and counts as failed."""
        if self._start and (idle or time.monotonic() > self._start_by):
            self._begin(self._start)
        if self._job and self._job.alone and not self._job.failure():
            return None
        for bucket in self._left:
            file = file_of(self._folder, bucket)
            if file.exists():
                self._left.remove(bucket)
                return self._adopted(bucket, file)
        if self._left and self._job and (reason := self._job.failure()):
            self._stay_eager(f"torch.compile failed ({reason})")
        return None

    def state(self) -> CompileState:
        return CompileState(self._wanted, self._failed)

    def _begin(self, start: Callable[[], Job]) -> None:
        self._start = None
        try:
            self._job = start()
        except OSError as error:  # a full disk, no process left: a model that loads is served all the same
            self._stay_eager(f"nothing can be compiled here: {error}")

    def close(self) -> None:
        if self._job:
            self._job.close()

    def _adopted(self, bucket: Bucket, file: Path) -> tuple[Bucket, Step] | None:
        try:
            with file.open("rb") as stream:
                step = torch.compiler.load_compiled_function(stream, external_data={"model": self._model})
        except Exception as error:  # whatever a damaged or foreign file makes of unpickling: eager serves
            _log.warning("compiled step %s cannot be used, staying eager: %s", file.name, error)
            file.unlink(missing_ok=True)
            self._failed += 1
            return None
        step.disable_guard_check()
        return bucket, step

    def _missing(self) -> list[Bucket]:
        return [bucket for bucket in self._left if not file_of(self._folder, bucket).exists()]

    def _stay_eager(self, reason: str) -> None:
        """Wait no longer for what is not there; what an earlier start compiled is still taken over."""
        _log.warning("serving eagerly, about half as fast: %s", reason)
        missing = self._missing()
        self._failed += len(missing)
        self._left = [bucket for bucket in self._left if bucket not in missing]


def fingerprint(engine: Runner, checkpoint: Path, settings: Settings) -> str:
    """Names everything that a compiled step depends on, so that none is ever used for another."""
    facts: list[object] = [torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability()]
    facts += [
        torch.cuda.get_device_properties() if engine.device != "cpu" else "",
        checkpoint.name,
        str(engine.model.config),
        engine.plan,
        engine.slots,
        engine.context,
    ]
    facts += [settings.compute_threads]
    facts += [Path(__file__).with_name(f"{module}.py").read_text() for module in _COMPILED_FROM]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _forget_old(folder: Path, keep: int = 4) -> None:
    """Remove the steps of fingerprints that have not served for longest: each change of version leaves some."""
    folder.touch()
    known = [other for other in folder.parent.iterdir() if re.fullmatch(r"[0-9a-f]{16}", other.name)]
    for other in sorted(known, key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(other, ignore_errors=True)
