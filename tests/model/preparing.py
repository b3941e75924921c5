"""A tiny model made ready, as the loader's tests do it again and again."""

from __future__ import annotations

from pathlib import Path

from model.weights import checkpoint, loader
from model.weights.catalogue import find
from settings import Settings


def settings_for(source: Path, **changes: object) -> Settings:
    return Settings(data_dir=source.parent / "data", model=str(source), device="cpu", **changes)


def prepare(source: Path, **changes: object) -> Path:
    settings = settings_for(source, **changes)
    return loader.prepare(find(settings), settings)


def left_behind(settings: Settings) -> list[str]:
    """What is in the models folder beside locks and ready folders."""
    found = [path for path in (settings.data_dir / "models").iterdir() if path.suffix != ".lock"]
    return [path.name for path in found if not checkpoint.is_ready(path)]
