"""Compiling beside the engine: adopted when ready, found again, given up when it fails; and recorded as on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from benchmarks.start import spies
from model.runtime import compile as compiling
from model.runtime.compile import ThreadCompiler, buckets, compiler_for
from model.runtime.linear import Plan
from model.runtime.runner import MANY, ONE, Bucket, Code, Runner
from model.types import Sampling
from settings import Settings
from tests.model.runtime.test_runner import DENSE, KERNELS, PACKED, PROMPTS, generated, run, runner, start

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
    wanted = len(buckets(engine))
    end = time.monotonic() + 300
    while sum(engine.compile_state()) < wanted or (engine.compiler and engine.compiler.uncompiled):
        if not engine.load_compiled(idle=True):
            assert time.monotonic() < end, "nothing was compiled"
            time.sleep(0.01)


def fail(*_: object) -> Code:
    raise RuntimeError("injected:\nnothing compiles")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("plan", [pytest.param(KERNELS, id="dense"), pytest.param(PACKED, id="packed")])
def test_compiled_layers_answer_like_eager_ones(architecture: str, plan: Plan, tmp_path: Path) -> None:
    """Prompts in chunks of any size, and batches of any number of rows, by two pieces of code."""
    engine, eager = runner(architecture, plan=plan), runner(architecture, plan=plan)
    engine.compiler = compiler_for(engine, Settings(data_dir=tmp_path))
    load_all(engine)
    assert engine.details()["compiled"] == "2/2"
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY, chunk=7 + 50 * slot)
    for active in ([0], [0, 1, 2, 3], [3], [0, 2]):
        assert run(engine, active, 4) == run(eager, active, 4)
    assert engine.compile_state() == (2, 0)  # none was given up on the way
    engine.close()


def test_the_engine_serves_while_a_thread_compiles() -> None:
    go = threading.Event()

    def compiled(engine: Runner, bucket: Bucket) -> Code:
        assert go.wait(60)
        return compiling.code_of(engine, bucket)[0]

    engine, usual = runner(plan=KERNELS), sys.getswitchinterval()
    engine.compiler = ThreadCompiler(engine, compiled)
    start(engine, 0, PROMPTS[0], GREEDY)
    assert not engine.load_compiled(idle=True)
    assert run(engine, [0], 4) == [generated("LlamaForCausalLM", PROMPTS[0], 4)]
    go.set()
    load_all(engine)
    assert engine.compile_state() == (2, 0) and set(engine.compiled) == {ONE, MANY}
    engine.compiler.close()
    assert sys.getswitchinterval() == usual


def test_the_first_answers_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 1000.0)
    begun = threading.Event()
    engine = runner(plan=KERNELS)
    compiler = ThreadCompiler(engine, lambda *_: begun.set() or fail())
    compiler.poll(idle=False)
    assert not begun.is_set()
    compiler.poll(idle=True)
    assert begun.wait(60)


def test_closing_waits_for_the_bucket_at_hand_alone() -> None:
    begun: list[Bucket] = []

    def compiled(engine: Runner, bucket: Bucket) -> Code:
        begun.append(bucket)
        assert compiler._closed.wait(60)  # close() comes meanwhile
        return fail

    compiler = ThreadCompiler(runner(plan=KERNELS), compiled)
    compiler.poll(idle=True)
    compiler.close()
    assert begun == [ONE]


def test_what_was_compiled_is_found_by_a_later_start(inductor_cache: Path, tmp_path: Path) -> None:
    """In a folder with a space in its name, and without running a compiler the second time."""
    code = (
        "import sys, torch; from pathlib import Path; from model.kernels import native; from settings import Settings;"
        "from model.runtime.compile import compiler_for, compiled, buckets;"
        "from tests.model.runtime.test_runner import PACKED, runner; assert native.load(Path(sys.argv[1]));"
        "engine = runner('Qwen3ForCausalLM', plan=PACKED);"
        "compiler_for(engine, Settings(data_dir=Path(sys.argv[2])));"
        "[compiled(engine, bucket) for bucket in buckets(engine)]"
    )
    data, log = tmp_path / "my data", tmp_path / "compilers"
    kernels = Path(__file__).parents[3] / "data" / "compiled"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    path = spies(tmp_path / "bin", log)
    for ran_a_compiler in (True, False):
        command = [sys.executable, "-c", code, kernels, data]
        done = subprocess.run(command, env=environment | {"PATH": path}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert log.exists() == ran_a_compiler
        log.unlink(missing_ok=True)


@pytest.mark.promise("P6", injected="a compiler that fails", counted="the same greedy text")
def test_when_compiling_fails_eager_serves_and_says_why(
    caplog: pytest.LogCaptureFixture, counted: Callable[..., None]
) -> None:
    engine = runner(plan=KERNELS)
    engine.compiler = ThreadCompiler(engine, fail)
    load_all(engine)
    start(engine, 0, PROMPTS[0], GREEDY)
    (text,) = run(engine, [0], 4)
    assert text == generated("LlamaForCausalLM", PROMPTS[0], 4)
    assert engine.details()["compiled"] == "0/2" and engine.compile_state() == (0, 2)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    counted(tokens=len(text), fallbacks=engine.compile_state()[1], lines_logged=len(said))
    assert said == ["torch.compile failed, serving without it: injected: nothing compiles"]


def test_without_a_compiler_the_log_names_what_to_install(caplog: pytest.LogCaptureFixture) -> None:
    engine = runner(plan=KERNELS)
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        engine.compiler = ThreadCompiler(engine, fail)
        load_all(engine)
    assert "apt install g++" in caplog.text


def test_nothing_is_compiled_where_it_is_off_or_cannot_be() -> None:
    assert compiler_for(runner(plan=KERNELS), Settings(compile=False)) is None
    assert compiler_for(runner(plan=DENSE), Settings()) is None  # no kernels: there is no C++ compiler


def test_steps_use_the_smallest_compiled_bucket_that_covers_them() -> None:
    engine = runner()
    used: list[Bucket] = []

    def noted(bucket: Bucket) -> Code:
        def step(*arguments: object) -> object:
            used.append(bucket)
            return compiling.code_of(engine, bucket)[0](*arguments)

        return step

    engine.compiled = {bucket: noted(bucket) for bucket in (Bucket(4, 2), Bucket(1, 2), Bucket(4, 1))}
    for slot, prompt in ((0, PROMPTS[0]), (2, PROMPTS[2])):
        start(engine, slot, prompt, GREEDY)
    for active in ([0], [2], [0, 2]):
        engine.step(active)
    assert used == [Bucket(1, 2), Bucket(4, 1), Bucket(4, 1)]


@pytest.mark.promise("P6", injected="compiled code that raises at its first call", counted="the same greedy text")
@pytest.mark.parametrize(("plan", "bucket"), [(DENSE, Bucket(4, 4)), (KERNELS, ONE)])
def test_compiled_code_that_fails_is_given_up_and_the_text_goes_on(
    plan: Plan, bucket: Bucket, counted: Callable[..., None]
) -> None:
    engine = runner(plan=plan)
    engine.compiled = {bucket: fail}
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
    assert buckets(runner(slots=slots, context=context, plan=KERNELS)) == [ONE, MANY]


def test_steps_are_recorded_as_they_are_and_again_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a recorder that only notes."""
    engine, eager, recorded = runner(), runner(), []
    wanted = [Bucket(1, 4), Bucket(4, 4)]
    monkeypatch.setattr(compiling, "buckets", lambda _: wanted)

    def record(code: Code, arguments: tuple[object, ...]) -> Code:
        recorded.append(code)
        first = code(*arguments)
        assert len(first) == 3
        return lambda *_: code(*arguments)  # whatever it is called with

    def compiled(_: Runner, bucket: Bucket) -> Code:
        return compiling.code_of(engine, bucket)[0]

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
    engine.compiler = ThreadCompiler(engine, lambda _, bucket: compiling.code_of(engine, bucket)[0], fail)
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
