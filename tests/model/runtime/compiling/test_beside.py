"""What CUDA needs, as far as a CPU can show it: compiling in a thread, steps handed out recorded."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from model.runtime import ahead
from model.runtime.ahead import Beside
from model.runtime.compile import BackgroundCompiler
from model.runtime.graphs import GraphCompiler
from model.runtime.runner import Bucket, CompileState, Runner
from model.runtime.step import Step
from settings import Settings
from tests.model.runtime.compiling.loading import GREEDY, adopt_until, beside, load
from tests.model.runtime.test_runner import PROMPTS, run, runner, start

pytestmark = [
    pytest.mark.timeout(400),  # half a minute a bucket, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles or unpickles
]
BUCKETS = [Bucket(1, 2), Bucket(4, 2)]


def in_a_thread(engine: Runner, compiler: BackgroundCompiler) -> None:
    """Let `compiler` work as it does on CUDA."""
    compiler._start = partial(Beside, engine, compiler._missing(), compiler._folder)
    engine.compiler = compiler


def fail(*_: object) -> None:
    raise RuntimeError("injected:\nnothing compiles")


def test_a_thread_compiles_while_the_engine_serves(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    engine, compiler = beside(prepared, tmp_path)
    eager = load(*prepared)
    in_a_thread(engine, compiler)
    usual = sys.getswitchinterval()
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY)
    assert not engine.adopt(idle=True) and compiler._job is not None
    served = 0
    while compiler._job.failure() is None:
        adopted = engine.adopt(idle=True)
        assert not adopted or compiler._job.failure()  # else it would have waited for PyTorch's lock
        if served < 50:  # more than fit into a slot's context would follow
            assert run(engine, [0, 3], 1) == run(eager, [0, 3], 1)
            served += 1
    assert served > 1 and sys.getswitchinterval() == usual
    adopt_until(engine, lambda: engine.details()["compiled"] == "2/2")
    for active in ([0], [0, 2], [0], [1], [0, 1, 2, 3], [2], [3, 0]):
        assert run(engine, active, 3) == run(eager, active, 3)


def test_closing_waits_for_the_bucket_at_hand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Bucket] = []

    def one_at_a_time(engine: Runner, wanted: list[Bucket], folder: Path) -> None:
        for bucket in wanted:
            compiled.append(bucket)
            assert job._ended.wait(60)  # close() comes meanwhile

    monkeypatch.setattr(ahead, "compile_ahead", one_at_a_time)
    job = Beside(runner(), BUCKETS, tmp_path)
    job.close()
    assert compiled == BUCKETS[:1] and job.failure() is not None


def test_a_thread_that_fails_says_why(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ahead, "compile_ahead", fail)
    engine, compiler = beside(prepared, tmp_path)
    in_a_thread(engine, compiler)
    adopt_until(engine, lambda: engine.compile_state() == (0, 2))
    assert "injected: nothing compiles" in caplog.text
    start(engine, 0, PROMPTS[0], GREEDY)
    assert len(run(engine, [0], 2)[0]) == 2


class Ready:
    """A compiler that has one step ready."""

    def __init__(self, step: Step) -> None:
        self.steps = [(BUCKETS[0], step)]

    def poll(self, idle: bool) -> tuple[Bucket, Step] | None:
        return self.steps.pop() if self.steps else None

    def state(self) -> CompileState:
        return CompileState(2, 0)

    def close(self) -> None:
        self.steps.clear()


def test_every_bucket_is_recorded_as_it_is_and_then_compiled() -> None:
    engine, eager = runner(), runner()
    recorded: list[Step] = []

    def record(step: Step, arguments: tuple[object, ...]) -> Step:
        with torch.inference_mode():
            step(*arguments)  # as a recording does, on rows that are in use
        recorded.append(step)
        return lambda *_: step(*arguments)

    compiled = engine.step_over(2)
    engine.compiler = GraphCompiler(engine, Ready(compiled), BUCKETS, record)
    for slot, prompt in enumerate(PROMPTS[2:]):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY)
    seen = []
    for adopted in (True, True, True, False):
        assert run(engine, [0, 1], 3) == run(eager, [0, 1], 3)
        assert engine.adopt(idle=False) == adopted
        seen.append(engine.details()["compiled"])
    assert run(engine, [0, 1], 3) == run(eager, [0, 1], 3) and run(engine, [0], 3) == run(eager, [0], 3)
    assert seen == ["0/2", "0/2", "1/2", "1/2"] and recorded[2] is compiled


def test_steps_that_cannot_be_recorded_serve_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    engine, eager = runner(), runner()
    engine.compiler = GraphCompiler(engine, Ready(engine.step_over(2)), BUCKETS, fail)
    while engine.adopt(idle=True):
        pass
    for each in (engine, eager):
        start(each, 0, PROMPTS[0], GREEDY)
    assert run(engine, [0], 4) == run(eager, [0], 4) and engine.details()["compiled"] == "1/2"
    assert caplog.text.count("cannot be recorded") == 1
