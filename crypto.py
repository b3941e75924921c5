"""Key files, encryption and HMACs: AES-256-GCM, HKDF and HMAC with SHA-256.

python -m crypto    put a new key before those in the key file; the service uses it from its next start
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from settings import Settings, SettingsError

_VERSION = b"\x01"
_ID = 4  # bytes of a key's name in the header
_NONCE = 12  # 96 random bits, as NIST SP 800-38D allows for 2^32 messages a key
_HEADER = len(_VERSION) + _ID
_LINE = re.compile(rb"[0-9a-fA-F]{64}")
_MAX_KEY_FILE = 64 << 10  # bytes


class KeyFileError(Exception):
    """A key file that must not be used. The message is one line: the file, and what to do."""


class SealBroken(ValueError):
    """These bytes were sealed with another key or for another context, or were changed since."""


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
        self._ciphers = {derive(each, "key id", _ID): AESGCM(derive(each, "box")) for each in (*older, key)}
        self._newest = derive(key, "key id", _ID)

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """`plain`, encrypted; opens only with the same `context`."""
        header, nonce = _VERSION + self._newest, secrets.token_bytes(_NONCE)
        return header + nonce + self._ciphers[self._newest].encrypt(nonce, plain, context + header)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed. Raises SealBroken."""
        header, nonce, rest = sealed[:_HEADER], sealed[_HEADER : _HEADER + _NONCE], sealed[_HEADER + _NONCE :]
        cipher = self._ciphers.get(header[1:])
        if cipher is None or header[:1] != _VERSION or len(nonce) != _NONCE:
            raise SealBroken("sealed with no key that we have")
        try:
            return cipher.decrypt(nonce, rest, context + header)
        except InvalidTag:
            raise SealBroken("the seal is broken") from None


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
        """The keys in a file's text: 64 hex digits a line, newest first, # for remarks. Raises KeyFileError."""
        lines = [line.strip() for line in text.splitlines()]
        found = [line for line in lines if line and not line.startswith(b"#")]
        if not found or not all(_LINE.fullmatch(line) for line in found):
            raise KeyFileError(f"{source}: needs 64 hex digits a line (for example from: openssl rand -hex 32)")
        return cls([bytes.fromhex(line.decode()) for line in found])

    @classmethod
    def load_or_create(cls, path: Path) -> KeyRing:
        """The keys in `path`, which is made (mode 600, one random key) when it is missing. Raises KeyFileError."""
        return cls.parse(_read_or_create(path, _new_line(), _MAX_KEY_FILE), path)

    def encryptor(self, purpose: str) -> Encryptor:
        return Encryptor(*(derive(master, purpose) for master in self._masters))

    def mac_keys(self, purpose: str) -> MacKeys:
        return MacKeys([derive(master, purpose) for master in self._masters])


def load_or_create_key(path: Path) -> bytes:
    """The secret in `path`, made there (mode 600) when the file is missing. Raises KeyFileError."""
    key = _read_or_create(path, secrets.token_bytes(32), 33)
    if len(key) != 32:
        raise KeyFileError(f"{path}: must hold exactly 32 random bytes; delete it to have a new one made")
    return key


def signing_secret(settings: Settings) -> bytes:
    """What signs tokens, and names cached answers and API keys. Raises SettingsError, KeyFileError."""
    if settings.jwt_secret_file is None:
        return load_or_create_key(settings.data_dir / "secret")
    secret = _read_secret("JWT_SECRET_FILE", settings.jwt_secret_file)
    if len(secret) < 32:
        raise SettingsError("JWT_SECRET_FILE: needs 32 characters or more (for example from: openssl rand -hex 32)")
    return secret


def key_ring(settings: Settings) -> KeyRing:
    """What encrypts cached answers and stored contents, and signs the audit log. Raises SettingsError, KeyFileError."""
    if settings.key_file is None:
        return KeyRing.load_or_create(settings.data_dir / "keys")
    return KeyRing.parse(_read_secret("KEY_FILE", settings.key_file), settings.key_file)


def _read_secret(setting: str, file: Path) -> bytes:
    """The file's content without the space around it. Raises SettingsError."""
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {file}: {error.strerror}") from None


def rotate(path: Path) -> None:
    """Put a new key before those in `path`. The file is replaced whole, or not at all. Raises KeyFileError."""
    try:
        content = _read_private(path, _MAX_KEY_FILE)
        KeyRing.parse(content, path)
        draft = _write_draft(path, _new_line() + content)
        try:
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; the keys stay as they are") from error


def _new_line() -> bytes:
    return secrets.token_hex(32).encode() + b"\n"


def _read_or_create(path: Path, content: bytes, max_bytes: int) -> bytes:
    """Two processes that start together read the same: the file appears whole, by a link that only one can make."""
    try:
        if not path.exists():
            draft = _write_draft(path, content)
            with suppress(FileExistsError):
                os.link(draft, path)
            draft.unlink()
        return _read_private(path, max_bytes)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; no key can be kept there") from error


def _write_draft(path: Path, content: bytes) -> Path:
    """A durable file (mode 600) beside `path`. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600 from the start
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(draft)


def _read_private(path: Path, max_bytes: int) -> bytes:
    """Raises KeyFileError for a file that others may touch, OSError."""
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        content = file.read(max_bytes)
    if mode & 0o037:  # a group may read, as Kubernetes mounts secrets, but not write; others may nothing
        raise KeyFileError(f"{path}: mode {mode:o} is too open for a secret; run chmod 600 on it")
    return content


def main() -> None:
    try:
        settings = Settings.from_environment()
        path = settings.key_file or settings.data_dir / "keys"
        rotate(path)
    except (SettingsError, KeyFileError) as error:
        sys.exit(str(error))
    print(f"{path} has a new key in its first line. Restart the service to write with it; the lines below still read.")


if __name__ == "__main__":
    main()
