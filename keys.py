"""The keys for what is kept on disk: the newest writes, the older ones still read.

    python -m keys    add a new key to the file in use; the service takes it up when it starts again

Does not know what is kept under them, nor the key that signs tokens: losing these loses cached answers and stored
contents, and no login.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from crypto import Box, KeyFileError, derive, mac, make_private, read_private
from settings import Settings

NAME = "keys"  # of the file in DATA_DIR, where KEY_FILE names no other
_LINE = re.compile(rb"[0-9a-fA-F]{64}")
_MOST = 64 << 10  # bytes of a key file


class KeyRing:
    """One or more master keys, newest first; each purpose has keys of its own."""

    def __init__(self, masters: Sequence[bytes]) -> None:
        self._masters = tuple(masters)

    @classmethod
    def parse(cls, text: bytes, source: Path) -> KeyRing:
        """The keys in a file's text: 64 hex digits a line, newest first, # for remarks. Raises KeyFileError."""
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith(b"#")]
        if not found or not all(_LINE.fullmatch(line) for line in found):
            raise KeyFileError(f"{source}: needs 64 hex digits a line (for example from: openssl rand -hex 32)")
        return cls([bytes.fromhex(line.decode()) for line in found])

    @classmethod
    def load_or_create(cls, path: Path) -> KeyRing:
        """The keys in `path`, which is made (mode 600, one random key) when it is missing. Raises KeyFileError."""
        try:
            if not path.exists():
                make_private(path, _new_line())
            return cls.parse(read_private(path, _MOST), path)
        except OSError as error:
            raise KeyFileError(f"{path}: {error.strerror}; no key can be kept there") from error

    def box(self, purpose: str) -> Box:
        """Seals with the newest key; opens with any."""
        newest, *older = (derive(master, purpose) for master in self._masters)
        return Box(newest, *older)

    def codes(self, purpose: str) -> Codes:
        return Codes([derive(master, purpose) for master in self._masters])


class Codes:
    """HMACs under named keys, so that a reader can tell which key to check with."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {derive(key, "name", 4).hex(): key for key in keys}
        self.newest = next(iter(self._keys))

    def sign(self, key: str, *parts: bytes) -> str:
        """64 hex digits. Raises KeyError when no key has this name."""
        return mac(self._keys[key], *parts)


def rotate(path: Path) -> None:
    """Put a new key before those in `path`. The file is replaced whole, or not at all. Raises KeyFileError."""
    KeyRing.load_or_create(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        make_private(draft, _new_line() + read_private(path, _MOST))
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise KeyFileError(f"{path}: {error.strerror}; the keys stay as they are") from error


def _new_line() -> bytes:
    return secrets.token_hex(32).encode() + b"\n"


def main() -> None:
    settings = Settings.from_environment()
    path = settings.key_file or settings.data_dir / NAME
    try:
        rotate(path)
    except KeyFileError as error:
        sys.exit(str(error))
    print(f"{path} has a new key in its first line. Restart the service to write with it; the lines below still read.")


if __name__ == "__main__":
    main()
