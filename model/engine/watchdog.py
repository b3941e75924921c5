"""Looks after the model thread from beside it: is it still there, and does it still turn.

Ends nothing: a thread that hangs in native code cannot be ended, so it tells those who can do something about it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from errors import ModelUnavailable
from telemetry import Metrics

SILENT_AFTER = 60.0  # seconds without a turn of the loop, of which a chunk takes one at most; a load is not watched
LOOK_EVERY = 0.5  # seconds

_log = logging.getLogger(__name__)


class Watchdog:
    """busy: whether someone waits for the thread. abandon: tells all of them that nothing follows."""

    def __init__(
        self,
        busy: Callable[[], bool],
        abandon: Callable[[ModelUnavailable], None],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._busy, self._abandon, self._metrics, self._clock = busy, abandon, metrics, clock
        self._beaten = clock()
        self._hung = False
        self.on_hang: Callable[[str], None] | None = None

    def guard(self, thread: threading.Thread, on_death: Callable[[], None]) -> None:
        """Watch a running thread until it has ended, in whatever way, and then call `on_death`."""
        threading.Thread(target=self._watch, args=(thread, on_death), name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The thread turns. A hang that ended by itself stays one: its readers have gone (see `renew`)."""
        self._beaten = self._clock()

    def renew(self) -> None:
        """The thread begins anew, and owes nobody anything."""
        self.beat()
        self._hung = False

    @property
    def trouble(self) -> str | None:
        """What is wrong with the thread, in words for /readyz."""
        late = self._busy() and self._clock() - self._beaten > SILENT_AFTER
        return f"no step for {SILENT_AFTER:.0f} seconds" if self._hung or late else None

    def check(self) -> None:
        """Raises ModelUnavailable when the readers of this thread were sent away."""
        if self._hung:
            raise _hangs()

    def _watch(self, thread: threading.Thread, on_death: Callable[[], None]) -> None:
        before = None
        while thread.is_alive():
            trouble = self.trouble
            if trouble and before and not self._hung:  # seen twice: a machine that was asleep may turn first
                self._send_away(trouble)
            before = trouble
            thread.join(LOOK_EVERY)  # the end of the thread is noticed at once
        on_death()

    def _send_away(self, trouble: str) -> None:
        _log.error("the model hangs (%s): everyone who waits is told", trouble)
        self._metrics.engine_failures.inc()
        self._hung = True
        self._abandon(_hangs())
        if self.on_hang is not None:
            self.on_hang(trouble)


def _hangs() -> ModelUnavailable:
    return ModelUnavailable("the model hangs and has to start again", code="engine_stalled", retry_after=30)
