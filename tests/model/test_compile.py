"""Compiling beside the engine: adopted when ready, found again, and never needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config

from model import compile as compiling
from model.build import Room, build
from model.compile import BackgroundCompiler, buckets, compiler_for, fingerprint
from model.loader import prepare
from model.registry import find
from model.runner import PREFILL, Bucket, Runner
from model.types import Sampling
from settings import Settings
from tests.model.test_local import settings_for
from tests.model.test_runner import PROMPTS, run, start
from tests.model.tiny import tiny_checkpoint

ROOM = Room(slots=4, context=512)
GREEDY = Sampling(temperature=0)

pytestmark = [
    pytest.mark.timeout(400),  # half a minute a bucket, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles or unpickles
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    folder = tmp_path_factory.mktemp("compile")
    settings = settings_for(
        tiny_checkpoint(folder / "tiny"), folder / "data", quantization="int8", threads=1, compile=True
    )
    return settings, prepare(find(settings), settings)


def load(settings: Settings, checkpoint: Path) -> Runner:
    return build(checkpoint, settings, lambda stage, percent: None, ROOM)


def adopt_until(engine: Runner, done: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not done():
        if not engine.adopt(idle=False):
            assert time.monotonic() < end, "no compiled step arrived"
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def no_child_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[BackgroundCompiler] = []
    begin = BackgroundCompiler.__init__

    def noted(self: BackgroundCompiler, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(BackgroundCompiler, "__init__", noted)
    yield
    for compiler in made:
        compiler.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 0.0)


@pytest.fixture(autouse=True)
def two_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell one from another; six take minutes."""
    monkeypatch.setattr(compiling, "buckets", lambda slots, pages, kernels: [Bucket(1, 1), Bucket(slots, pages)])


@pytest.fixture
def and_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "buckets", lambda slots, pages, kernels: [Bucket(1, pages), PREFILL])


@pytest.fixture
def inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


@pytest.mark.usefixtures("inductor_cache")
def test_a_child_compiles_and_a_second_start_finds_it_done(prepared: tuple[Settings, Path]) -> None:
    settings, checkpoint = prepared
    engine, eager = load(settings, checkpoint), load(settings, checkpoint)
    engine.compiler = BackgroundCompiler(engine, checkpoint, settings)
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY)
    assert run(engine, [0], 3) == run(eager, [0], 3)  # the child has hardly begun: eager answers meanwhile
    adopt_until(engine, lambda: engine.details()["compiled"] == "2/2")
    for active in ([0], [0, 1, 2, 3], [0], [3]):
        assert run(engine, active, 4) == run(eager, active, 4)

    again = load(settings, checkpoint)
    second = again.compiler = BackgroundCompiler(again, checkpoint, settings)
    assert again.adopt(idle=False) and again.adopt(idle=False) and not again.adopt(idle=True)
    assert second._child is None
    start(again, 0, PROMPTS[0], GREEDY)
    start(eager, 0, PROMPTS[0], GREEDY)
    assert run(again, [0], 8) == run(eager, [0], 8)


@pytest.mark.usefixtures("inductor_cache", "kernels", "and_a_chunk")
def test_prompts_of_any_length_are_computed_by_one_compiled_chunk(prepared: tuple[Settings, Path]) -> None:
    settings, checkpoint = prepared
    engine, eager = load(settings, checkpoint), load(settings, checkpoint)
    engine.compiler = BackgroundCompiler(engine, checkpoint, settings)
    adopt_until(engine, lambda: engine.details()["compiled"] == "2/2")
    for slot, prompt in enumerate(PROMPTS):
        for each in (engine, eager):
            start(each, slot, prompt, GREEDY, chunk=7 + 50 * slot)
    assert run(engine, [0, 1, 2, 3], 8) == run(eager, [0, 1, 2, 3], 8)
    written = [torch.cat([t[:, slot, :, :60].flatten() for slot in (1, 3) for t in each.kv.keys]).float()
               for each in (engine, eager)]  # fmt: skip
    assert torch.nn.functional.cosine_similarity(*written, dim=0) > 0.999
    assert engine.compile_state() == (2, 0)  # none was given up on the way


@pytest.mark.promise(
    "P6",
    injected="a C++ compiler that fails",
    counted="the same greedy tokens, 2 of 2 counted as failed, one warning",
)
def test_when_compiling_fails_eager_serves_and_says_why(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings, checkpoint = prepared
    settings = settings.model_copy(update={"data_dir": tmp_path})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'cannot compile anything' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    engine, eager = load(settings, checkpoint), load(settings, checkpoint)
    engine.compiler = compiler_for(engine, checkpoint, settings)
    adopt_until(engine, lambda: engine.compile_state() == (0, 2))
    for each in (engine, eager):
        start(each, 0, PROMPTS[0], GREEDY)
    assert run(engine, [0], 4) == run(eager, [0], 4)
    assert [record.levelname for record in caplog.records if "serving eagerly" in record.message] == ["WARNING"]


@pytest.mark.promise("P6", injected="no compiler at all", counted="one line, 0 of 2 compiled, eager serves")
def test_without_a_compiler_one_line_names_what_to_install(
    prepared: tuple[Settings, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    assert compiler_for(engine, checkpoint, settings.model_copy(update={"compile": False})) is None
    assert "g++" not in caplog.text
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        engine.compiler = compiler_for(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path}))
    assert "apt install g++" in caplog.text
    assert engine.details()["compiled"] == "0/2" and engine.compile_state() == (0, 2)


def test_a_disk_that_takes_no_compiled_step_does_not_cost_the_model(
    prepared: tuple[Settings, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    (tmp_path / "compiled").write_text("a file where a folder should be")
    assert compiler_for(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path})) is None
    assert "nothing can be compiled here" in caplog.text


@pytest.fixture
def no_process_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise BlockingIOError("injected: no process left")

    monkeypatch.setattr(compiling.subprocess, "Popen", full)


@pytest.mark.usefixtures("no_process_left")
def test_a_machine_without_room_for_a_child_serves_eagerly(
    prepared: tuple[Settings, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    engine.compiler = BackgroundCompiler(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path}))
    assert not engine.adopt(idle=True) and engine.compile_state() == (0, 2)
    assert "no process left" in caplog.text


@pytest.mark.usefixtures("no_process_left")
def test_what_was_compiled_before_is_used_though_the_rest_cannot_be(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    compiler = BackgroundCompiler(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path}))
    (compiler._folder / "1x1.step").write_bytes(b"ready")  # as an earlier, interrupted start leaves it
    monkeypatch.setattr(compiler, "_adopted", lambda bucket, file: (bucket, file))
    found = compiler.poll(idle=True)
    assert found is not None and found[0] == Bucket(1, 1) and compiler.state() == {"wanted": 2, "failed": 1}


def test_the_first_answers_are_not_disturbed(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 1000.0)
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    compiler = BackgroundCompiler(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path}))
    compiler.poll(idle=False)
    assert compiler._child is None
    compiler.poll(idle=True)
    assert compiler._child is not None


@pytest.mark.promise("P6", injected="a compiled step with damaged bytes", counted="thrown away, eager serves")
def test_a_damaged_step_is_thrown_away(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, checkpoint = prepared
    settings = settings.model_copy(update={"data_dir": tmp_path})
    engine = load(settings, checkpoint)
    folder = tmp_path / "compiled" / fingerprint(engine, checkpoint, settings)
    folder.mkdir(parents=True)
    files = [folder / "1x1.step", folder / "4x2.step"]
    for file in files:
        file.write_bytes(b"not a step")
    engine.compiler = BackgroundCompiler(engine, checkpoint, settings)
    assert not engine.adopt(idle=False) and not engine.adopt(idle=False)
    assert engine.details()["compile_failures"] == 2 and not any(file.exists() for file in files)
    start(engine, 0, PROMPTS[0], GREEDY)
    assert len(run(engine, [0], 2)[0]) == 2


def test_the_child_ends_with_the_service(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    compiler = BackgroundCompiler(engine, checkpoint, settings.model_copy(update={"data_dir": tmp_path}))
    compiler.poll(idle=True)
    child = compiler._child
    assert child is not None and child.stdin is not None and child.poll() is None
    child.stdin.close()  # as the end of this process would
    assert child.wait(60) == 1


def test_a_fingerprint_changes_with_what_a_step_depends_on(prepared: tuple[Settings, Path]) -> None:
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    one = fingerprint(engine, checkpoint, settings)
    assert one == fingerprint(load(settings, checkpoint), checkpoint, settings)
    assert one != fingerprint(engine, checkpoint, settings.model_copy(update={"threads": 3}))
    assert one != fingerprint(engine, Path("another"), settings)
    engine.context = 256
    assert one != fingerprint(engine, checkpoint, settings)


def test_no_secret_reaches_the_child(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, checkpoint = prepared
    monkeypatch.setenv("ADMIN_PASSWORD", "open sesame")
    monkeypatch.setenv("REDIS_URL", "redis://:open-sesame@127.0.0.1/0")
    secret = settings.model_copy(update={"data_dir": tmp_path, "admin_password": "open sesame"})
    compiler = BackgroundCompiler(load(settings, checkpoint), checkpoint, secret)
    compiler.poll(idle=True)
    assert compiler._child is not None
    seen = Path(f"/proc/{compiler._child.pid}/environ").read_bytes()
    compiler.close()
    assert b"sesame" not in seen and b"PATH=" in seen


def test_steps_of_long_ago_are_removed(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    settings, checkpoint = prepared
    for age in range(6):
        folder = tmp_path / "compiled" / f"{age:016x}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 - age, 1000 - age))
    compiler = BackgroundCompiler(
        load(settings, checkpoint), checkpoint, settings.model_copy(update={"data_dir": tmp_path})
    )
    compiler.close()
    left = {folder.name for folder in (tmp_path / "compiled").iterdir()}
    assert left == {f"{age:016x}" for age in range(3)} | {compiler._folder.name}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("slots", "pages"), [(1, 1), (4, 2), (16, 32), (64, 1)])
def test_few_buckets_the_single_user_first(slots: int, pages: int, kernels: bool) -> None:
    wanted = buckets(slots, pages, kernels)
    assert len(wanted) <= 6 and wanted[0].rows == 1 and max(bucket.rows for bucket in wanted) == slots
    assert len(set(wanted)) == len(wanted) and all(bucket.pages <= pages for bucket in wanted)
