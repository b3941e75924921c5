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
from model.runtime.build import build
from model.runtime.compile import compiler_for
from model.runtime.linear import PackedLinear
from model.runtime.runner import Runner
from model.types import Sampling
from model.weights.catalogue import find
from model.weights.loader import prepare
from settings import Settings

WARM = 4  # steps before the clock runs
CHUNK = 512  # prompt tokens at once, as the service computes them for a single user


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


def fill(runner: Runner, slot: int, ids: Sequence[int]) -> None:
    """Compute a prompt but for its last token, and let the next step begin with that."""
    runner.init_row(slot, Sampling(temperature=0), 0, ids)
    for start in range(0, len(ids) - 1, CHUNK):
        runner.prefill([(slot, ids[start : min(start + CHUNK, len(ids) - 1)], start)])
    runner.activate(slot, ids[-1], len(ids) - 1)


class Ours:
    """The turns of one runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._held: dict[int, int] = {}  # slot -> tokens of its prompt that are computed

    def facts(self) -> Turn:
        """What /readyz tells, and the bytes of weights that a step reads."""
        return {"version": torch.__version__, **self.runner.details(), "weights": self._weights()}

    def decode(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: of each step over `rows` slots that hold `context` tokens at first; cpu: of all of them."""
        for slot in range(rows):
            self._hold(slot, context)
        active = list(range(rows))
        for _ in range(WARM):
            self.runner.step(active)
        cpu, times = time.process_time(), [time.perf_counter()]
        for _ in range(steps):
            self.runner.step(active)
            times.append(time.perf_counter())
        cpu = time.process_time() - cpu
        self._rest(rows)
        return {"seconds": [after - before for before, after in itertools.pairwise(times)], "cpu": cpu}

    def prefill(self, tokens: int) -> Turn:
        """seconds: from a prompt of `tokens` to the first new token; cpu: the same."""
        self._held.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        fill(self.runner, 0, prompt(0, tokens))
        self.runner.step([0])
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        self._rest(1)
        return {"seconds": seconds, "cpu": cpu}

    def generate(self, rows: int, context: int, steps: int) -> Turn:
        """seconds: for the same work as `rows` requests of `context` prompt tokens and `steps` new ones; cpu."""
        self._held.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        for slot in range(rows):
            fill(self.runner, slot, prompt(slot, context))
        for _ in range(steps):
            self.runner.step(list(range(rows)))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        self._rest(rows)
        return {"seconds": seconds, "cpu": cpu}

    def bandwidth(self) -> Turn:
        """bytes: read from memory in a second, by all threads, the best of several."""
        field = torch.ones(128 << 20, dtype=torch.float32)
        best = float("inf")
        for _ in range(8):
            begin = time.perf_counter()
            field.sum()
            best = min(best, time.perf_counter() - begin)
        return {"bytes": field.numel() * 4 / best}

    def _hold(self, slot: int, context: int) -> None:
        """Let a slot hold `context` tokens; computed once, since later turns write only behind them."""
        if self._held.get(slot, 0) < context:
            fill(self.runner, slot, [*prompt(slot, context), 1])
            self._held[slot] = context
        self.runner.activate(slot, 1, context)

    def _rest(self, rows: int) -> None:
        for slot in range(rows):
            self.runner.deactivate(slot, self.runner.context - 1)

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
