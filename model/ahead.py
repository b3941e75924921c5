"""The child process that compiles ahead of time: `python -m model.ahead`, with its job on standard input.

Adopts nothing: compile.py picks up the files that it leaves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch._inductor import config

from model.build import Room, build
from model.runner import PREFILL, Bucket, Runner
from model.step import prefill
from settings import Settings

# Where code is compiled and where it is loaded alike, or it is looked for under another name. By default a load, too,
# runs the C++ compiler: it compiles a line to see what the processor can do, and preprocesses PyTorch's headers.
config.cpp.vec_isa_ok = True
config.cpp_cache_precompile_headers = False

_SECRETS = {"redis_url", "admin_password"}


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


def file_of(folder: Path, bucket: Bucket) -> Path:
    """Where a bucket's compiled code is, or will be."""
    return folder / f"{bucket.rows}x{bucket.pages}.step"


def start(
    room: Room, missing: list[Bucket], checkpoint: Path, folder: Path, settings: Settings
) -> subprocess.Popen[bytes]:
    """A child process that compiles these buckets into `folder`. Raises OSError when there can be none."""
    job = {
        "settings": settings.model_dump(mode="json", exclude=_SECRETS),
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "room": [room.slots, room.context],
        "buckets": [[bucket.rows, bucket.pages] for bucket in missing],
    }
    with (folder / "compile.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "model.ahead"], cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=_without_secrets(os.environ),
        )  # fmt: skip
    assert child.stdin is not None
    child.stdin.write(json.dumps(job).encode() + b"\n")
    child.stdin.flush()  # and left open: its end tells the child that the service is gone
    return child


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
