"""Model folders on disk: which ones are safe to open, and how one becomes ready in a single step.

Imports no torch, and never reads a weight.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from filelock import FileLock, Timeout
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from model.weights.catalogue import ARCHITECTURES, ModelError, read_json

log = structlog.get_logger("model")

MANIFEST = "manifest.json"
# Small files that prompts, limits and stop tokens need: everything but the weights.
CONFIGS = ("config.json", "generation_config.json")
TEXT_FILES = (*CONFIGS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_HEADER_LIMIT = 100_000_000  # bytes, the format's own bound


def check_config(folder: Path) -> None:
    """Raises ModelError unless the folder is of a known architecture and asks for none of its own code."""
    config = read_json(folder / "config.json")
    if config.get("architectures") not in [[name] for name in ARCHITECTURES]:
        raise ModelError(
            f"{folder}: architecture {config.get('architectures')} is not one of {', '.join(ARCHITECTURES)}"
        )
    optional = [folder / name for name in ("tokenizer_config.json", "generation_config.json")]
    if any("auto_map" in read_json(file) for file in [folder / "config.json", *filter(Path.is_file, optional)]):
        raise ModelError(f"{folder}: it wants to run code of its own (auto_map), which is never done")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: tokenizer.json is missing")


def check_weights(folder: Path) -> None:
    """Raises ModelError unless all weights are there as whole safetensors files."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{folder}: no safetensors file (pickled .bin weights are never opened)")
    index = folder / "model.safetensors.index.json"
    listed = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(listed, dict) or (missing := set(listed.values()) - {shard.name for shard in shards}):
        raise ModelError(f"{folder}: shards are missing: {', '.join(sorted(map(str, missing)))}")
    for shard in shards:
        _check_shard(shard)


def _check_shard(file: Path) -> None:
    """The header's own arithmetic must agree with the file's length: a cut or forged file ends here."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise ModelError(f"{file}: the header is said to be {length} bytes long, in a file of {size}")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"{file}: the header is not one of safetensors") from None
    if 8 + length + end != size:
        raise ModelError(f"{file}: {size} bytes where its header tells of {8 + length + end}: fetch it again")


def is_ready(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def verify(folder: Path, progress: Callable[[int], None] = lambda percent: None) -> None:
    """Raises ModelError unless every file is as it was written. `progress` takes percent."""
    manifest = read_json(folder / MANIFEST)
    total = sum((folder / name).stat().st_size for name in manifest if (folder / name).is_file())
    done = 0
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            raise ModelError(f"{file} does not match its checksum: delete {folder} and start again")
        done += file.stat().st_size
        progress(100 * done // max(total, 1))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """An empty folder that becomes `final` when the block ends well, and vanishes when it does not.

    Only a folder with a manifest counts as ready, and it gets its name last: whenever the power goes, there is
    a whole checkpoint or none. Whoever comes second waits; the caller asks `is_ready` inside `exclusive`.
    """
    work = final.with_name(f".{final.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # left behind by a kill -9
    work.mkdir(parents=True)
    try:
        yield work
        manifest = {file.name: sha256(file) for file in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for path in [*work.iterdir(), work]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)  # it has no manifest, or nobody would be building
        os.replace(work, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process (and thread) at a time makes `folder`; the others wait here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("waiting for another process that prepares the model", model=folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def adopt(source: Path, target: Path, *patterns: str) -> None:
    """Bring files that `target` lacks into it as they are: linked where the file system can, else copied."""
    for file in sorted(match for pattern in patterns for match in source.glob(pattern)):
        if (target / file.name).exists():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever a library says about a bad disk or a bad file becomes one line: a ModelError that names `what`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError, StrictDataclassError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise ModelError(f"{what}: no space left on the disk of DATA_DIR") from error
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{what}: {first[:300]}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
