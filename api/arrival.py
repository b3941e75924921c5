"""One request on its way in: tells when all of it is here.

Understands no more of HTTP than where a request ends, and gunicorn parses it all again: a wrong guess here costs only
the one who sent what could be misread.
"""

from __future__ import annotations

import re

HEAD = 64 << 10  # bytes of request line and headers together
ARRIVE = 10.0  # seconds for all of it, as nginx.conf gives headers and body; more for a long one on a slow line
SLOWEST = 16 << 10  # bytes a second of a line that is only slow
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")
_ENCODED = b"\r\ntransfer-encoding:"  # in another way, which is refused
_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n")

_PART = re.compile(rb"[0-9a-fA-F]{0,8}[ \t]*(?:;[^\r\n]{0,256})?\r?")  # what may still become a size


class TooLong(Exception):
    """More than anybody may send. `status` is HTTP's."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Arrival:
    """Collects the bytes of one request. most: bytes of a body that is waited for."""

    def __init__(self, most: int, begun: bytes = b"") -> None:
        self.bytes = bytearray()
        self.whole = False
        self._most, self._head, self._ends = most, 0, 0  # where headers and body end, 0 for not known
        self._chunk, self._decoded = 0, 0  # where the next chunk begins, 0 for a body that is not chunked
        self.add(begun)

    def add(self, more: bytes) -> bool:
        """Whether there is nothing to wait for any more: it is whole, or will be refused whatever follows.

        Raises TooLong for headers without an end, and for chunks that are more than `most`.
        """
        seen = max(0, len(self.bytes) - 3)
        self.bytes += more
        if not self._head and not self._read_head(seen):
            return False
        if self._chunk:
            return self._walk()
        self.whole = len(self.bytes) >= self._ends
        return self.whole or self._ends - self._head > self._most

    def overdue(self, waited: float) -> bool:
        """Whether `waited` seconds are too long for what came in them."""
        return waited > ARRIVE + len(self.bytes) / SLOWEST

    def _read_head(self, seen: int) -> bool:
        end = self.bytes.find(b"\r\n\r\n", seen)
        if (end if end >= 0 else len(self.bytes)) > HEAD:
            raise TooLong(431)
        if end < 0:
            return False
        head, self._head = bytes(self.bytes[: end + 2]).lower(), end + 4
        if _CHUNKED.search(head):
            self._chunk = self._head
        else:
            lengths = _LENGTH.findall(head)
            self._ends = self._head + (int(lengths[0]) if len(lengths) == 1 and _ENCODED not in head else 0)
        return True

    def _walk(self) -> bool:
        """Over the chunks that are here."""
        while size := _SIZE.match(self.bytes, self._chunk):
            length = int(size[1], 16)
            if length == 0:
                self.whole = self.bytes.find(b"\r\n\r\n", size.end() - 2) >= 0
                return self.whole
            self._decoded += length
            self._chunk = size.end() + length + 2
            if self._decoded > self._most:
                raise TooLong(413)
        if len(self.bytes) > 2 * self._most + HEAD:  # chunks of a byte each
            raise TooLong(413)
        return self._chunk < len(self.bytes) and not _PART.fullmatch(self.bytes, self._chunk)
