"""The model thread: admit, prefill, step, emit, cancel, time out, recover.

Imports no torch and knows no text: it moves token ids between requests and a Runner, which it alone touches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from errors import ModelUnavailable, Overloaded
from model.engine.protocol import Runner
from model.engine.queue import WaitingLine, seconds_until_free
from model.engine.scheduler import Batch
from model.engine.sequence import Sequence
from model.engine.watchdog import Watchdog
from model.types import BackendStatus, GenerateRequest
from model.weights.catalogue import ModelError
from telemetry import Metrics

Progress = Callable[[str, int], None]  # stage, percent
Load = Callable[[Progress], Runner]

_log = logging.getLogger(__name__)

RETRY_LOAD_AFTER = 30.0  # seconds between a failed load and the next try, so that a broken model is no busy loop
STOP_PATIENCE = 5.0  # seconds past the grace for the thread to end by itself: a step, or a load, cannot be cut short
MAX_RECOVERIES = 3  # crashes in a row, none having served a token in between, before the engine stays down


class Engine:
    """Serves sequences from one thread, which loads the model when the first request arrives.

    load: makes the Runner, on that thread, telling its stage and percent. max_queue: requests that may wait.
    """

    def __init__(
        self, load: Load, max_queue: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load, self._max_queue, self._metrics, self._clock = load, max_queue, metrics, clock
        self._changed = threading.Condition()
        self._waiting = WaitingLine(metrics)
        self._thread: threading.Thread | None = None
        self._batch: Batch | None = None
        self._stage, self._percent, self._reason = "cold", 0, ""
        self._failed_at = clock() - RETRY_LOAD_AFTER
        self._on_failure: Callable[[str], None] | None = None
        self._stop_at: float | None = None
        self._watchdog = Watchdog(self._busy, self._abandon, metrics, clock)

    def start(self, on_failure: Callable[[str], None] | None = None) -> None:
        """Start the model thread, which loads first. Does nothing when it runs, or failed a moment ago.

        on_failure: called on that thread, with one line, when the model cannot be served.
        """
        with self._changed:
            self._on_failure = on_failure or self._on_failure
            if self._thread is None and self._stop_at is None and self._clock() - self._failed_at >= RETRY_LOAD_AFTER:
                self._stage, self._percent, self._reason = "loading", 0, ""
                self._thread = thread = threading.Thread(target=self._main, name="model", daemon=True)
                thread.start()
                self._watchdog.guard(thread, lambda: self._gone(thread))

    def watch(self, on_hang: Callable[[str], None]) -> None:
        """on_hang: called with one line when the model thread hangs, which only a new process surely heals."""
        self._watchdog.on_hang = on_hang

    def submit(self, request: GenerateRequest) -> Sequence:
        """Queue a request whose `prompt_ids` are set. Raises Overloaded or ModelUnavailable at once."""
        self.start()
        with self._changed:
            if self._stop_at is not None:
                raise ModelUnavailable("the service is stopping", code="stopping", retry_after=5)
            if self._thread is None:
                raise self._unavailable()
            self._watchdog.check()
            if len(self._waiting) >= self._max_queue:
                raise Overloaded("the queue is full", retry_after=seconds_until_free(self._batch, self._waiting.tokens))
            sequence = Sequence(request, self._wake, self._clock(), self._metrics)
            self._waiting.join(sequence)
            if self._batch is None:
                self._waiting.tell_percent(self._percent)
            self._changed.notify_all()
        return sequence

    def stop(self, grace: float) -> None:
        """Admit nothing more; running sequences may end within `grace` seconds, then they fail. Returns when done."""
        with self._changed:
            self._stop_at = self._clock() + grace
            if self._batch is None:
                self._waiting.dismiss(_stopping(), self._clock())  # nobody waits for a load that serves nobody
            self._changed.notify_all()
            thread, serving = self._thread, self._batch is not None
        if thread:
            thread.join(grace * serving + STOP_PATIENCE)
            if thread.is_alive():
                self._abandon(_stopping())
        self._stage = "stopped"

    def _abandon(self, error: ModelUnavailable) -> None:
        """The model thread hangs or is gone: tell every reader, in its place, that nothing follows."""
        with self._changed:
            self._waiting.dismiss(error, self._clock())
            batch = self._batch
        for sequence in list(batch.running) if batch else ():
            sequence.finish(error, self._clock())

    @property
    def context(self) -> int | None:
        """Tokens a slot holds, once that is known."""
        batch = self._batch
        return batch.runner.context if batch else None

    def status(self) -> BackendStatus:
        """The truth for /readyz, from any thread."""
        stage, reason, batch = self._stage, self._reason, self._batch
        if self._stop_at is not None and stage != "stopped":
            stage = "stopping"
        elif stage == "ready" and (trouble := self._watchdog.trouble):
            stage, reason = "stalled", trouble
        details = dict(batch.runner.details()) | {"running": len(batch.running)} if batch else {}
        details["waiting"] = len(self._waiting)
        percent = 100 if stage == "ready" else self._percent
        return BackendStatus(stage == "ready", stage, percent, reason or None, details)

    def _wake(self) -> None:
        """A reader left. While a model loads, nobody else would make room in the queue."""
        with self._changed:
            if self._batch is None:
                self._waiting.sweep(self._clock())
            self._changed.notify_all()

    def _main(self) -> None:
        """The thread's boundary: whatever happens below, every reader hears of it and the status tells it."""
        crashes = 0
        while self._stop_at is None:
            try:
                served = self._life()
            except BaseException as error:
                return self._down(error)
            crashes = 0 if served else crashes + 1
            if crashes > MAX_RECOVERIES:
                return self._down(RuntimeError("the engine kept failing"))
        self._down(None)

    def _life(self) -> bool:
        """Load, and serve until stopped or crashed; whether anything was served. Raises what loading raises.

        What was loaded is let go here, so that the next life finds its memory free.
        """
        self._set_progress("loading", 0)
        batch = Batch(self._load(self._set_progress), self._metrics, self._clock)
        with self._changed:
            self._batch, self._stage, self._percent, self._reason = batch, "ready", 100, ""
            self._watchdog.renew()
        try:
            self._serve(batch)
        except BaseException as error:
            self._crashed(batch, error)
        finally:
            batch.runner.close()
        return batch.steps > 0

    def _serve(self, batch: Batch) -> None:
        """One turn: let go of what ended, admit, compute one chunk of one prompt, step everyone else."""
        while self._wait_for_work(batch):
            batch.reap()
            self._admit(batch)
            batch.prefill()
            batch.step()
            self._watchdog.check()

    def _wait_for_work(self, batch: Batch) -> bool:
        """Sleep until there is something to do; False when the engine is stopped and has nothing left to end."""
        self._watchdog.beat()
        while self._idle(batch):
            self._watchdog.beat()
            if not batch.adopt(idle=True):
                self._sleep(batch)
        with self._changed:
            if self._stop_at is None:
                return True
            self._waiting.dismiss(_stopping(), self._clock())
        if batch.running and self._clock() >= self._stop_at:
            batch.fail_all(_stopping())
        return bool(batch.running)

    def _busy(self) -> bool:
        """Whether someone waits for a model that is loaded."""
        batch = self._batch
        return batch is not None and bool(batch.running or self._waiting)

    def _idle(self, batch: Batch) -> bool:
        return self._stop_at is None and not batch.running and not self._waiting

    def _sleep(self, batch: Batch) -> None:
        """Until something changes, or for a second: a step may have been compiled meanwhile."""
        with self._changed:
            if self._idle(batch):
                self._metrics.tokens_per_second.set(0)
                self._changed.wait(timeout=1.0)

    def _admit(self, batch: Batch) -> None:
        """Move waiting sequences to free slots, and tell the others where they stand."""
        with self._changed:
            self._waiting.sweep(self._clock())
            while self._waiting and not batch.full:
                batch.admit(self._waiting.first())
            self._waiting.tell_positions(lambda tokens: seconds_until_free(batch, tokens))

    def _set_progress(self, stage: str, percent: int) -> None:
        with self._changed:
            self._stage, self._percent = stage, percent
            self._waiting.sweep(self._clock())
            self._waiting.tell_percent(percent)

    def _crashed(self, batch: Batch, error: BaseException) -> None:
        _log.error("engine crashed, loading again", exc_info=error)
        self._metrics.engine_failures.inc()
        with self._changed:
            self._batch, self._stage, self._reason = None, "loading", "recovering from a crash"
        batch.fail_all(ModelUnavailable("the engine failed and starts again", code="engine_failed", retry_after=5))

    def _down(self, error: BaseException | None) -> None:
        """The thread ends here; a later request may start another one (see `start`)."""
        if error is not None:
            _log.error("the model is down: %s", error, exc_info=None if isinstance(error, ModelError) else error)
        with self._changed:
            self._failed_at = self._clock()
            self._stage = "failed" if error is not None else "stopped"
            self._reason = "the model could not be loaded, see the log" if error is not None else ""
            self._abandon(_stopping() if error is None else self._unavailable())
            self._thread = self._batch = None
            on_failure = self._on_failure
        if error is not None and on_failure is not None:
            on_failure(str(error))

    def _gone(self, thread: threading.Thread) -> None:
        """The model thread has ended; if it was killed and could not say so, this does."""
        if self._thread is thread:
            self._down(RuntimeError("the model thread was killed"))

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(self._reason, retry_after=RETRY_LOAD_AFTER)


def _stopping() -> ModelUnavailable:
    return ModelUnavailable("the service is stopping", code="stopping", retry_after=5)
