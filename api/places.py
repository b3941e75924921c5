"""How many requests may hold a thread for long: what makes the number of threads in gunicorn.conf.py enough.

Knows no users; what each of them may have open is security/limits.py's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from errors import Overloaded

LOGINS = 16  # two compute their hash at a time, the others wait for that
_SHARING = 16  # generations open beyond what the engine holds: those that share another's


def generations(slots: int, max_queue: int) -> int:
    """How many generations may be open at once: more than the engine holds, so that a full engine refuses first.

    It knows when to come back; these places, which twins fill, do not.
    """
    return slots + max_queue + _SHARING


class Places:
    """`most` places. Whoever finds none free is told at once to come back in `retry_after` seconds."""

    def __init__(self, most: int, retry_after: float) -> None:
        self._free = threading.BoundedSemaphore(most)
        self._retry_after = retry_after

    @contextmanager
    def take(self) -> Iterator[None]:
        """One place, for as long as it is entered. Raises Overloaded."""
        if not self._free.acquire(blocking=False):
            raise Overloaded("Too many requests are waiting here already.", retry_after=self._retry_after)
        try:
            yield
        finally:
            self._free.release()
