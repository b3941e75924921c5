"""Compiling ahead of time, beside the engine: in a child process (CPU) or a thread (CUDA).

    python -m model.runtime.ahead

As a program it is that child, with its job on standard input. Adopts nothing: compile.py picks up the files.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch._inductor import config

from model.runtime.build import Room, build
from model.runtime.runner import PREFILL, Bucket, Runner
from model.runtime.step import prefill
from settings import Settings

# Where code is compiled and where it is loaded alike, or it is looked for under another name. By default a load, too,
# runs the C++ compiler: it compiles a line to see what the processor can do, and preprocesses PyTorch's headers.
config.cpp.vec_isa_ok = True
config.cpp_cache_precompile_headers = False

_SECRETS = {"redis_url", "admin_password"}
# Seconds after which a compiling thread lets others run, Python's own is 0.005: a token passes through several threads,
# and three naps of 1 ms took 16 to 18 ms (p95) beside a compiler, 7 so. Compiling took as long.
_TURN = 0.0005


def compile_ahead(engine: Runner, wanted: Iterable[Bucket], folder: Path) -> None:
    """Compile these buckets, most wanted first, each into a file of its own that appears when it is complete."""
    for bucket in wanted:
        options = {
            # The caller fixes every shape, and checking guards costs 2.5 ms a step (PyTorch 2.13, 30 layers).
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
            "size_asserts": False,
            "alignment_asserts": False,
        }  # a fresh one each time: torch.compile empties it
        if bucket == PREFILL:
            code, arguments = prefill, _some_prompt(engine)
        else:
            code, arguments = engine.step_over(bucket.pages), arguments_of(engine, bucket)
            # Numbers that are worth a second thread: little of what lies between two products.
            options["cpp.min_chunk_size"] = 8192
        dynamic = None if bucket == PREFILL else False
        ready = torch.compile(code, fullgraph=True, dynamic=dynamic, options=options).aot_compile((arguments, {}))
        ready.save_compiled_function(str(file_of(folder, bucket)), external_data={"model": engine.model})


def arguments_of(engine: Runner, bucket: Bucket) -> tuple[object, ...]:
    """What a decode step over `bucket` is called with."""
    return (engine.model, *engine.kv.tensors, *engine.rows.first(bucket.rows).tensors())


def _some_prompt(engine: Runner) -> tuple[object, ...]:
    """A chunk of 64 tokens, whose number is then left open."""
    tokens = [torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64), torch.arange(64)]
    for tensor in tokens:
        torch._dynamo.mark_dynamic(tensor, 0)
    return (engine.model, *engine.kv.tensors, *tokens)


def in_one_line(error: Exception) -> str:
    """What a compiler says, which may be pages."""
    return " ".join(str(error).split())[:300]


def file_of(folder: Path, bucket: Bucket) -> Path:
    """Where a bucket's compiled code is, or will be."""
    return folder / f"{bucket.rows}x{bucket.pages}.step"


class Job(Protocol):
    """Compiling that goes on beside the engine.

    alone: nothing can be loaded meanwhile. PyTorch compiles and loads under one lock, for which the engine would wait.
    """

    alone: bool

    def failure(self) -> str | None:
        """Why it has ended, in one line; None while it goes on."""

    def close(self) -> None:
        """End it."""


class Child:
    """A process that compiles these buckets into `folder`, with a model of its own.

    Raises OSError when there can be none.
    """

    alone = False

    def __init__(self, room: Room, missing: list[Bucket], checkpoint: Path, folder: Path, settings: Settings) -> None:
        job = {
            "settings": settings.model_dump(mode="json", exclude=_SECRETS),
            "checkpoint": str(checkpoint),
            "folder": str(folder),
            "room": [room.slots, room.context],
            "buckets": [[bucket.rows, bucket.pages] for bucket in missing],
        }
        self._log = folder / "compile.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "model.runtime.ahead"], cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=_without_secrets(os.environ),
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()  # and left open: its end tells the child that the service is gone

    def failure(self) -> str | None:
        if self.process.poll() is None:
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"exit {self.process.returncode}: {lines[-1][:300]}; see {self._log}"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


class Beside:
    """A thread that compiles these buckets into `folder`, for the very model that serves: a GPU has room for one."""

    alone = True

    def __init__(self, engine: Runner, missing: list[Bucket], folder: Path) -> None:
        self._ended = threading.Event()
        self._error = "nothing was left to do"
        self._thread = threading.Thread(
            target=self._compile, args=(engine, missing, folder), name="compile", daemon=True
        )
        self._thread.start()

    def _compile(self, engine: Runner, missing: list[Bucket], folder: Path) -> None:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        try:
            with torch.inference_mode():
                compile_ahead(engine, itertools.takewhile(lambda _: not self._ended.is_set(), missing), folder)
        except Exception as error:  # compilers fail in many ways, and what was served before serves on
            self._error = in_one_line(error)
        finally:
            sys.setswitchinterval(usual)

    def failure(self) -> str | None:
        return None if self._thread.is_alive() else self._error

    def close(self) -> None:
        """Waits for the bucket at hand: half a minute at most, and the model's memory is not free before."""
        self._ended.set()
        self._thread.join()


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The child compiles and needs no password. Its settings come with the job."""
    return {name: value for name, value in environment.items() if name.lower() not in _SECRETS}


def _main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    os.nice(10)  # behind the engine, but not without end: a service that is always busy needs compiled steps most
    room = Room(*job["room"])
    engine = build(Path(job["checkpoint"]), Settings(**job["settings"]), lambda stage, percent: None, room)
    with torch.inference_mode():
        compile_ahead(engine, [Bucket(*bucket) for bucket in job["buckets"]], Path(job["folder"]))


if __name__ == "__main__":
    _main()
