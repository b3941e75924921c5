"""What tests of compiling share: a prepared model, two buckets instead of six, and no child that outlives its test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.runtime import compile as compiling
from model.runtime.compile import BackgroundCompiler
from model.runtime.runner import PREFILL, Bucket
from model.weights.catalogue import find
from model.weights.loader import prepare
from settings import Settings
from tests.model.runtime.compiling.loading import two_buckets
from tests.model.test_local import settings_for
from tests.model.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path]:
    folder = tmp_path_factory.mktemp("compile")
    settings = settings_for(
        tiny_checkpoint(folder / "tiny"), folder / "data", quantization="int8", threads=1, compile=True
    )
    return settings, prepare(find(settings), settings)


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
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "buckets", two_buckets)


@pytest.fixture
def and_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "buckets", lambda device, slots, pages, kernels: [Bucket(1, pages), PREFILL])


@pytest.fixture
def inductor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
