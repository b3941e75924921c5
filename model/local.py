"""The model on this machine as a Backend: tokenises on the caller's thread, computes on the engine's."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import date

from errors import ModelUnavailable, UnknownModel
from model.engine.engine import Engine
from model.engine.scheduler import Runner, too_long
from model.engine.sequence import Sequence
from model.runtime import gpu
from model.text.detokenizer import TextAssembler
from model.text.prompt import Prompt, TemplateUnusable
from model.types import BackendStatus, Done, Event, FinishReason, GenerateRequest, Progress, Status, Usage
from model.weights.catalogue import DEFAULT_CONTEXT, ModelError, find, with_config
from model.weights.loader import load_tokenizer, prepare, prepare_tokenizer, progress_log, tokenizer_is_ready
from settings import Settings
from telemetry import Metrics

_POLL = 0.2  # seconds between two looks whether a fetch has failed
# Characters a token, over a whole prompt. Vocabularies hold longer ones, of blanks and rules, but no text is made of
# these alone; English has 4 to 5.
_MAX_TOKEN_CHARACTERS = 32


class LocalBackend:
    """Serves the one model that settings name. Its weights load when the first request is submitted."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises ModelError when MODEL names nothing that may be served; opens no file."""
        self._settings, self._metrics = settings, metrics
        self._spec = find(settings)
        self._prompt: Prompt | None = None
        self._files = ""  # the prepared folder's name, which changes with the model's files
        self._lock = threading.Lock()
        self._engine = Engine(self._load, settings.max_queue, metrics, slots=settings.slots)

    def max_characters(self) -> int:
        longest = self._prompt.longest if self._prompt else _MAX_TOKEN_CHARACTERS
        return self._context() * min(longest, _MAX_TOKEN_CHARACTERS)

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        if request.model != self._spec.name:
            raise UnknownModel("there is no such model here", param="model")
        ids, context = self._rendered(request.timeout).render(request.messages), self._context()
        if len(ids) + request.max_new_tokens > context:
            raise too_long(context, len(ids), request.max_new_tokens)
        return replace(request, prompt_ids=ids)

    def submit(self, request: GenerateRequest) -> TextStream:
        prompt = self._rendered(request.timeout)
        assembler = TextAssembler(prompt.decode, request.stop, prompt.think, prompt.think_open, prompt.unfinished)
        return TextStream(self._engine.submit(request), assembler)

    def fingerprint(self) -> str:
        dated = self._rendered(self._settings.request_timeout).dated
        return f"{self._files}+{self._settings.quantization}" + (f"+{date.today()}" if dated else "")

    def status(self) -> BackendStatus:
        return self._engine.status()

    def preload(self, on_failure: Callable[[str], None]) -> None:
        self._engine.on_failure = on_failure
        self._engine.start()

    def watch(self, on_hang: Callable[[str], None]) -> None:
        self._engine.on_hang = on_hang

    def close(self, grace: float) -> None:
        self._engine.stop(grace)

    def _rendered(self, timeout: float) -> Prompt:
        """The tokenizer, loaded by the first that needs it; weights are not waited for.

        What is not on disk yet is fetched by the model thread, and waited for here. Raises ModelUnavailable.
        """
        deadline = time.monotonic() + timeout
        while self._prompt is None:
            ready = tokenizer_is_ready(self._spec, self._settings)
            if not ready or self._engine.status().stage == "failed":
                self._engine.start()
            status = self._engine.status()
            if status.stage in ("failed", "stopping", "stopped") or time.monotonic() > deadline:
                raise ModelUnavailable(status.reason or "the model is still being fetched", retry_after=30)
            if ready:
                self._load_prompt()
            else:
                time.sleep(_POLL)
        return self._prompt

    def _load_prompt(self, progress: Progress = lambda stage, percent: None) -> None:
        """Raises ModelUnavailable, and has the model thread fail for the same reason, so that the status tells it."""
        with self._lock:
            try:
                if self._prompt is None:
                    folder = prepare_tokenizer(self._spec, self._settings, progress)
                    self._files, self._spec = folder.name, with_config(self._spec, folder)
                    self._prompt = Prompt(load_tokenizer(folder), self._spec)
            except ModelError as error:
                self._engine.start()
                reason = str(error) if isinstance(error, TemplateUnusable) else "the model cannot be used, see the log"
                raise ModelUnavailable(reason, retry_after=30, detail=str(error)) from error

    def _context(self) -> int:
        """Tokens that prompt and answer share: what was fitted into memory, before that what settings allow."""
        allowed, possible = self._settings.max_context, self._spec.context
        return self._engine.context or min(allowed or possible, possible or allowed) or DEFAULT_CONTEXT

    def _load(self, progress: Progress) -> Runner:
        """On the model thread. No garbage is collected meanwhile, and later none of what stays is looked at.

        Half a million objects come with the libraries: walking over them again and again takes 1.5 s of a start, and
        later 0.3 s at a time in which every stream pauses. What loading leaves is collected once: it is 160 MB.
        """
        gc.disable()
        try:
            with progress_log(self._spec.name, progress) as told:
                self._load_prompt(told)
                folder = prepare(self._spec, self._settings, told)
                from model.runtime.build import build  # on this thread alone: they import torch
                from model.runtime.compile import compiler_for

                runner = build(folder, self._settings, told)
                runner.compiler = compiler_for(runner, self._settings)
        finally:
            gc.collect()
            gc.freeze()
            gc.enable()
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

    def _read(self, item: Status | int | FinishReason) -> None:
        if isinstance(item, Status):
            self._pending.append(item)
            return
        if isinstance(item, FinishReason):
            self._pending += self._assembler.finish()
        else:
            self._tokens += 1
            self._pending += self._assembler.push(item)
            if not self._assembler.stopped:
                return
            item = FinishReason.STOP
            self._sequence.close(item)
        prompt, cached = self._sequence.prompt_tokens, self._sequence.cached
        usage = Usage(prompt, self._tokens, cached, self._assembler.reasoning_tokens)
        self._pending.append(Done(item, usage))
