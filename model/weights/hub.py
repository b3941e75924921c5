"""Files of a pinned model from the Hugging Face hub, kept in the library's layout below DATA_DIR.

Opens none of them. HF_HUB_OFFLINE and HF_TOKEN mean what they always mean: the library reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError
from tqdm import tqdm  # type: ignore[import-untyped]

from model.weights.catalogue import ModelError, ModelSpec


def snapshot(spec: ModelSpec, patterns: list[str], cache: Path, progress: Callable[[int], None]) -> Path:
    """The folder with the matching files, at exactly the pinned revision. Raises ModelError, or what a disk raises."""
    try:
        return Path(
            snapshot_download(
                spec.source, revision=spec.revision, allow_patterns=patterns, cache_dir=cache,
                tqdm_class=_percent_bar(progress),
            )
        )  # fmt: skip
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise ModelError(
            f"{spec.source} is not in the local cache, and the hub cannot be asked (offline, or HF_HUB_OFFLINE=1)"
        ) from error


def _percent_bar(progress: Callable[[int], None]) -> type[tqdm]:
    class Bar(tqdm):  # type: ignore[misc]
        """The library's bar for downloaded bytes, told to `progress` instead of a terminal."""

        def display(self, *_: object, **__: object) -> None:
            if self.unit == "B" and self.total:
                progress(min(100, int(100 * self.n / self.total)))

    return Bar
