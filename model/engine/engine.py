"""The model thread: load, admit, prefill, step, time out, recover, stop; and the watchdog that starts and ends it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from errors import ModelUnavailable, Overloaded, ServiceError
from model.engine.scheduler import Runner, Scheduler, bounded_seconds
from model.engine.sequence import RequestQueue, Sequence
from model.types import BackendStatus, GenerateRequest, Progress, Status
from model.weights.catalogue import ModelError
from telemetry import Metrics

Load = Callable[[Progress], Runner]

_log = logging.getLogger(__name__)

RETRY_LOAD_AFTER = 30.0  # seconds between a failed load and the next try, so that a broken model is no busy loop
STOP_PATIENCE = 5.0  # seconds past the grace for the thread to end by itself: a step, or a load, cannot be cut short
MAX_RECOVERIES = 3  # crashes in a row, none having served a token in between, before the engine stays down
SILENT_AFTER = 60.0  # seconds without a turn of the loop, of which a chunk takes one at most; a load is not watched
LOOK_EVERY = 0.5  # seconds between two looks of the watchdog

_stopping = partial(ModelUnavailable, "the service is stopping", code="stopping", retry_after=5)
_stalled = partial(ModelUnavailable, "the model hangs and has to start again", code="engine_stalled", retry_after=30)


class Engine:
    """Serves sequences from one thread, which loads the model when the first request arrives.

    load: makes the Runner, on that thread, reporting stage and percent. max_queue: requests that may wait for a slot.
    slots: how many requests are expected to find one, until the model is loaded.
    """

    def __init__(
        self, load: Load, max_queue: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic, slots: int = 0
    ) -> None:
        self._load, self._max_queue, self._slots = load, max_queue, slots
        self._metrics, self._clock = metrics, clock
        self._changed = threading.Condition()
        self._queue = RequestQueue()
        self._watchdog: threading.Thread | None = None  # while there is a model thread
        self._error: BaseException | None = None  # what ended the model thread
        self._scheduler: Scheduler | None = None  # while a model is loaded
        self._stage, self._percent, self._reason = "cold", 0, ""
        self.context = 0  # tokens that a request may have, once that is known
        self._failed_at = clock() - RETRY_LOAD_AFTER
        self._stop_at: float | None = None
        self._beaten = clock()  # when the loop last turned
        self._hung = False  # until the next load: a hang that ended by itself stays one, its readers were sent away
        # Called from other threads with one line: the model cannot be served; only a new process surely heals.
        self.on_failure: Callable[[str], None] = lambda reason: None
        self.on_hang: Callable[[str], None] = lambda reason: None
        metrics.waiting.set_function(lambda: len(self._queue))
        metrics.running.set_function(lambda: len(self._running()))

    def start(self) -> None:
        """Start the model thread, which loads first. Does nothing when it runs, or failed a moment ago."""
        with self._changed:
            if self._watchdog is None and self._stop_at is None and self._clock() - self._failed_at >= RETRY_LOAD_AFTER:
                self._stage, self._reason = "loading", ""
                self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._watchdog.start()

    def submit(self, request: GenerateRequest) -> Sequence:
        """Queue a request whose `prompt_ids` are set. Raises Overloaded or ModelUnavailable at once."""
        self.start()
        with self._changed:
            scheduler = self._scheduler
            if self._stop_at is not None:
                raise _stopping()
            if self._watchdog is None:
                raise self._unavailable()
            if self._hung:
                raise _stalled()
            if len(self._queue) - (scheduler.free if scheduler else self._slots) >= self._max_queue:
                seconds = scheduler.seconds_until_free if scheduler else bounded_seconds  # loading: one token a second
                raise Overloaded("the queue is full", retry_after=seconds(sum(s.left for s in self._queue)))
            sequence = Sequence(request, self._wake, self._clock(), self._metrics)
            self._queue.append(sequence)
            if scheduler is None:
                sequence.announce(Status("loading", percent=self._percent))
            self._changed.notify_all()
        return sequence

    def stop(self, grace: float) -> None:
        """Admit nothing more; running sequences may end within `grace` seconds, then they fail. Returns when done."""
        with self._changed:
            self._stop_at = self._clock() + grace
            watchdog, serving = self._watchdog, self._scheduler is not None
            self._queue.sweep(self._clock(), _stopping())
            self._changed.notify_all()
        if watchdog:
            watchdog.join(grace * serving + STOP_PATIENCE)
            if watchdog.is_alive():
                self._abandon(_stopping())
        self._stage = "stopped"

    def status(self) -> BackendStatus:
        """What /readyz tells, from any thread."""
        stage, reason, scheduler = self._stage, self._reason, self._scheduler
        if self._stop_at is not None and stage != "stopped":
            stage = "stopping"
        elif stage == "ready" and (trouble := self._trouble()):
            stage, reason = "stalled", trouble
        details = dict(scheduler.details()) if scheduler else {}
        details["waiting"] = len(self._queue)
        return BackendStatus(stage == "ready", stage, self._percent, reason or None, details)

    def _running(self) -> list[Sequence]:
        scheduler = self._scheduler
        return scheduler.running + scheduler.preempted if scheduler else []

    def _wake(self) -> None:
        """A reader left: its place in the queue is free at once, its row and blocks before the next step."""
        with self._changed:
            self._queue.sweep(self._clock())
            self._changed.notify_all()

    def _watch(self) -> None:
        """The watchdog: runs the model thread, sees whether its loop still turns, and tells everyone when it ended."""
        thread, before = threading.Thread(target=self._main, name="model", daemon=True), None
        thread.start()
        while thread.is_alive():
            trouble = self._trouble()
            if trouble and before and not self._hung:  # seen twice: a machine that was asleep may turn first
                self._hung = True
                _log.error("the model hangs (%s): all its requests fail", trouble)
                self._metrics.engine_failures.inc()
                self._abandon(_stalled())
                self.on_hang(trouble)
            before = trouble
            thread.join(LOOK_EVERY)  # the end of the thread is noticed at once
        self._down()

    def _trouble(self) -> str | None:
        """What is wrong with the thread: requests wait for a loaded model, and nothing moves."""
        busy = self._scheduler is not None and (self._running() or self._queue)
        late = busy and self._clock() - self._beaten > SILENT_AFTER
        return f"no step for {SILENT_AFTER:.0f} seconds" if self._hung or late else None

    def _main(self) -> None:
        """The thread's boundary: whatever happens below, the watchdog hears of it."""
        crashes = 0
        try:
            while self._stop_at is None:
                crashes = 0 if self._load_and_serve() else crashes + 1
                if crashes > MAX_RECOVERIES:
                    raise RuntimeError("the engine kept failing")
        except BaseException as error:
            self._error = error

    def _load_and_serve(self) -> bool:
        """Until stopped or crashed; whether anything was served. Raises what loading raises.

        What was loaded is let go of here, so that the next load finds its memory free.
        """
        self._report("loading", 0)
        scheduler = Scheduler(self._load(self._report), self._metrics, self._clock)
        with self._changed:
            self._scheduler, self.context = scheduler, scheduler.runner.context
            self._stage, self._percent, self._reason = "ready", 100, ""
            self._beaten, self._hung = self._clock(), False
        try:
            while self._wait_for_work(scheduler):
                scheduler.reap()
                self._admit(scheduler)
                scheduler.prefill()
                scheduler.step()
                if self._hung:
                    raise _stalled()
        except BaseException as error:
            _log.error("engine crashed, loading again", exc_info=error)
            self._metrics.engine_failures.inc()
            with self._changed:
                self._scheduler, self._stage, self._reason = None, "loading", "recovering from a crash"
            scheduler.fail_all(ModelUnavailable("the engine failed, ask again", code="engine_failed", retry_after=5))
        finally:
            scheduler.runner.close()
        return scheduler.steps > 0

    def _admit(self, scheduler: Scheduler) -> None:
        with self._changed:
            self._queue.sweep(self._clock())
            scheduler.admit(self._queue)
            self._queue.announce_positions(scheduler.seconds_until_free)

    def _wait_for_work(self, scheduler: Scheduler) -> bool:
        """Sleep until there is something to do; False once the engine is stopped and has nothing left to end."""
        self._beaten = self._clock()
        while self._idle():
            if not scheduler.load_compiled(idle=True):
                self._metrics.tokens_per_second.set(0)
                with self._changed:  # but for a second: a step may have been compiled meanwhile
                    self._changed.wait_for(lambda: not self._idle(), timeout=1.0)
            self._beaten = self._clock()
        if self._stop_at is None:
            return True
        if self._clock() < self._stop_at:
            return bool(self._running())
        scheduler.fail_all(_stopping())
        return False

    def _idle(self) -> bool:
        return self._stop_at is None and not self._running() and not self._queue

    def _report(self, stage: str, percent: int) -> None:
        with self._changed:
            self._stage, self._percent = stage, percent
            self._queue.sweep(self._clock())
            for sequence in self._queue:
                sequence.announce(Status("loading", percent=percent))

    def _down(self) -> None:
        """The thread has ended; a later request may start another one (see `start`)."""
        error, self._error = self._error, None  # it holds on to what was loaded
        if error is not None:
            expected = isinstance(error, ModelError | ServiceError)
            _log.error("the model is down: %s", error, exc_info=None if expected else error)
        with self._changed:
            self._failed_at, self._stage, self._reason = self._clock(), "stopped", ""
            if error is not None:
                self._stage, self._reason = "failed", "the model could not be loaded, see the log"
            if isinstance(error, ServiceError):  # its message is meant for clients, and holds no path
                self._reason = error.message
            self._abandon(_stopping() if error is None else self._unavailable())
            self._watchdog = self._scheduler = None
        if error is not None:
            self.on_failure(str(error))

    def _abandon(self, error: ModelUnavailable) -> None:
        """Tell every reader, in the model thread's place, that nothing follows."""
        with self._changed:
            self._queue.sweep(self._clock(), error)
        if scheduler := self._scheduler:
            scheduler.fail_all(error)

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(self._reason, retry_after=RETRY_LOAD_AFTER)
