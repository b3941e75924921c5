"""Key files, encryption and HMACs: AES-256-GCM, HKDF and HMAC with SHA-256.

python -m crypto    put a new key before those in the key file; the service uses it from its next start
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from settings import Settings, SettingsError, usable

_HEADER, _NONCE = 5, 12  # bytes; NIST SP 800-38D allows 96 random bits for 2^32 messages a key
_LINE = re.compile(rb"[0-9a-fA-F]{64}")


class SealBroken(ValueError):
    """Sealed bytes that cannot be opened. The message says why."""


def derive(master: bytes, purpose: str, size: int = 32) -> bytes:
    """A key for one purpose only (HKDF, RFC 5869); knowing it tells nothing about the master or the others."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=purpose.encode()).derive(master)


def mac(key: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 in hex; each part goes in behind its length, so ("ab", "c") is not ("a", "bc")."""
    return hmac.digest(key, b"".join(len(part).to_bytes(8, "big") + part for part in parts), "sha256").hex()


class Encryptor:
    """Encrypts bytes for a context (AES-256-GCM), and decrypts them for that context only.

    `key` encrypts; `older` keys still decrypt, so that keys can be rotated.
    Sealed: version, key id, nonce, ciphertext with its tag.
    """

    def __init__(self, key: bytes, *older: bytes) -> None:
        self._ciphers = {_header(each): AESGCM(derive(each, "box")) for each in (*older, key)}
        self._newest = _header(key)

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """`plain`, encrypted; opens only with the same `context`."""
        nonce = secrets.token_bytes(_NONCE)
        sealed = self._ciphers[self._newest].encrypt(nonce, plain, context + self._newest)
        return self._newest + nonce + sealed

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed. Raises SealBroken."""
        header, nonce, rest = sealed[:_HEADER], sealed[_HEADER : _HEADER + _NONCE], sealed[_HEADER + _NONCE :]
        try:
            return self._ciphers[header].decrypt(nonce, rest, context + header)
        except (KeyError, ValueError, InvalidTag):
            raise SealBroken("sealed with another key or for another context, or changed since") from None


def _header(key: bytes) -> bytes:
    return b"\x01" + derive(key, "key id", 4)  # the format's version, and which key


class MacKeys:
    """HMACs under named keys, so that a reader can tell which key to check with."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {derive(key, "name", 4).hex(): key for key in keys}
        self.newest = next(iter(self._keys))

    def sign(self, key: str, *parts: bytes) -> str:
        """64 hex digits. Raises KeyError when no key has this name."""
        return mac(self._keys[key], *parts)


class KeyRing:
    """One or more master keys, newest first; each purpose has keys of its own."""

    def __init__(self, masters: Sequence[bytes]) -> None:
        self._masters = tuple(masters)

    @classmethod
    def parse(cls, text: bytes, source: Path) -> KeyRing:
        """The keys in a file's text: 64 hex digits a line, newest first, # for remarks. Raises SettingsError."""
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith(b"#")]
        if not found or not all(_LINE.fullmatch(line) for line in found):
            raise SettingsError(f"{source}: needs 64 hex digits a line (for example from: openssl rand -hex 32)")
        return cls([bytes.fromhex(line.decode()) for line in found])

    @classmethod
    def load_or_create(cls, path: Path) -> KeyRing:
        """The keys in `path`, which is made (mode 600, one random key) when it is missing. Raises SettingsError."""
        return cls.parse(_read_or_create(path, secrets.token_hex(32).encode() + b"\n"), path)

    def encryptor(self, purpose: str) -> Encryptor:
        return Encryptor(*(derive(master, purpose) for master in self._masters))

    def mac_keys(self, purpose: str) -> MacKeys:
        return MacKeys([derive(master, purpose) for master in self._masters])


def load_or_create_key(path: Path) -> bytes:
    """The secret in `path`, made there (mode 600) when the file is missing. Raises SettingsError."""
    key = _read_or_create(path, secrets.token_bytes(32))
    if len(key) != 32:
        raise SettingsError(f"{path}: must hold exactly 32 random bytes; delete it to have a new one made")
    return key


def signing_secret(settings: Settings) -> bytes:
    """What signs tokens, and names cached answers and API keys. Raises SettingsError."""
    if settings.jwt_secret_file is None:
        return load_or_create_key(settings.data_dir / "secret")
    with usable("JWT_SECRET_FILE", "read"):
        secret = settings.jwt_secret_file.read_bytes().strip()
    if len(secret) < 32:
        raise SettingsError("JWT_SECRET_FILE: needs 32 characters or more (for example from: openssl rand -hex 32)")
    return secret


def key_ring(settings: Settings) -> KeyRing:
    """What encrypts cached answers and stored contents, and signs the audit log. Raises SettingsError."""
    if settings.key_file is None:
        return KeyRing.load_or_create(settings.data_dir / "keys")
    with usable("KEY_FILE", "read"):
        return KeyRing.parse(settings.key_file.read_bytes(), settings.key_file)


def rotate(path: Path) -> None:
    """Put a new key before those in `path`. The file is replaced whole, or not at all. Raises SettingsError."""
    try:
        content = _read_private(path)
        KeyRing.parse(content, path)
        _write_private(path, secrets.token_hex(32).encode() + b"\n" + content, os.replace)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; the keys stay as they are") from error


def _read_or_create(path: Path, content: bytes) -> bytes:
    """Processes that start together read the same: only one of them can link its file to `path`."""
    try:
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                _write_private(path, content, os.link)
        return _read_private(path)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; no key can be kept there") from error


def _write_private(path: Path, content: bytes, place: Callable[[Path, Path], None]) -> None:
    """A file of mode 600 that is durable before `place` gives it its name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        place(draft, path)


def _read_private(path: Path) -> bytes:
    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o7777
        if mode & 0o037:  # a group may read, as Kubernetes mounts secrets, but not write; others may nothing
            raise SettingsError(f"{path}: mode {mode:o} is too open for a secret; run chmod 600 on it")
        return file.read(64 << 10)


if __name__ == "__main__":
    try:
        settings = Settings.from_environment()
        path = settings.key_file or settings.data_dir / "keys"
        rotate(path)
    except SettingsError as error:
        sys.exit(str(error))
    print(f"{path} has a new key in its first line. Restart the service to write with it; the lines below still read.")
