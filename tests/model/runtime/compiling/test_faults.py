"""Compiling that fails, or cannot begin: eager serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor import config

from model.runtime import ahead
from model.runtime.compile import BackgroundCompiler, compiler_for, fingerprint
from model.runtime.runner import Bucket, CompileState
from settings import Settings
from tests.model.runtime.compiling.loading import GREEDY, adopt_until, beside, load
from tests.model.runtime.test_runner import PROMPTS, run, start

pytestmark = [
    pytest.mark.timeout(400),  # half a minute a bucket, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles or unpickles
]


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


def no_process_left(*arguments: object, **options: object) -> None:
    raise BlockingIOError("injected: no process left")


def test_a_machine_without_room_for_a_child_serves_eagerly(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, compiler = beside(prepared, tmp_path)
    engine.compiler = compiler
    monkeypatch.setattr(ahead.subprocess, "Popen", no_process_left)
    assert not engine.adopt(idle=True) and engine.compile_state() == (0, 2)
    assert "no process left" in caplog.text


def test_what_was_compiled_before_is_used_though_the_rest_cannot_be(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, compiler = beside(prepared, tmp_path)
    (compiler._folder / "1x1.step").write_bytes(b"ready")  # as an earlier, interrupted start leaves it
    monkeypatch.setattr(compiler, "_adopted", lambda bucket, file: (bucket, file))
    monkeypatch.setattr(ahead.subprocess, "Popen", no_process_left)
    found = compiler.poll(idle=True)
    assert found is not None and found[0] == Bucket(1, 1) and compiler.state() == CompileState(2, 1)


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
