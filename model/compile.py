"""Compiled decode steps, one a bucket, made beside the engine so that it never waits for a compiler.

On a CPU a child process runs torch.compile ahead of time and leaves one file a bucket in DATA_DIR; the model thread
picks each up in a fraction of a second, and a later start finds them ready. On CUDA the step is compiled in place, as
in PyTorch's own examples. Compiling changes how fast a step is, never what it computes.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch._inductor import config

from model.ahead import arguments_of, file_of, start
from model.build import Room
from model.runner import Bucket, Compiler, Runner
from model.step import Step
from settings import Settings

_log = logging.getLogger(__name__)

# Seconds that the first answers of all have the processor to themselves before compiling begins, unless idle earlier.
_LET_FIRST_ANSWER = 30.0
_COMPILED_FROM = ("ahead", "attention", "kv", "native", "packed", "quant", "sampler", "step")  # modules of this package


def buckets(slots: int, pages: int, kernels: bool) -> list[Bucket]:
    """The shapes worth compiling, the most useful first: one user, then everybody, then what lies between and beyond.

    Few, for each takes a minute or two once. This project's kernel reads each row's own length, whatever the bucket's;
    PyTorch's attention reads all pages of it, and a longer context than the last bucket's runs eagerly.
    """
    wanted = [(1, 2), (slots, 1), (8, 1), (4, 2), (slots, 4), (1, 8)]
    if kernels:
        wanted = [(1, pages), (slots, pages), (0, 0), (8, pages), (4, pages), (2, pages)]  # (0, 0): PREFILL
    return list(dict.fromkeys(Bucket(min(rows, slots), min(length, pages)) for rows, length in wanted))


def compiler_for(engine: Runner, checkpoint: Path, settings: Settings) -> Compiler | None:
    """Where this engine's compiled steps come from; None when COMPILE=off."""
    if not settings.compile:
        return None
    if engine.device != "cpu":
        return InPlaceCompiler(engine)
    try:
        return BackgroundCompiler(engine, checkpoint, settings)
    except OSError as error:  # a full disk, no process left: a model that loads is served all the same
        _log.warning("nothing can be compiled here, serving eagerly, about half as fast: %s", error)
        return None


class BackgroundCompiler:
    """Adopts what a child process compiles into `folder`. Belongs to the model thread, but for `close`."""

    def __init__(self, engine: Runner, checkpoint: Path, settings: Settings) -> None:
        self._model = engine.model
        self._folder = settings.data_dir / "compiled" / fingerprint(engine, checkpoint, settings)
        self._left = buckets(engine.slots, engine.kv.pages, engine.plan.kernels)
        self._wanted = len(self._left)
        self._failed = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._start: Callable[[], subprocess.Popen[bytes]] | None = None
        self._start_by = time.monotonic() + _LET_FIRST_ANSWER
        self._folder.mkdir(parents=True, exist_ok=True)
        _forget_old(self._folder)
        missing = self._missing()
        compiler = config.cpp.cxx[1]
        if missing and shutil.which(compiler) is None:
            self._stay_eager(f"no C++ compiler ({compiler}), apt install g++ mends it")
        elif missing:
            room = Room(engine.slots, engine.context)
            self._start = partial(start, room, missing, checkpoint, self._folder, settings)

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        """One step whose file is there; a file that does not load is removed and counts as failed."""
        if self._start and (idle or time.monotonic() > self._start_by):
            self._begin(self._start)
        for bucket in self._left:
            file = file_of(self._folder, bucket)
            if file.exists():
                self._left.remove(bucket)
                return self._adopted(bucket, file)
        if self._left and self._child is not None and self._child.poll() is not None:
            self._stay_eager(f"torch.compile failed (exit {self._child.returncode}): {self._last_words()}")
        return None

    def state(self) -> dict[str, int]:
        return {"wanted": self._wanted, "failed": self._failed}

    def _begin(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = None
        try:
            self._child = start()
        except OSError as error:  # a full disk, no process left: a model that loads is served all the same
            self._stay_eager(f"nothing can be compiled here: {error}")

    def close(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            self._child.kill()
            self._child.wait()

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

    def _last_words(self) -> str:
        log = self._folder / "compile.log"
        lines = (log.read_text(errors="replace") if log.exists() else "").strip().splitlines() or ["no output"]
        return f"{lines[-1][:300]}; see {log}"


class InPlaceCompiler:
    """Compiles on the model thread, a bucket at a time, while nobody waits: the plain way, for CUDA."""

    def __init__(self, engine: Runner, mode: str = "reduce-overhead") -> None:
        self._engine, self._mode = engine, mode
        self._left = buckets(engine.slots, engine.kv.pages, engine.plan.kernels)
        self._wanted, self._failed = len(self._left), 0
        for tensor in (*engine.kv.keys, *engine.kv.values):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs take mutated tensors only at fixed addresses

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        if not idle or not self._left:
            return None
        bucket = self._left.pop(0)
        step = torch.compile(self._engine.step_over(bucket.pages), mode=self._mode, fullgraph=True, dynamic=False)
        try:
            step(*arguments_of(self._engine, bucket))
        except Exception as error:  # compilers fail in many ways, and eager serves in each
            _log.warning("torch.compile failed, serving eagerly, slower: %s", " ".join(str(error).split())[:300])
            self._failed += 1 + len(self._left)
            self._left.clear()
            return None
        return bucket, step

    def state(self) -> dict[str, int]:
        return {"wanted": self._wanted, "failed": self._failed}

    def close(self) -> None:
        """Nothing runs beside the model thread."""


def fingerprint(engine: Runner, checkpoint: Path, settings: Settings) -> str:
    """Names everything that a compiled step depends on, so that none is ever used for another."""
    facts: list[object] = [torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability()]
    facts += [checkpoint.name, str(engine.model.config), engine.plan, engine.slots, engine.context]
    facts += [settings.compute_threads]
    facts += [Path(__file__).with_name(f"{module}.py").read_text() for module in _COMPILED_FROM]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _forget_old(folder: Path, keep: int = 4) -> None:
    """Remove the steps of fingerprints that have not served for longest: each change of version leaves some."""
    folder.touch()
    known = [other for other in folder.parent.iterdir() if re.fullmatch(r"[0-9a-f]{16}", other.name)]
    for other in sorted(known, key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(other, ignore_errors=True)
