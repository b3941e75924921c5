"""Watches the model thread from beside it: is it alive, and does its loop still turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

SILENT_AFTER = 60.0  # seconds without a turn of the loop, of which a chunk takes one at most; a load is not watched
LOOK_EVERY = 0.5  # seconds


class Watchdog:
    """busy: whether requests wait for the thread. on_hang: called once a hang, from the watchdog's own thread.

    `hung` lasts until `beat(fresh=True)`: a hang that ended by itself stays one, for its readers were sent away.
    """

    def __init__(self, busy: Callable[[], bool], on_hang: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._busy, self._on_hang, self._clock = busy, on_hang, clock
        self._beaten = clock()
        self.hung = False

    def guard(self, thread: threading.Thread, on_end: Callable[[], None]) -> None:
        """Watch a running thread until it has ended, in whatever way, and then call `on_end`."""
        threading.Thread(target=self._watch, args=(thread, on_end), name="watchdog", daemon=True).start()

    def beat(self, fresh: bool = False) -> None:
        """The loop turns; `fresh`: over a model just loaded, which owes no answer to any reader."""
        self._beaten = self._clock()
        self.hung = self.hung and not fresh

    @property
    def trouble(self) -> str | None:
        """What is wrong with the thread, for /readyz."""
        late = self._busy() and self._clock() - self._beaten > SILENT_AFTER
        return f"no step for {SILENT_AFTER:.0f} seconds" if self.hung or late else None

    def _watch(self, thread: threading.Thread, on_end: Callable[[], None]) -> None:
        before = None
        while thread.is_alive():
            trouble = self.trouble
            if trouble and before and not self.hung:  # seen twice: a machine that was asleep may turn first
                self.hung = True
                self._on_hang(trouble)
            before = trouble
            thread.join(LOOK_EVERY)  # the end of the thread is noticed at once
        on_end()
