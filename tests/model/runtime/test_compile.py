"""Compiling beside the engine: adopted when ready, found again, given up when it fails; and recorded as on CUDA."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.runtime import compile as compiling
from model.runtime.compile import ThreadCompiler, buckets, compiler_for
from model.runtime.runner import Bucket, Runner, Step, make_step
from model.types import Sampling
from settings import Settings
from tests.model.runtime.test_runner import PROMPTS, generated, run, runner, start

GREEDY = Sampling(temperature=0)

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.timeout(400),  # half a minute, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
]


@pytest.fixture(autouse=True)
def inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 0.0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "inductor"


def load_all(engine: Runner) -> None:
    """Take over all that is compiled."""
    wanted = len(compiling.buckets(engine))
    end = time.monotonic() + 300
    while sum(engine.compile_state()) < wanted or (engine.compiler and engine.compiler.uncompiled):
        if not engine.load_compiled(idle=True):
            assert time.monotonic() < end, "nothing was compiled"
            time.sleep(0.01)


def fail(*_: object) -> Step:
    raise RuntimeError("injected:\nnothing compiles")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_compiled_steps_answer_like_eager_ones(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inductor on this CPU, which the service compiles nothing for, what a GPU would run."""
    monkeypatch.setattr(compiling, "buckets", lambda _: [Bucket(4, 1)])
    engine, eager = runner(architecture), runner(architecture)
    engine.compiler = ThreadCompiler(engine)
    load_all(engine)
    assert engine.details()["compiled"] == "1/1"
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY)
    for active in ([0], [0, 1, 2, 3], [3], [0, 2]):
        assert run(engine, active, 4) == run(eager, active, 4)
    assert engine.compile_state() == (1, 0)  # it was not given up on the way
    engine.close()


def test_the_engine_serves_while_a_thread_compiles() -> None:
    go = threading.Event()

    def compiled(engine: Runner, bucket: Bucket) -> Step:
        assert go.wait(60)
        return make_step(bucket.pages)

    engine, usual = runner(slots=4, context=512), sys.getswitchinterval()
    engine.compiler = ThreadCompiler(engine, compiled)
    start(engine, 0, PROMPTS[0], GREEDY)
    assert not engine.load_compiled(idle=True)
    assert run(engine, [0], 4) == [generated("LlamaForCausalLM", PROMPTS[0], 4)]
    go.set()
    load_all(engine)
    assert engine.compile_state() == (2, 0) and set(engine.compiled) == {Bucket(1, 2), Bucket(4, 2)}
    engine.compiler.close()
    assert sys.getswitchinterval() == usual


def test_the_first_answers_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 1000.0)
    begun = threading.Event()
    engine = runner(slots=4, context=512)
    compiler = ThreadCompiler(engine, lambda *_: begun.set() or fail())
    compiler.poll(idle=False)
    assert not begun.is_set()
    compiler.poll(idle=True)
    assert begun.wait(60)


def test_closing_waits_for_the_bucket_at_hand_alone() -> None:
    begun: list[Bucket] = []

    def compiled(engine: Runner, bucket: Bucket) -> Step:
        begun.append(bucket)
        assert compiler._closed.wait(60)  # close() comes meanwhile
        return fail

    compiler = ThreadCompiler(runner(slots=4, context=512), compiled)
    compiler.poll(idle=True)
    compiler.close()
    assert begun == [Bucket(1, 2)]


@pytest.mark.promise("P6", injected="a compiler that fails", counted="the same greedy text")
def test_when_compiling_fails_eager_serves_and_says_why(
    caplog: pytest.LogCaptureFixture, counted: Callable[..., None]
) -> None:
    engine = runner(slots=4, context=512)
    engine.compiler = ThreadCompiler(engine, fail)
    load_all(engine)
    start(engine, 0, PROMPTS[0], GREEDY)
    (text,) = run(engine, [0], 4)
    assert text == generated("LlamaForCausalLM", PROMPTS[0], 4)
    assert engine.details()["compiled"] == "0/2" and engine.compile_state() == (0, 2)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    counted(tokens=len(text), fallbacks=engine.compile_state()[1], lines_logged=len(said))
    assert said == ["torch.compile failed, serving without it: injected: nothing compiles"]


def test_on_a_gpu_steps_are_compiled_unless_that_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine, settings = runner(), Settings(data_dir=tmp_path, quantization="int8")
    assert compiler_for(engine, settings) is None
    engine.device = "cuda"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    found = compiler_for(engine, settings)
    assert found and len(found.wanted) == len(compiling.buckets(engine))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(
        tmp_path / "compiled" / "torchinductor"
    )  # kept for a later start
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "compiled" / "triton")
    assert compiler_for(engine, settings.model_copy(update={"compile": False})) is None


def test_steps_use_the_smallest_compiled_bucket_that_covers_them() -> None:
    engine = runner()
    used: list[Bucket] = []

    def noted(bucket: Bucket) -> Step:
        def step(*arguments: object) -> object:
            used.append(bucket)
            return make_step(bucket.pages)(*arguments)

        return step

    engine.compiled = {bucket: noted(bucket) for bucket in (Bucket(4, 2), Bucket(1, 2), Bucket(4, 1))}
    for slot, prompt in ((0, PROMPTS[0]), (2, PROMPTS[2])):
        start(engine, slot, prompt, GREEDY)
    for active in ([0], [2], [0, 2]):
        engine.step(active)
    assert used == [Bucket(1, 2), Bucket(4, 1), Bucket(4, 1)]


@pytest.mark.promise("P6", injected="compiled code that raises at its first call", counted="the same greedy text")
def test_compiled_code_that_fails_is_given_up_and_the_text_goes_on(counted: Callable[..., None]) -> None:
    engine = runner()
    engine.compiled = {Bucket(4, 4): fail}
    start(engine, 0, PROMPTS[0], GREEDY)
    (text,) = run(engine, [0], 8)
    counted(tokens=len(text), fallbacks=engine.compile_state()[1])
    assert text == generated("LlamaForCausalLM", PROMPTS[0], 8)
    assert engine.compile_state() == (0, 1)


def test_rows_that_fail_eagerly_too_cost_nobody_the_compiled_code() -> None:
    engine = runner()
    engine.compiled = {Bucket(4, 4): fail}
    start(engine, 0, PROMPTS[0], GREEDY)
    engine.activate(0, 10_000, 2)  # no such token: eager raises as well
    with pytest.raises(IndexError):
        engine.step([0])
    assert engine.compile_state() == (1, 0)


@pytest.mark.parametrize(("slots", "context"), [(1, 256), (4, 512), (16, 8192), (64, 256)])
def test_few_buckets_the_single_user_first(slots: int, context: int) -> None:
    wanted = buckets(runner(slots=slots, context=context))
    assert len(wanted) <= 6 and wanted[0].rows == 1 and max(bucket.rows for bucket in wanted) == slots
    assert len(set(wanted)) == len(wanted) and all(bucket.pages <= context // 256 for bucket in wanted)


def test_steps_are_recorded_as_they_are_and_again_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a recorder that only notes."""
    engine, eager, recorded = runner(), runner(), []
    wanted = [Bucket(1, 4), Bucket(4, 4)]
    monkeypatch.setattr(compiling, "buckets", lambda _: wanted)

    def record(code: Step, arguments: tuple[object, ...]) -> Step:
        recorded.append(code)
        first = code(*arguments)
        assert len(first) == 3
        return lambda *_: code(*arguments)  # whatever it is called with

    def compiled(_: Runner, bucket: Bucket) -> Step:
        return make_step(bucket.pages)

    engine.compiler = ThreadCompiler(engine, compiled, record)
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY)
    for _ in wanted:
        assert engine.load_compiled(idle=False) and run(engine, [0, 3], 2) == run(eager, [0, 3], 2)
    assert engine.details()["compiled"] == "0/2" and len(recorded) == 2
    load_all(engine)
    assert engine.details()["compiled"] == "2/2" and len(recorded) == 4
    assert run(engine, [0, 1, 2, 3], 3) == run(eager, [0, 1, 2, 3], 3) and run(engine, [0], 3) == run(eager, [0], 3)
    assert engine.compiler.wanted == wanted and not engine.compiler.failed and not engine.compiler.uncompiled


def test_steps_that_cannot_be_recorded_serve_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    engine, eager = runner(), runner()
    engine.compiler = ThreadCompiler(engine, lambda _, bucket: make_step(bucket.pages), fail)
    load_all(engine)
    for each in (engine, eager):
        start(each, 0, PROMPTS[0], GREEDY)
    assert run(engine, [0], 4) == run(eager, [0], 4)
    assert caplog.text.count("cannot be recorded") == 1


def test_the_recording_stream_is_left_when_warming_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            waited.append(other)

    side, main = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.inference_mode())
    with pytest.raises(RuntimeError, match="injected"):
        compiling.record(None, fail, ())
    assert waited == [main, side]
