"""A Backend that echoes the last message word by word, from real threads, without torch: a model takes seconds.

The first word of the prompt may be an order: `slow` waits between words, `silent` says nothing until it is closed,
`think` reasons first, `refuse` is a full queue, `fail` raises at once, `break` after two words, `bug` is a bug there.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from errors import GenerationFailed, InvalidRequest, ModelUnavailable, Overloaded, ServiceError, UnknownModel
from model.types import BackendStatus, Chunk, Done, Event, FinishReason, GenerateRequest, Status, Usage

MODEL = "smollm2-135m-instruct"
CONTEXT = 4096


class ScriptedStream:
    """One generation on a thread of its own."""

    def __init__(self, backend: ScriptedBackend, request: GenerateRequest) -> None:
        self._backend, self._request = backend, request
        self._queue: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._given_up = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def get(self, timeout: float) -> Event | None:
        try:
            event = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        self._closed.set()

    def give_up(self) -> None:
        """The service stops and the grace is over."""
        self._given_up.set()
        self._closed.set()

    def _run(self) -> None:
        try:
            for event in self._events():
                self._queue.put(event)
        except (ServiceError, RuntimeError) as error:
            self._queue.put(error)
        finally:
            self._backend.ended(self)

    def _events(self):
        words = self._request.messages[-1].content.split(" ")
        order, delay = words[0], 0.05 if words[0] == "slow" else 0.0
        if order == "fail":
            raise GenerationFailed("The model could not compute this request.")
        if order == "silent":
            yield Status("queued", position=1, eta_seconds=1.0)
            self._closed.wait()
        if order == "think":
            yield Chunk("hm", "reasoning")
        texts, reason = self._text(words)
        for said, text in enumerate(texts):
            if self._closed.wait(delay) if delay else self._closed.is_set():
                break
            if said == 2 and order == "break":
                raise GenerationFailed("The numbers were not numbers.")
            if said == 2 and order == "bug":
                raise RuntimeError(f"a bug that quotes {self._request.messages[-1].content}")
            yield Chunk(text)
        else:
            said = len(texts)
        if self._given_up.is_set():
            raise ModelUnavailable("The service is stopping.")
        usage = Usage(len(self._request.prompt_ids), said)
        yield Done(FinishReason.CANCELLED if self._closed.is_set() else reason, usage)

    def _text(self, words: list[str]) -> tuple[list[str], FinishReason]:
        limit = self._request.max_new_tokens
        reason = FinishReason.LENGTH if len(words) > limit else FinishReason.STOP
        text = " ".join(words[:limit])
        for stop in self._request.stop:
            if stop in text:
                text, reason = text[: text.index(stop)], FinishReason.STOP
        head, *rest = text.split(" ")
        return [head, *(f" {word}" for word in rest)], reason


class ScriptedBackend:
    """Counts what it does, so that tests can tell a cached answer from a computed one."""

    def __init__(self) -> None:
        self.submitted: list[GenerateRequest] = []
        self._open: set[ScriptedStream] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self.preloaded = False

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        if request.model != MODEL:
            raise UnknownModel("This model is not served here.", param="model")
        ids = tuple(ord(letter) for message in request.messages for letter in f"{message.role}:{message.content}")
        words = sum(message.content.count(" ") + 1 for message in request.messages)
        if words + request.max_new_tokens > CONTEXT:
            raise InvalidRequest("The prompt and max_new_tokens exceed the context.", param="max_new_tokens")
        return replace(request, prompt_ids=ids)

    def max_characters(self) -> int:
        return CONTEXT * 16

    def submit(self, request: GenerateRequest) -> ScriptedStream:
        if self._stopping:
            raise ModelUnavailable("The service is stopping.", retry_after=5)
        if request.messages[-1].content.startswith("refuse"):
            raise Overloaded("The queue is full.", retry_after=2.2)
        with self._changed:
            self.submitted.append(request)
            stream = ScriptedStream(self, request)
            self._open.add(stream)
        return stream

    def fingerprint(self) -> str:
        return "scripted-1"

    def status(self) -> BackendStatus:
        details = {"open": len(self._open), "submitted": len(self.submitted), "preloaded": self.preloaded}
        details["pid"] = os.getpid()
        return BackendStatus(not self._stopping, "stopping" if self._stopping else "ready", 100, None, details)

    def preload(self, on_failure: Callable[[str], None] | None = None) -> None:
        self.preloaded = True

    def watch(self, on_hang: Callable[[str], None]) -> None:
        """Nothing hangs here."""

    def close(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        with self._changed:
            self._stopping = True
            while self._open and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            for stream in list(self._open):
                stream.give_up()

    def ended(self, stream: ScriptedStream) -> None:
        with self._changed:
            self._open.discard(stream)
            self._changed.notify_all()

    def wait_until_idle(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)
