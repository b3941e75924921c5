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
from tests.model.runtime.test_runner import PROMPTS, Text, generated, run, runner, start

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


def every_text(*engines: Runner) -> list[list[Text]]:
    """The same prompts in each engine."""
    return [[start(each, row, prompt, GREEDY) for row, prompt in enumerate(PROMPTS)] for each in engines]


def memory(engine: Runner) -> torch.Tensor:
    """A copy of all KV but that of block 0."""
    return torch.stack([*engine.kv.keys, *engine.kv.values])[:, 1:]


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM"])
def test_compiled_steps_answer_like_eager_ones(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inductor on this CPU, which the service compiles nothing for, what a GPU would run. Guesses, too."""
    monkeypatch.setattr(compiling, "buckets", lambda _: [Bucket(8, 8)])
    engine, eager = runner(architecture), runner(architecture)
    engine.compiler = ThreadCompiler(engine)
    load_all(engine)
    assert engine.details()["compiled"] == "1/1"
    texts, same = every_text(engine, eager)
    for rows in ([0], [0, 1, 2, 3], [3], [0, 2]):
        assert run(engine, [texts[row] for row in rows], 4) == run(eager, [same[row] for row in rows], 4)
        got, want = (
            each.step([*(mine[row].work() for row in rows[1:]), mine[rows[0]].work(5, 6, 7)])
            for each, mine in ((engine, texts), (eager, same))
        )
        assert got == want and len(got[-1]) == 4
    assert engine.compile_state() == (1, 0)  # it was not given up on the way
    engine.close()


def test_the_engine_serves_while_a_thread_compiles() -> None:
    go = threading.Event()

    def compiled(engine: Runner, bucket: Bucket) -> Step:
        assert go.wait(60)
        return make_step(bucket.longest)

    engine, usual = runner(slots=4, context=512), sys.getswitchinterval()
    engine.compiler = ThreadCompiler(engine, compiled)
    text, wanted = start(engine, 0, PROMPTS[0], GREEDY), buckets(engine)
    assert not engine.load_compiled(idle=True)
    assert run(engine, [text], 4) == [generated("LlamaForCausalLM", PROMPTS[0], 4)]
    go.set()
    load_all(engine)
    assert engine.compile_state() == (len(wanted), 0) and list(engine.compiled) == wanted
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
    assert begun == [Bucket(1, 1)]


@pytest.mark.promise("P6", injected="a compiler that fails", counted="the same greedy text")
def test_when_compiling_fails_eager_serves_and_says_why(
    caplog: pytest.LogCaptureFixture, counted: Callable[..., None]
) -> None:
    engine = runner(slots=4, context=512)
    engine.compiler = ThreadCompiler(engine, fail)
    load_all(engine)
    (text,) = run(engine, [start(engine, 0, PROMPTS[0], GREEDY)], 4)
    assert text == generated("LlamaForCausalLM", PROMPTS[0], 4)
    wanted = len(buckets(engine))
    assert engine.details()["compiled"] == f"0/{wanted}" and engine.compile_state() == (0, wanted)
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


def noting(used: list[Bucket], *wanted: Bucket) -> dict[Bucket, Step]:
    """Eager steps in the place of compiled ones, which note that they were called."""

    def noted(bucket: Bucket) -> Step:
        def step(*arguments: object) -> torch.Tensor:
            used.append(bucket)
            return make_step(bucket.longest)(*arguments)

        return step

    return {bucket: noted(bucket) for bucket in wanted}


def test_steps_use_the_smallest_compiled_bucket_that_covers_them() -> None:
    engine, used = runner(), list[Bucket]()
    texts = [start(engine, row, PROMPTS[row], GREEDY) for row in (0, 2)]
    one, other = (text.work() for text in texts)
    four, other_four = (text.work(1, 2, 3) for text in texts)
    engine.compiled = noting(used, Bucket(32, 32), Bucket(8, 8), Bucket(4, 1), Bucket(1, 1))
    for work in ([one], [one, other], [four], [other, four], [four, other_four], [texts[0].work(*range(11)), other]):
        assert [len(chosen) for chosen in engine.step(work)] == [len(each.tokens) for each in work]
    assert used == [Bucket(1, 1), Bucket(4, 1), *[Bucket(8, 8)] * 3, Bucket(32, 32)]
    engine.compiled = noting(used, Bucket(4, 1), Bucket(8, 2))
    engine.step([four])  # more tokens of one sequence than any bucket takes
    engine.step([one, texts[1].work(1)])
    assert used[6:] == [Bucket(8, 2)]


def test_what_fills_a_bucket_up_harms_nobody() -> None:
    """Neither a row's KV nor its rules, nor what is chosen: not even while block 0 is not finite."""
    engine, eager, used = runner(), runner(), list[Bucket]()
    engine.compiled = noting(used, Bucket(8, 1), Bucket(16, 16))
    texts, same = every_text(engine, eager)
    for tensor in (*engine.kv.keys, *engine.kv.values):
        tensor[0] = torch.nan
    for rows in ([0, 1, 2], [3], [1], [2, 0]):
        assert run(engine, [texts[row] for row in rows], 2) == run(eager, [same[row] for row in rows], 2)
    assert engine.step([texts[1].work(4, 5)]) == eager.step([same[1].work(4, 5)])
    assert used == [Bucket(8, 1)] * 8 + [Bucket(16, 16)]
    torch.testing.assert_close(memory(engine), memory(eager))
    assert torch.equal(engine.rules.seen[:-1], eager.rules.seen[:-1])


@pytest.mark.promise("P6", injected="compiled code that raises at its first call", counted="the same greedy text")
def test_compiled_code_that_fails_is_given_up_and_the_text_goes_on(counted: Callable[..., None]) -> None:
    engine = runner()
    engine.compiled = {Bucket(4, 4): fail}
    (text,) = run(engine, [start(engine, 0, PROMPTS[0], GREEDY)], 8)
    counted(tokens=len(text), fallbacks=engine.compile_state()[1])
    assert text == generated("LlamaForCausalLM", PROMPTS[0], 8)
    assert engine.compile_state() == (0, 1)


def test_rows_that_fail_eagerly_too_cost_nobody_the_compiled_code() -> None:
    engine = runner()
    engine.compiled = {Bucket(4, 4): fail}
    text = start(engine, 0, PROMPTS[0], GREEDY)
    text.tokens[-1] = 10_000  # no such token: eager raises as well
    with pytest.raises(IndexError):
        engine.step([text.work()])
    assert engine.compile_state() == (1, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("slots", "context"), [(1, 256), (2, 512), (4, 512), (16, 8192), (64, 256)])
def test_few_buckets_the_single_user_first_and_one_for_every_step(slots: int, context: int, device: str) -> None:
    engine = runner(slots=slots, context=context)
    engine.step_tokens = slots * (1 + engine.guesses) if device == "cpu" else max(slots, 16)  # as in Runner
    wanted = buckets(engine)
    assert len(wanted) <= 7 and len(set(wanted)) == len(wanted)
    assert wanted[0] == (1, 1) and wanted[slots > 1] == (slots, 1)
    assert all(bucket.tokens <= engine.step_tokens and bucket.longest in (1, bucket.tokens) for bucket in wanted)
    assert any(bucket.tokens == engine.step_tokens and bucket.longest > engine.guesses for bucket in wanted)
    engine.guesses = 0
    assert max(buckets(engine)) == (slots, 1) and {bucket.longest for bucket in buckets(engine)} == {1}


def test_steps_are_recorded_as_they_are_and_again_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a recorder that only notes."""
    engine, eager, recorded = runner(), runner(), list[Step]()
    wanted = [Bucket(1, 1), Bucket(4, 1), Bucket(8, 8)]
    monkeypatch.setattr(compiling, "buckets", lambda _: wanted)

    def record(code: Step, arguments: tuple[torch.Tensor, ...]) -> Step:
        recorded.append(code)
        assert code(*arguments).shape == arguments[3].shape[1:]
        return lambda *_: code(*arguments)  # whatever it is called with

    engine.compiler = ThreadCompiler(engine, lambda _, bucket: make_step(bucket.longest), record)
    texts, same = every_text(engine, eager)
    for _ in wanted:
        assert engine.load_compiled(idle=False)
        assert run(engine, [texts[0], texts[3]], 2) == run(eager, [same[0], same[3]], 2)
    assert engine.details()["compiled"] == "0/3" and len(recorded) == 3
    load_all(engine)
    assert engine.details()["compiled"] == "3/3" and len(recorded) == 6
    assert run(engine, texts, 3) == run(eager, same, 3) and run(engine, texts[:1], 3) == run(eager, same[:1], 3)
    assert engine.step([texts[2].work(1, 2)]) == eager.step([same[2].work(1, 2)])
    assert engine.compiler.wanted == wanted and not engine.compiler.failed and not engine.compiler.uncompiled


@pytest.mark.parametrize("used_by", ["one that is gone", "a guess that was wrong"])
def test_recording_again_harms_nobody(used_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs a step once more, whose tokens may be long gone: their blocks are another's, or hold other tokens."""
    monkeypatch.setattr(compiling, "buckets", lambda _: [Bucket(8, 8)])
    engine = runner()

    def record(code: Step, arguments: tuple[object, ...]) -> Step:
        code(*arguments)
        return lambda *_: code(*arguments)

    engine.compiler = ThreadCompiler(engine, lambda _, bucket: make_step(bucket.longest), record)
    assert engine.load_compiled(idle=False)
    text = start(engine, 0, PROMPTS[3], GREEDY)
    engine.step([text.work(1, 2, 3)])
    if used_by == "one that is gone":
        text = start(engine, 0, PROMPTS[1], GREEDY)  # in the same blocks
    else:
        del engine.compiled[Bucket(8, 8)]
        run(engine, [text], 4)  # by other buckets
    before, seen = memory(engine), engine.rules.seen[:-1].clone()
    load_all(engine)
    assert torch.equal(memory(engine), before) and torch.equal(engine.rules.seen[:-1], seen)


def test_steps_that_cannot_be_recorded_serve_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    engine, eager = runner(), runner()
    engine.compiler = ThreadCompiler(engine, lambda _, bucket: make_step(bucket.longest), fail)
    load_all(engine)
    texts = [[start(each, 0, PROMPTS[0], GREEDY)] for each in (engine, eager)]
    assert run(engine, texts[0], 4) == run(eager, texts[1], 4)
    assert caplog.text.count("cannot be recorded") == 1


class Streams:
    """CUDA's streams, of which one is current, without CUDA. `waits`: which stream waited for which."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waits: list[tuple[Stream, Stream]] = []
        self.current = self.main = Stream(self)
        patch.setattr(torch.cuda, "Stream", lambda: Stream(self))
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        patch.setattr(torch.cuda, "set_stream", self.choose)
        patch.setattr(torch.cuda, "stream", Within)
        patch.setattr(torch.cuda.graph, "default_capture_stream", Stream(self))
        for owner, name in ((torch.cuda, "synchronize"), (torch.cuda, "empty_cache"), (torch._C, "_host_emptyCache")):
            patch.setattr(owner, name, lambda: None, raising=False)

    def choose(self, stream: Stream) -> None:
        self.current = stream


class Stream:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def wait_stream(self, other: Stream) -> None:
        self.streams.waits.append((self, other))


class Within:
    """As torch.cuda.StreamContext, which does nothing where there is no GPU."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.streams = stream, stream.streams

    def __enter__(self) -> None:
        self.before, self.streams.current = self.streams.current, self.stream

    def __exit__(self, *_: object) -> None:
        self.streams.current = self.before


# What PyTorch calls while it records, in this order; "step" is the call under capture.
CALLS = ["first warm-up", "second warm-up", "capture_begin", "step", "capture_end"]


@pytest.mark.parametrize("broken", [None, *CALLS])
def test_recording_leaves_its_streams_whatever_fails(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real torch.cuda.graph, whose own exit leaves its stream current where the capture cannot end."""
    streams, calls, where = Streams(monkeypatch), list[str](), list[Stream]()

    def call(name: str) -> str:
        calls.append(name)
        where.append(streams.current)
        if name == broken:
            raise RuntimeError(f"injected: {name}")
        return name

    class Graph:
        def capture_begin(self, *_: object, **__: object) -> None:
            call("capture_begin")

        def capture_end(self) -> None:
            call("capture_end")

        def replay(self) -> None:
            call("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    steps = iter([*CALLS[:2], "step"])
    if broken:
        with pytest.raises(RuntimeError, match=f"injected: {broken}"):
            compiling.record((0, 1), lambda: call(next(steps)), ())
    else:
        assert compiling.record((0, 1), lambda: call(next(steps)), ())() == "step"
        assert calls == [*CALLS, "replay"]
    assert streams.current is streams.main
    side = where[0]
    assert streams.waits[:2] == [(side, streams.main), (streams.main, side)]  # what the warm-up wrote is there
    assert where[:2] == [side] * len(where[:2]) and streams.main not in where[:5]
    assert len(set(where[2:5])) <= 1  # a capture ends where it began
