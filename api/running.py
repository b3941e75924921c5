"""Which generations are under way for whom, so that their owner can cancel them.

Decides nothing about who may ask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from threading import Lock

Close = Callable[[], None]


class Running:
    """Generations by (owner, request id). A caller may use one id twice at a time; a cancel then ends both."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._closers: defaultdict[tuple[str, str], list[Close]] = defaultdict(list)

    def add(self, owner: str, id: str, close: Close) -> Close:
        """Note one generation. Returns what takes the note away again."""
        with self._lock:
            self._closers[owner, id].append(close)

        def remove() -> None:
            with self._lock:
                self._closers[owner, id].remove(close)
                if not self._closers[owner, id]:
                    del self._closers[owner, id]

        return remove

    def cancel(self, owner: str, id: str) -> bool:
        """Close the owner's generations of this id; False when there are none."""
        with self._lock:
            closers = list(self._closers.get((owner, id), ()))
        for close in closers:
            close()
        return bool(closers)
