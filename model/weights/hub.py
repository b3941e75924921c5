"""Files of a pinned model from the Hugging Face hub, kept in the library's layout below DATA_DIR.

The library itself reads HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, HTTPS_PROXY and SSL_CERT_FILE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError
from tqdm import tqdm  # type: ignore[import-untyped]

from model.weights.catalogue import ModelError, ModelSpec

Percent = Callable[[int], None]  # takes how many percent are done


def snapshot(spec: ModelSpec, patterns: Iterable[str], cache: Path, progress: Percent) -> Path:
    """The folder with the matching files, at exactly the pinned revision. Raises ModelError, or what a disk raises."""
    try:
        return Path(
            snapshot_download(
                spec.source, revision=spec.revision, allow_patterns=list(patterns), cache_dir=cache,
                tqdm_class=percent_bar(progress, "B"),
            )
        )  # fmt: skip
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise ModelError(
            f"{spec.source} is not in the local cache, and the hub cannot be asked (offline, or HF_HUB_OFFLINE=1)"
        ) from error


def percent_bar(progress: Percent, unit: str = "it") -> type[tqdm]:
    """A library's progress bar that calls `progress` with percent instead of drawing; it counts in `unit`."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"file": StringIO()})  # closing it writes a line end

        def display(self, *_: object, **__: object) -> None:
            if self.unit == unit and self.total:
                progress(min(100, int(100 * self.n / self.total)))

    return Bar
