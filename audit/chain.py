"""One line of the audit log: a JSON object that ends in the HMAC of itself and of the line before.

Knows no file and no key; whoever reads or writes lines brings a Signer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Record = Mapping[str, Any]

_FORM = re.compile(rb'(\{"seq":(\d{1,15}),.*),"mac":"([0-9a-f]{64})"\}\n')


class Signer(Protocol):
    """The part of `keys.Codes` that is needed here: HMACs under named keys."""

    @property
    def newest(self) -> str:
        """The name of the key that signs from now on."""

    def sign(self, key: str, *parts: bytes) -> str:
        """64 hex digits. Raises KeyError when no key has this name."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line as it was read: in form, but not yet checked."""

    seq: int
    body: bytes
    mac: str

    @property
    def record(self) -> dict[str, Any]:
        """What it says. Raises ValueError for what is no JSON, which no line is that follows another."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    def follows(self, mac: str, key: str, signer: Signer) -> bool:
        """Whether this is the line that was written, under `key`, after the one with that `mac`."""
        try:
            return signer.sign(key, mac.encode(), self.body) == self.mac
        except KeyError:
            return False


def write(record: Record, mac: str, key: str, signer: Signer) -> tuple[bytes, str]:
    """The line for `record` after the one with that `mac`, and its own."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    code = signer.sign(key, mac.encode(), body)
    return body[:-1] + ending(code), code


def ending(mac: str) -> bytes:
    """What a line with this `mac` ends in."""
    return f',"mac":"{mac}"}}\n'.encode()


def read(line: bytes) -> Line | None:
    """None for what is not a whole line of ours, byte for byte in form."""
    match = _FORM.fullmatch(line)
    return Line(int(match[2]), match[1] + b"}", match[3].decode()) if match else None


def fragment(name: str, value: object) -> bytes:
    """The bytes that a line holds exactly when its record has this field: quotes inside of texts are escaped."""
    return json.dumps({name: value}, separators=(",", ":"))[1:-1].encode()
