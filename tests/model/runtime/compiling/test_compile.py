"""Compiling beside the engine: adopted when ready, and found again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.start import spies
from model.runtime import compile as compiling
from model.runtime.ahead import Child
from model.runtime.compile import BackgroundCompiler, buckets, fingerprint
from settings import Settings
from tests.model.runtime.compiling.loading import GREEDY, adopt_until, beside, load
from tests.model.runtime.test_runner import PROMPTS, run, start

pytestmark = [
    pytest.mark.timeout(400),  # half a minute a bucket, more on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles or unpickles
]


@pytest.mark.usefixtures("inductor_cache")
def test_a_child_compiles_and_a_second_start_finds_it_done(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
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
    assert second._job is None
    start(again, 0, PROMPTS[0], GREEDY)
    start(eager, 0, PROMPTS[0], GREEDY)
    assert run(again, [0], 8) == run(eager, [0], 8)

    path = spies(tmp_path / "bin", tmp_path / "compilers")
    command = [sys.executable, "-m", "tests.model.runtime.compiling.loading", checkpoint, settings.model_dump_json()]
    later = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120)
    assert later.stdout.strip() == "2/2", later.stderr
    assert not (tmp_path / "compilers").exists()  # a line for each compiler that had something to compile


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


def test_the_first_answers_are_not_disturbed(
    prepared: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_LET_FIRST_ANSWER", 1000.0)
    _, compiler = beside(prepared, tmp_path)
    compiler.poll(idle=False)
    assert compiler._job is None
    compiler.poll(idle=True)
    assert compiler._job is not None


def test_the_child_ends_with_the_service(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    _, compiler = beside(prepared, tmp_path)
    compiler.poll(idle=True)
    assert isinstance(compiler._job, Child)
    child = compiler._job.process
    assert child.stdin is not None and child.poll() is None
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
    assert isinstance(compiler._job, Child)
    seen = Path(f"/proc/{compiler._job.process.pid}/environ").read_bytes()
    compiler.close()
    assert b"sesame" not in seen and b"PATH=" in seen


def test_steps_of_long_ago_are_removed(prepared: tuple[Settings, Path], tmp_path: Path) -> None:
    for age in range(6):
        folder = tmp_path / "compiled" / f"{age:016x}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 - age, 1000 - age))
    _, compiler = beside(prepared, tmp_path)
    compiler.close()
    left = {folder.name for folder in (tmp_path / "compiled").iterdir()}
    assert left == {f"{age:016x}" for age in range(3)} | {compiler._folder.name}


@pytest.mark.parametrize(("device", "kernels"), [("cpu", True), ("cpu", False), ("cuda", False)])
@pytest.mark.parametrize(("slots", "pages"), [(1, 1), (4, 2), (16, 32), (64, 1)])
def test_few_buckets_the_single_user_first(slots: int, pages: int, device: str, kernels: bool) -> None:
    wanted = buckets(device, slots, pages, kernels)
    assert len(wanted) <= 6 and wanted[0].rows == 1 and max(bucket.rows for bucket in wanted) == slots
    assert len(set(wanted)) == len(wanted) and all(bucket.pages <= pages for bucket in wanted)
