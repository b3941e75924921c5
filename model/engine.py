"""The model thread: admit, prefill, step, emit, cancel, time out, recover.

Imports no torch and knows no text: it moves token ids between requests and a Runner, which it alone touches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from model.registry import ModelError
from model.scheduler import Batch, Runner
from model.sequence import Sequence
from model.types import BackendStatus, GenerateRequest, ModelUnavailable, Overloaded, ServiceError, Status
from telemetry import Metrics

Progress = Callable[[str, int], None]  # stage, percent
Load = Callable[[Progress], Runner]

_log = logging.getLogger(__name__)

RETRY_LOAD_AFTER = 30.0  # seconds between a failed load and the next try, so that a broken model is no busy loop
STALLED_AFTER = 60.0  # seconds without a turn of the loop before /readyz says so; a chunk takes one at most
STOP_PATIENCE = 5.0  # seconds past the grace for the thread to end by itself: a step, or a load, cannot be cut short
MAX_RECOVERIES = 3  # crashes in a row, none having served a token in between, before the engine stays down


class Clock(Protocol):
    def __call__(self) -> float: ...


class Engine:
    """Serves sequences from one thread, which loads the model when the first request arrives.

    load: makes the Runner, on that thread, telling its stage and percent. max_queue: requests that may wait.
    """

    def __init__(self, load: Load, max_queue: int, metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self._load, self._max_queue, self._metrics, self._clock = load, max_queue, metrics, clock
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._thread: threading.Thread | None = None
        self._batch: Batch | None = None
        self._stage, self._percent, self._reason = "cold", 0, ""
        self._failed_at = -RETRY_LOAD_AFTER
        self._stop_at: float | None = None
        self._turn = clock()

    def start(self) -> None:
        """Start the model thread, which loads first. Does nothing when it runs, or failed a moment ago."""
        with self._changed:
            if self._thread is None and self._stop_at is None and self._clock() - self._failed_at >= RETRY_LOAD_AFTER:
                self._stage, self._percent, self._reason, self._turn = "loading", 0, "", self._clock()
                self._thread = threading.Thread(target=self._main, name="model", daemon=True)
                self._thread.start()

    def submit(self, request: GenerateRequest) -> Sequence:
        """Queue a request whose `prompt_ids` are set. Raises Overloaded or ModelUnavailable at once."""
        self.start()
        with self._changed:
            if self._stop_at is not None:
                raise ModelUnavailable("the service is stopping", code="stopping", retry_after=5)
            if self._thread is None:
                raise self._unavailable()
            if len(self._waiting) >= self._max_queue:
                raise Overloaded("the queue is full", retry_after=self._seconds_for(self._backlog()))
            sequence = Sequence(request, self._wake, self._clock())
            if self._batch is None:
                sequence.announce(Status("loading", percent=self._percent))
            self._waiting.append(sequence)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()
        return sequence

    def stop(self, grace: float) -> None:
        """Admit nothing more; running sequences may end within `grace` seconds, then they fail. Returns when done."""
        with self._changed:
            self._stop_at = self._clock() + grace
            if self._batch is None:
                self._fail(self._waiting, _stopping())  # nobody waits for a load that serves nobody
            self._changed.notify_all()
            thread = self._thread
        if thread:
            thread.join(grace + STOP_PATIENCE)
        self._stage = "stopped"

    def status(self) -> BackendStatus:
        """The truth for /readyz, from any thread."""
        stage, reason, batch = self._stage, self._reason, self._batch
        if self._stop_at is not None and stage != "stopped":
            stage = "stopping"
        elif stage == "ready" and batch and batch.running and self._clock() - self._turn > STALLED_AFTER:
            stage, reason = "stalled", f"no step for {STALLED_AFTER:.0f} seconds"
        details = dict(batch.runner.details()) | {"running": len(batch.running)} if batch else {}
        details["waiting"] = len(self._waiting)
        percent = 100 if stage == "ready" else self._percent
        return BackendStatus(stage == "ready", stage, percent, reason or None, details)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _main(self) -> None:
        """The thread's boundary: whatever happens below, every reader hears of it and the status tells it."""
        crashes = 0
        while self._stop_at is None and crashes <= MAX_RECOVERIES:
            try:
                batch = self._loaded()
            except BaseException as error:
                return self._down(error)
            try:
                self._serve(batch)
            except BaseException as error:
                crashes = 0 if batch.steps else crashes + 1
                self._crashed(batch, error)
            finally:
                batch.runner.close()
        self._down(None if self._stop_at is not None else RuntimeError("the engine kept failing"))

    def _loaded(self) -> Batch:
        self._set_progress("loading", 0)
        batch = Batch(self._load(self._set_progress), self._metrics, self._clock)
        with self._changed:
            self._batch, self._stage, self._percent = batch, "ready", 100
        return batch

    def _serve(self, batch: Batch) -> None:
        """One turn: let go of what ended, admit, compute one chunk of one prompt, step everyone else."""
        while self._wait_for_work(batch):
            self._turn = self._clock()
            self._reap(batch)
            self._admit(batch)
            batch.prefill()
            batch.step()

    def _wait_for_work(self, batch: Batch) -> bool:
        """Sleep until there is something to do; False when the engine is stopped and has nothing left to end."""
        while self._idle(batch):
            if not batch.adopt(idle=True):
                self._sleep(batch)
        with self._changed:
            if self._stop_at is None:
                return True
            self._fail(self._waiting, _stopping())
        if batch.running and self._clock() >= self._stop_at:
            batch.fail_all(_stopping())
        return bool(batch.running)

    def _idle(self, batch: Batch) -> bool:
        return self._stop_at is None and not batch.running and not self._waiting

    def _sleep(self, batch: Batch) -> None:
        """Until something changes, or for a second: a step may have been compiled meanwhile."""
        with self._changed:
            if self._idle(batch):
                self._changed.wait(timeout=1.0)

    def _reap(self, batch: Batch) -> None:
        batch.reap()
        with self._changed:
            gone = [sequence for sequence in self._waiting if batch.ended(sequence)]
            for sequence in gone:
                self._waiting.remove(sequence)

    def _admit(self, batch: Batch) -> None:
        """Move waiting sequences to free slots, in order of arrival, and tell the others where they stand."""
        with self._changed:
            while self._waiting and batch.admit(self._waiting[0]):
                self._waiting.popleft()
            ahead = 0
            for position, sequence in enumerate(self._waiting, 1):
                sequence.announce(Status("queued", position=position, eta_seconds=self._seconds_for(ahead)))
                ahead += sequence.left
            self._metrics.waiting.set(len(self._waiting))

    def _backlog(self) -> int:
        return sum(sequence.left for sequence in self._waiting)

    def _seconds_for(self, tokens: int) -> float:
        """Time until a slot is free after `tokens` more, at the speed measured so far; never under a second."""
        batch = self._batch
        soonest = min((sequence.left for sequence in list(batch.running)), default=0) if batch else 0
        speed = batch.speed if batch else 1.0
        lanes = max(1, len(batch.running)) if batch else 1
        return round(min(600.0, max(1.0, (tokens + soonest * lanes) / speed)), 1)

    def _set_progress(self, stage: str, percent: int) -> None:
        self._turn = self._clock()
        with self._changed:
            self._stage, self._percent = stage, percent
            for sequence in self._waiting:
                sequence.announce(Status("loading", percent=percent))

    def _crashed(self, batch: Batch, error: BaseException) -> None:
        _log.error("engine crashed, loading again", exc_info=error)
        self._metrics.engine_failures.inc()
        with self._changed:
            self._batch, self._stage, self._reason = None, "loading", "recovering from a crash"
        batch.fail_all(ModelUnavailable("the engine failed and is starting again", code="engine_failed", retry_after=5))

    def _down(self, error: BaseException | None) -> None:
        """The thread ends here; a later request may start another one (see `start`)."""
        if error is not None:
            _log.error("the model is down: %s", error, exc_info=None if isinstance(error, ModelError) else error)
        with self._changed:
            self._thread = self._batch = None
            self._failed_at = self._clock()
            self._stage = "failed" if error is not None else "stopped"
            self._reason = "the model could not be loaded, see the log" if error is not None else ""
            self._fail(self._waiting, _stopping() if error is None else self._unavailable())

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(self._reason, retry_after=RETRY_LOAD_AFTER)

    def _fail(self, sequences: deque[Sequence], error: ServiceError) -> None:
        while sequences:
            sequences.popleft().finish(error)
        self._metrics.waiting.set(0)


def _stopping() -> ModelUnavailable:
    return ModelUnavailable("the service is stopping", code="stopping", retry_after=5)
