"""torch.compile beside the engine: a thread compiles decode steps, which the model thread takes over one by one.

On CUDA steps are recorded as CUDA graphs, too: as they are within seconds, then what was compiled. How fast a step is
changes, never what it computes. A later start finds what inductor made in DATA_DIR. On a CPU nothing is compiled: the
layers are C++ already, and around them torch.compile saved nothing (one row took 10.9 to 11.8 ms with it, 10.3 to 11.4
without).
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from model.runtime.runner import Bucket, Runner, Step, make_step
from settings import Settings

_log = logging.getLogger(__name__)

# Seconds that the first answers of all have the processor to themselves before compiling begins, unless idle earlier.
_LET_FIRST_ANSWER = 30.0
# Seconds after which a compiling thread lets others run, Python's own is 0.005: a token passes through several threads,
# and three naps of 1 ms took 16 to 18 ms (p95) beside a compiler, 7 so. Compiling took as long.
_TURN = 0.0005


def buckets(runner: Runner) -> list[Bucket]:
    """What is worth compiling, the most useful first: one user, everybody, guesses, then what lies between."""
    slots, few = runner.slots, [1, runner.slots, 8, 4, 2]
    narrow = [Bucket(tokens, 1) for tokens in dict.fromkeys(min(tokens, slots) for tokens in few)]
    wide = [Bucket(tokens, tokens) for tokens in (1 + runner.guesses, runner.step_tokens)] if runner.guesses else []
    return [*narrow[:2], *dict.fromkeys(wide), *narrow[2:]]


def compiled(runner: Runner, bucket: Bucket) -> Step:
    """The step of a bucket, compiled; nothing is computed meanwhile."""
    # The caller fixes every shape, and checking guards costs 2.5 ms a step (PyTorch 2.13, 30 layers). A fresh
    # dictionary each time: torch.compile empties it.
    options = dict(guard_filter_fn=torch.compiler.skip_all_guards_unsafe, size_asserts=False, alignment_asserts=False)
    step = torch.compile(make_step(bucket.longest), backend=_inductor, fullgraph=True, dynamic=False, options=options)
    ready = step.aot_compile((runner.arguments(runner.padded(bucket).to(runner.device)), {}))
    ready.disable_guard_check()
    return ready


def _inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], options: dict[str, object]) -> Step:
    """Inductor, without the random name that PyTorch 2.13 gives each graph: by its key nothing would be found again."""
    from torch._inductor.compile_fx import compile_fx

    graph._backend_id = None
    return compile_fx(graph, inputs, config_patches=options)


def compiler_for(runner: Runner, settings: Settings) -> "ThreadCompiler | None":
    """Where this runner's compiled steps come from; None under COMPILE=off and on a CPU."""
    if not settings.compile or runner.device == "cpu":
        return None
    for name in ("torchinductor", "triton"):
        os.environ[f"{name.upper()}_CACHE_DIR"] = str(settings.data_dir.resolve() / "compiled" / name)
    # bitsandbytes' int8 product waits for the CPU to look for outliers, which no CUDA graph can hold.
    recorded = settings.quantization != "int8"
    return ThreadCompiler(runner, record=partial(record, torch.cuda.graph_pool_handle()) if recorded else None)


class ThreadCompiler:
    """Compiles a runner's buckets in a thread. Belongs to the model thread."""

    def __init__(
        self, runner: Runner, compiled: Callable[..., Step] = compiled, record: Callable[..., Step] | None = None
    ) -> None:
        self._runner, self._compiled, self._record = runner, compiled, record
        self.wanted = buckets(runner)
        self.failed = 0  # buckets that stay eager
        self.uncompiled: set[Bucket] = set()  # buckets that are recorded as they are
        self._unrecorded = list(self.wanted) if record else []
        self._ready: queue.SimpleQueue[tuple[Bucket, Step]] = queue.SimpleQueue()
        self._start_by = time.monotonic() + _LET_FIRST_ANSWER
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._compile_all, name="compile", daemon=True)

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        """A step that has become available since the last call, or None. Takes its time only when `idle`."""
        if self._unrecorded:
            bucket = self._unrecorded.pop(0)
            self.uncompiled.add(bucket)
            return self._recorded(bucket, make_step(bucket.longest))
        if self._thread.ident is None and (idle or time.monotonic() > self._start_by):
            self._thread.start()
        if self._ready.empty() or (self._record and self._thread.is_alive()):  # a GPU is tuned for, or recorded on
            return None
        bucket, step = self._ready.get()
        self.uncompiled.discard(bucket)
        return self._recorded(bucket, step)

    def close(self) -> None:
        """Waits for the bucket at hand: the model's memory is not free before."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _compile_all(self) -> None:
        usual, begin = sys.getswitchinterval(), time.monotonic()
        sys.setswitchinterval(_TURN)
        _log.info("compiling %d decode steps; requests are served meanwhile", len(self.wanted))
        try:
            for bucket in self.wanted:
                if self._closed.is_set():
                    return
                with torch.inference_mode():
                    self._ready.put((bucket, self._compiled(self._runner, bucket)))
            _log.info("compiled in %.0f s", time.monotonic() - begin)
        except Exception as error:  # compilers fail in many ways, and what was served before serves on
            self.failed = len(self.wanted) - self.wanted.index(bucket)  # this one and those after it
            _log.warning("torch.compile failed, serving without it: %s", _in_one_line(error))
        finally:
            sys.setswitchinterval(usual)

    def _recorded(self, bucket: Bucket, step: Step) -> tuple[Bucket, Step]:
        """`step` recorded; or as it is where that fails, for it serves all the same."""
        if self._record:
            try:
                arguments = self._runner.arguments(self._runner.fill(bucket))
                return bucket, self._record(step, arguments)
            except Exception as error:
                self._record = None
                _log.warning("steps cannot be recorded as CUDA graphs, several times slower: %s", _in_one_line(error))
        return bucket, step


def record(pool: object, step: Step, arguments: tuple[object, ...]) -> Step:
    """`step` as a CUDA graph over the very tensors of `arguments`, whatever it is called with later.

    Recording runs the step twice, so nobody's tokens should be filled in. What it returns is overwritten by the next
    call of any step of `pool`, whose memory they share.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # around the recording too, which leaves its stream only where it ends well
            for _ in range(2):  # libraries choose their kernels in the first runs, and Triton tunes its own
                step(*arguments)
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                results = step(*arguments)
    finally:
        torch.cuda.current_stream().wait_stream(side)

    def replay(*_: object) -> object:
        graph.replay()
        return results

    return replay


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
