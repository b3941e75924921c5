"""The model on this machine as a Backend: tokenises on the caller's thread, computes on the engine's.

Imports torch only on the model thread. Speaks no HTTP and stores nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import replace

from model import gpu
from model.engine import Engine, Progress
from model.loader import load_tokenizer, prepare, prepare_tokenizer
from model.prompt import Prompt
from model.registry import DEFAULT_CONTEXT, ModelError, ModelSpec, completed, find
from model.scheduler import Runner
from model.sequence import Finished, Sequence
from model.text import TextAssembler
from model.types import (
    BackendStatus,
    Done,
    Event,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    ModelUnavailable,
    Status,
    UnknownModel,
    Usage,
)
from settings import Settings
from telemetry import Metrics


class LocalBackend:
    """Serves the one model that settings name. Its weights load when the first request is submitted."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises ModelError when MODEL names nothing that may be served; opens no file."""
        self._settings, self._metrics = settings, metrics
        self._spec = find(settings)
        self._prompt: Prompt | None = None
        self._files = ""  # the prepared folder's name, which changes with the model's files
        self._lock = threading.Lock()
        self._engine = Engine(self._load, settings.max_queue, metrics)

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        if request.model != self._spec.name:
            raise UnknownModel(f"there is no model {request.model[:64]!r} here", param="model")
        ids = self._rendered().render(request.messages)
        room = self._context() - len(ids)
        if room <= 0:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens, the context {self._context()}", param="prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        if request.max_new_tokens > room:
            raise InvalidRequest(
                f"max_new_tokens may be {room} at most beside a prompt of {len(ids)} tokens", param="max_new_tokens",
                code="context_length_exceeded",
            )  # fmt: skip
        return replace(request, prompt_ids=ids)

    def submit(self, request: GenerateRequest) -> TextStream:
        prompt = self._rendered()
        assembler = TextAssembler(prompt.decode, request.stop, prompt.think, prompt.think_open)
        return TextStream(self._engine.submit(request), assembler)

    def fingerprint(self) -> str:
        self._rendered()
        return f"{self._files}+{self._settings.quantization}"

    def status(self) -> BackendStatus:
        return self._engine.status()

    def preload(self) -> None:
        self._engine.start()

    def close(self, grace: float) -> None:
        self._engine.stop(grace)

    def _rendered(self) -> Prompt:
        """The tokenizer, loaded by the first that needs it; weights are not waited for."""
        with self._lock:
            if self._prompt is None:
                try:
                    folder = prepare_tokenizer(self._spec, self._settings)
                    self._files, self._spec = folder.name, completed(self._spec, folder)
                    self._prompt = Prompt(load_tokenizer(folder), self._spec)
                except ModelError as error:
                    raise ModelUnavailable("the model could not be prepared, see the log", retry_after=30) from error
            return self._prompt

    def _context(self) -> int:
        """Tokens that prompt and answer share: what was fitted into memory, before that what settings allow."""
        fitted = self._engine.status().details.get("context")
        return int(fitted) if fitted else context_limit(self._settings, self._spec)

    def _load(self, progress: Progress) -> Runner:
        """On the model thread, which alone imports torch."""
        caches = self._settings.data_dir.resolve() / "compiled"
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(variable, str(caches / variable.split("_")[0].lower()))
        folder = prepare(self._spec, self._settings, progress)
        from model.build import build
        from model.compile import compiler_for

        runner = build(folder, self._settings, progress)
        runner.compiler = compiler_for(runner, folder, self._settings)
        if runner.device != "cpu":
            gpu.watch(self._metrics)
        return runner


class TextStream:
    """A sequence of tokens read as text: a Stream. Detokenises on the reader's thread."""

    def __init__(self, sequence: Sequence, assembler: TextAssembler) -> None:
        self._sequence, self._assembler = sequence, assembler
        self._pending: deque[Event] = deque()
        self._tokens = 0

    def get(self, timeout: float) -> Event | None:
        end = time.monotonic() + timeout
        while not self._pending:
            item = self._sequence.get(max(0.0, end - time.monotonic()))
            if item is None:
                return None
            self._read(item)
        return self._pending.popleft()

    def close(self) -> None:
        self._sequence.close()

    def _read(self, item: Status | int | Finished) -> None:
        if isinstance(item, Status):
            self._pending.append(item)
        elif isinstance(item, Finished):
            self._pending += self._assembler.finish()
            self._done(item.reason)
        else:
            self._tokens += 1
            self._pending += self._assembler.push(item)
            if self._assembler.stopped:
                self._sequence.close(FinishReason.STOP)
                self._done(FinishReason.STOP)

    def _done(self, reason: FinishReason) -> None:
        usage = Usage(
            prompt_tokens=len(self._sequence.prompt),
            completion_tokens=self._tokens,
            cached_tokens=self._sequence.cached,
            reasoning_tokens=self._assembler.reasoning_tokens,
        )
        self._pending.append(Done(reason, usage))


def context_limit(settings: Settings, spec: ModelSpec) -> int:
    """Tokens a slot may hold if memory allows it."""
    return min(settings.max_context or DEFAULT_CONTEXT, spec.context or DEFAULT_CONTEXT)
