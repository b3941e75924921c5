"""A tiny model with room for four, and how to wait for its compiled steps.

    python -m tests.model.runtime.compiling.loading CHECKPOINT SETTINGS

As a program: adopts what is compiled, as a later start of the service does, and says how many. SETTINGS is JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from model.runtime import compile as compiling
from model.runtime.build import Room, build
from model.runtime.runner import Bucket, Runner
from model.types import Sampling
from settings import Settings

ROOM = Room(slots=4, context=512)
GREEDY = Sampling(temperature=0)


def two_buckets(device: str, slots: int, pages: int, kernels: bool) -> list[Bucket]:
    """Enough to tell one from another; six take minutes."""
    return [Bucket(1, 1), Bucket(slots, pages)]


def load(settings: Settings, checkpoint: Path) -> Runner:
    return build(checkpoint, settings, lambda stage, percent: None, ROOM)


def beside(prepared: tuple[Settings, Path], folder: Path) -> tuple[Runner, compiling.BackgroundCompiler]:
    """An engine, and a compiler for it that finds nothing ready in `folder`."""
    settings, checkpoint = prepared
    engine = load(settings, checkpoint)
    elsewhere = settings.model_copy(update={"data_dir": folder})
    return engine, compiling.BackgroundCompiler(engine, checkpoint, elsewhere)


def adopt_until(engine: Runner, done: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not done():
        if not engine.adopt(idle=False):
            assert time.monotonic() < end, "no compiled step arrived"
            time.sleep(0.05)


def main() -> None:
    compiling.buckets = two_buckets
    checkpoint, settings = Path(sys.argv[1]), Settings.model_validate_json(sys.argv[2])
    engine = load(settings, checkpoint)
    engine.compiler = compiling.BackgroundCompiler(engine, checkpoint, settings)
    while engine.adopt(idle=False):
        pass
    print(engine.details()["compiled"])


if __name__ == "__main__":
    main()
