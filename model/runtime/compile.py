"""torch.compile beside the engine: a thread makes code ready, which the model thread takes over piece by piece.

On CUDA steps are recorded as CUDA graphs, too: as they are within seconds, then what was compiled. How fast a step is
changes, never what it computes. A later start finds what inductor made in DATA_DIR.
"""

import logging
import os
import queue
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from torch._inductor import config
from torch.utils import cpp_extension

from model.runtime.attention import through_layers
from model.runtime.kv import PAGE, pages_for
from model.runtime.runner import MANY, ONE, Bucket, Code, Runner, make_step
from settings import Settings

_log = logging.getLogger(__name__)

# By default a load, too, runs the C++ compiler: it compiles a line to see what the processor can do, and preprocesses
# PyTorch's headers. And what is generated has no threads of its own: the kernels' share the cores.
config.cpp.vec_isa_ok = True
config.cpp_cache_precompile_headers = False
config.cpp.threads = 1

# Seconds that the first answers of all have the processor to themselves before compiling begins, unless idle earlier.
_LET_FIRST_ANSWER = 30.0
# Seconds after which a compiling thread lets others run, Python's own is 0.005: a token passes through several threads,
# and three naps of 1 ms took 16 to 18 ms (p95) beside a compiler, 7 so. Compiling took as long.
_TURN = 0.0005

# Inductor splits the compiler's command at spaces, which a checkout's folder may have, or DATA_DIR.
cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
_links = TemporaryDirectory(prefix="llm-compiled-")


def buckets(runner: Runner) -> list[Bucket]:
    """What is worth compiling, the most useful first: one user, then everybody, then what lies between and beyond.

    This project's kernels read each row's own length whatever the number of rows. PyTorch's attention reads all columns
    of a bucket, which costs little on a GPU; beyond the last bucket eager steps cost much.
    """
    if runner.plan.kernels:
        return [ONE, MANY]
    slots, pages = runner.slots, pages_for(runner.context)
    wanted = [(1, pages), (slots, pages), (slots, 4), (8, 4), (4, pages), (8, pages)]
    return list(dict.fromkeys(Bucket(min(rows, slots), min(length, pages)) for rows, length in wanted))


def code_of(runner: Runner, bucket: Bucket) -> tuple[Code, tuple[object, ...]]:
    """What is compiled for a bucket: the function, and arguments as it is called with."""
    if not runner.plan.kernels:
        arguments = (runner.model, *runner.kv.tensors, *runner.rows.first(bucket.rows).tensors())
        return make_step(bucket.pages * PAGE), arguments
    body, n = runner.model.model, 64 if bucket == MANY else 1
    # Three tensors, since of one and the same the compiled code would read the first only.
    slot, position, last = (torch.arange(n) for _ in range(3))
    x = torch.zeros(n, runner.model.config.hidden_size)
    cos, sin = (table[:, 0] for table in body.rotary_emb(x, position[:, None]))
    for tensor in (x, cos, sin, slot, position, last) if bucket == MANY else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    return through_layers, (body.layers, x, cos, sin, *runner.kv.tensors, slot, position, last)


def compiled(runner: Runner, bucket: Bucket) -> Code:
    """The code of a bucket, compiled; nothing is computed meanwhile."""
    code, arguments = code_of(runner, bucket)
    # The caller fixes every shape, and checking guards costs 2.5 ms a step (PyTorch 2.13, 30 layers). A fresh
    # dictionary each time: torch.compile empties it.
    options = dict(guard_filter_fn=torch.compiler.skip_all_guards_unsafe, size_asserts=False, alignment_asserts=False)
    dynamic = None if bucket == MANY else False
    ready = torch.compile(code, fullgraph=True, dynamic=dynamic, options=options).aot_compile((arguments, {}))
    ready.disable_guard_check()
    return ready


def compiler_for(runner: Runner, settings: Settings) -> "ThreadCompiler | None":
    """Where this runner's compiled code comes from; None under COMPILE=off and where nothing can be compiled."""
    # PyTorch's attention on a CPU is for machines without a C++ compiler.
    if not settings.compile or (runner.device == "cpu" and not runner.plan.kernels):
        return None
    # bitsandbytes' int8 product waits for the CPU to look for outliers, which no CUDA graph can hold.
    recorded = runner.device != "cpu" and settings.quantization != "int8"
    _keep_caches(settings.data_dir.resolve() / "compiled")
    return ThreadCompiler(runner, record=partial(record, torch.cuda.graph_pool_handle()) if recorded else None)


def _keep_caches(folder: Path) -> None:
    """Let inductor and Triton find in `folder` what an earlier start compiled."""
    if " " in str(folder):
        folder.mkdir(parents=True, exist_ok=True)
        link = Path(mkdtemp(dir=_links.name)) / "compiled"
        link.symlink_to(folder)
        folder = link
    for name in ("torchinductor", "triton"):
        os.environ[f"{name.upper()}_CACHE_DIR"] = str(folder / name)  # importing inductor has set a folder in /tmp


class ThreadCompiler:
    """Compiles a runner's buckets in a thread. Belongs to the model thread."""

    def __init__(
        self, runner: Runner, compiled: Callable[..., Code] = compiled, record: Callable[..., Code] | None = None
    ) -> None:
        self._runner, self._compiled, self._record = runner, compiled, record
        self.wanted = buckets(runner)
        self.failed = 0  # buckets that stay eager
        self.uncompiled: set[Bucket] = set()  # buckets that are recorded as they are
        self._unrecorded = list(self.wanted) if record else []
        self._ready: queue.SimpleQueue[tuple[Bucket, Code]] = queue.SimpleQueue()
        self._cxx = str(config.cpp.cxx[1])
        self._start_by = time.monotonic() + _LET_FIRST_ANSWER
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._compile_all, name="compile", daemon=True)

    def poll(self, idle: bool) -> tuple[Bucket, Code] | None:
        """Code that has become available since the last call, or None. Takes its time only when `idle`."""
        if self._unrecorded:
            bucket = self._unrecorded.pop(0)
            self.uncompiled.add(bucket)
            return self._recorded(bucket, code_of(self._runner, bucket)[0])
        if self._thread.ident is None and (idle or time.monotonic() > self._start_by):
            self._thread.start()
        if self._ready.empty() or (self._record and self._thread.is_alive()):  # a GPU is tuned for, or recorded on
            return None
        bucket, code = self._ready.get()
        self.uncompiled.discard(bucket)
        return self._recorded(bucket, code)

    def close(self) -> None:
        """Waits for the bucket at hand: the model's memory is not free before."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _compile_all(self) -> None:
        usual, begin = sys.getswitchinterval(), time.monotonic()
        sys.setswitchinterval(_TURN)
        _log.info("compiling %d pieces of the model, which is served meanwhile", len(self.wanted))
        try:
            for bucket in self.wanted:
                if self._closed.is_set():
                    return
                with torch.inference_mode():
                    self._ready.put((bucket, self._compiled(self._runner, bucket)))
            _log.info("compiled in %.0f s", time.monotonic() - begin)
        except Exception as error:  # compilers fail in many ways, and what was served before serves on
            self.failed = len(self.wanted) - self.wanted.index(bucket)  # this one and those after it
            hint = "" if shutil.which(self._cxx) else "no C++ compiler (apt install g++): "
            _log.warning("torch.compile failed, serving without it: %s%s", hint, _in_one_line(error))
        finally:
            sys.setswitchinterval(usual)

    def _recorded(self, bucket: Bucket, code: Code) -> tuple[Bucket, Code]:
        """`code` recorded; or as it is where that fails, for it serves all the same."""
        if self._record:
            try:
                return bucket, self._record(code, code_of(self._runner, bucket)[1])
            except Exception as error:
                self._record = None
                _log.warning("steps cannot be recorded as CUDA graphs, several times slower: %s", _in_one_line(error))
        return bucket, code


def record(pool: object, step: Code, arguments: tuple[object, ...]) -> Code:
    """`step` as a CUDA graph over the very tensors of `arguments`, whatever it is called with later.

    Recording runs the step on the rows as they are: what that writes, the next step writes again. What it returns is
    overwritten by the next call of any step of `pool`, whose memory they share.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose their kernels in the first runs, and Triton tunes its own
                step(*arguments)
    finally:
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        results = step(*arguments)

    def replay(*_: object) -> object:
        graph.replay()
        return results

    return replay


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
