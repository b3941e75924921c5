"""A circuit breaker: after some faults in a row the other side is left alone for a while.

Does not call anything and catches nothing; the caller asks before and reports after.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Opens after `faults` in a row; every `rest` seconds one probe may try, and its success closes it again.

    `on_change` is told True when it opens and False when it closes.
    """

    def __init__(
        self,
        faults: int = 5,
        rest: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[bool], None] = lambda opened: None,
    ) -> None:
        self._most, self._rest, self._clock, self._on_change = faults, rest, clock, on_change
        self._faults = 0
        self._next_probe = 0.0
        self._lock = threading.Lock()

    @property
    def opened(self) -> bool:
        return self._faults >= self._most

    def allows(self) -> bool:
        """Whether to try now. A probe that never reports back does not block the next one."""
        with self._lock:
            if self.opened:
                if self._clock() < self._next_probe:
                    return False
                self._next_probe = self._clock() + self._rest
            return True

    def succeeded(self) -> None:
        with self._lock:
            opened, self._faults = self.opened, 0
            if opened:
                self._on_change(False)

    def failed(self) -> None:
        with self._lock:
            opened, self._faults = self.opened, self._faults + 1
            self._next_probe = self._clock() + self._rest
            if self.opened and not opened:
                self._on_change(True)
