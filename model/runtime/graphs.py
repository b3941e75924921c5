"""Decode steps as CUDA graphs: one launch instead of a thousand, which is most of a step's time on a GPU.

Compiles nothing: what is recorded is the step as it is at first, and what torch.compile made of it when that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from model.runtime.ahead import arguments_of, in_one_line
from model.runtime.runner import Bucket, Compiler, CompileState, Runner
from model.runtime.step import Step

_log = logging.getLogger(__name__)

_WARM = 2  # runs before recording, in which libraries choose their kernels and Triton tunes its own


class GraphCompiler:
    """Hands out recorded steps: all buckets as they are within seconds, then whatever `compiler` has ready.

    A recording runs the step, on the rows as they are: what that writes, the next step writes again.
    """

    def __init__(
        self,
        engine: Runner,
        compiler: Compiler,
        wanted: Sequence[Bucket],
        record: Callable[[Step, tuple[object, ...]], Step] | None = None,
    ) -> None:
        self._engine, self._compiler = engine, compiler
        self._left = list(wanted)
        self._as_is: set[Bucket] = set()
        self._record: Callable[[Step, tuple[object, ...]], Step] | None = record or Recorder().record

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        if self._left:
            bucket = self._left.pop(0)
            self._as_is.add(bucket)
            return self._recorded(bucket, self._engine.step_over(bucket.pages))
        if found := self._compiler.poll(idle):
            self._as_is.discard(found[0])
            return self._recorded(*found)
        return None

    def state(self) -> CompileState:
        state = self._compiler.state()
        return CompileState(state.wanted, state.failed, len(self._as_is))

    def close(self) -> None:
        self._compiler.close()

    def _recorded(self, bucket: Bucket, step: Step) -> tuple[Bucket, Step]:
        """`step` recorded; or as it is where that fails, for it serves all the same."""
        if self._record is not None:
            try:
                return bucket, self._record(step, arguments_of(self._engine, bucket))
            except Exception as error:
                self._record = None
                _log.warning(
                    "steps cannot be recorded as CUDA graphs, serving several times slower: %s", in_one_line(error)
                )
        return bucket, step


class Recorder:
    """Records steps of one engine, whose graphs share their memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Step, arguments: tuple[object, ...]) -> Step:
        """`step` as a graph over the very tensors of `arguments`, whatever it is called with later.

        What it returns is overwritten by the next call of any recorded step.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                step(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            results = step(*arguments)

        def replay(*_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            graph.replay()
            return results

        return replay
