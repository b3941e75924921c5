"""This engine's bare step, compiled, through model.runtime.runner.Runner: neither HTTP, queue nor text.

    python -m benchmarks.ours PATIENCE

PATIENCE: seconds to wait for what is not compiled yet (half a minute the first time with a new version of the code);
with 0 nothing is compiled. Linear backend, slots and context are those that the service would choose.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.worker import Turn, prompt, serve
from model.engine.blocks import blocks_for
from model.engine.scheduler import Work
from model.runtime.build import build
from model.runtime.compile import compiler_for
from model.runtime.linear import PackedLinear
from model.runtime.runner import Runner
from model.types import Sampling
from model.weights.catalogue import find
from model.weights.loader import prepare
from settings import Settings

WARM = 4  # steps before the clock runs


def load(settings: Settings, patience: float) -> Runner:
    """The runner as the service makes it, with its compiled steps adopted; nothing runs beside it any more."""
    checkpoint = prepare(find(settings), settings)
    runner = build(checkpoint, settings, lambda stage, percent: None)
    runner.compiler = compiler_for(runner, settings)
    adopt_all(runner, patience)
    if runner.compiler:
        runner.compiler.close()
    return runner


def adopt_all(runner: Runner, patience: float) -> None:
    """Take over compiled steps until none is missing, or `patience` seconds went by without a new one."""
    end, parent = time.monotonic() + patience, os.getppid()
    while True:
        while runner.load_compiled(idle=patience > 0):
            end = time.monotonic() + patience
        done, _, wanted = str(runner.details()["compiled"]).partition("/")
        if int(done) + int(runner.details()["compile_failures"]) >= int(wanted) or time.monotonic() >= end:
            return
        if os.getppid() != parent:
            sys.exit("the benchmark is gone")
        time.sleep(0.5)


def runs(runner: Runner, rows: int, tokens: int) -> list[list[int]]:
    """The blocks of each row, for its first `tokens` tokens. They begin where its share of all does.

    Raises ValueError where `tokens` are more than that.
    """
    each, wanted = runner.blocks // rows, blocks_for(tokens)
    if wanted > each:
        raise ValueError(f"{rows} rows of {tokens} tokens do not fit into {runner.blocks} blocks of KV")
    return [list(range(1 + row * each, 1 + row * each + wanted)) for row in range(rows)]


def fill(runner: Runner, row: int, ids: Sequence[int], blocks: list[int]) -> Work:
    """Compute a prompt but for its last token, which the next step begins with."""
    runner.begin(row, Sampling(temperature=0), 0, ids)
    for start in range(0, len(ids) - 1, runner.chunk_tokens):
        runner.prefill([Work(row, ids[start : min(start + runner.chunk_tokens, len(ids) - 1)], start, blocks)])
    return Work(row, ids[-1:], len(ids) - 1, blocks)


def step(runner: Runner, work: list[Work]) -> list[Work]:
    """Compute a token for each row: what the next step reads. Raises ArithmeticError where numbers are not finite."""
    following = []
    for one, (token,) in zip(work, runner.step(work), strict=True):
        if token is None:
            raise ArithmeticError("numbers were not finite")
        following.append(one._replace(tokens=[token], position=one.position + 1))
    return following


class Ours:
    """The turns of one runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._rows, self._held = 0, dict[int, int]()  # of so many rows each one's tokens whose KV is computed

    def facts(self) -> Turn:
        """What /readyz tells, and the bytes of weights that a step reads."""
        return {"version": torch.__version__, **self.runner.details(), "weights": self._weights()}

    def decode(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: of each step over `rows` rows that hold `context` tokens at first; cpu: of all of them."""
        blocks = runs(self.runner, rows, context + WARM + steps)
        if self._rows != rows:  # their blocks are others
            self._rows, self._held = rows, {}
        work = [self._hold(row, context, own) for row, own in enumerate(blocks)]
        for _ in range(WARM):
            work = step(self.runner, work)
        cpu, times = time.process_time(), [time.perf_counter()]
        for _ in range(steps):
            work = step(self.runner, work)
            times.append(time.perf_counter())
        cpu = time.process_time() - cpu
        return {"seconds": [after - before for before, after in itertools.pairwise(times)], "cpu": cpu}

    def prefill(self, tokens: int) -> Turn:
        """seconds: from a prompt of `tokens` to the first new token; cpu: the same."""
        return self.generate(1, tokens, 1)

    def generate(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: for the same work as `rows` requests of `context` prompt tokens and `steps` new ones; cpu."""
        self._held.clear()
        begin, cpu, blocks = time.perf_counter(), time.process_time(), runs(self.runner, rows, context + steps)
        work = [fill(self.runner, row, prompt(row, context), own) for row, own in enumerate(blocks)]
        for _ in range(steps):
            work = step(self.runner, work)
        return {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}

    def bandwidth(self) -> Turn:
        """bytes: read from memory in a second, by all threads, the best of several."""
        field = torch.ones(128 << 20, dtype=torch.float32)
        best = float("inf")
        for _ in range(8):
            begin = time.perf_counter()
            field.sum()
            best = min(best, time.perf_counter() - begin)
        return {"bytes": field.numel() * 4 / best}

    def _hold(self, row: int, context: int, blocks: list[int]) -> Work:
        """Let a row hold `context` tokens; computed once, since later turns write only behind them."""
        if self._held.get(row, -1) < context:
            self._held[row] = context
            return fill(self.runner, row, [*prompt(row, context), 1], blocks)
        return Work(row, [1], context, blocks)

    def _weights(self) -> float:
        """Bytes of the matrices, with their scales."""
        if self.runner.plan.linear_backend == "packed":
            return float(sum(buffer.nbytes for layer in self.runner.model.modules()
                             if isinstance(layer, PackedLinear) for buffer in layer.buffers()))  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.runner.model.config.to_dict()))
        count = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
        return float(count * self.runner.plan.dtype.itemsize)


def main() -> None:
    ours = Ours(load(Settings.from_environment(), float(sys.argv[1])))
    serve({name: getattr(ours, name) for name in ("facts", "decode", "prefill", "generate", "bandwidth")})


if __name__ == "__main__":
    main()
