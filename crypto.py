"""Keys, sealed boxes and message codes: the few cryptographic shapes this service uses.

Does not decide what is secret, and invents nothing: AES-256-GCM, HKDF and HMAC with SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_VERSION = b"\x01"
_ID = 4  # bytes of a key's name in the header
_NONCE = 12  # 96 bits at random, as NIST SP 800-38D allows for 2^32 boxes a key
_HEADER = len(_VERSION) + _ID


class KeyFileError(Exception):
    """A key file that must not be used. The message is one line: the file, and what to do."""


class SealBroken(ValueError):
    """These bytes were not sealed by us, not for this context, or not left alone."""


def load_or_create_key(path: Path, size: int = 32) -> bytes:
    """The secret in `path`, made there (mode 600) when the file is missing. Raises KeyFileError.

    Two processes that start together get the same key: the file appears whole, by a link that only one can make.
    """
    try:
        if not path.exists():
            make_private(path, secrets.token_bytes(size))
        key = read_private(path, size + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; no key can be kept there") from error
    if len(key) != size:
        raise KeyFileError(f"{path}: must hold exactly {size} random bytes; delete it to have a new one made")
    return key


def make_private(path: Path, content: bytes) -> None:
    """Make this file (mode 600), durable and whole; where there is one already, it stays. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600 from the start
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process won: its key is the key
            os.link(draft, path)
    finally:
        os.unlink(draft)


def read_private(path: Path, most: int) -> bytes:
    """Up to `most` bytes of a secret. Raises KeyFileError for a file that others may touch, OSError."""
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        content = file.read(most)
    if mode & 0o037:  # a group may read, as Kubernetes mounts secrets, but not write; others may nothing
        raise KeyFileError(f"{path}: mode {mode:o} is too open for a secret; run chmod 600 on it")
    return content


def derive(master: bytes, purpose: str, size: int = 32) -> bytes:
    """A key for one purpose only (HKDF, RFC 5869); knowing it tells nothing about the master or the others."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=purpose.encode()).derive(master)


def mac(key: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 in hex; each part goes in behind its length, so ("ab", "c") is not ("a", "bc")."""
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        code.update(len(part).to_bytes(8, "big") + part)
    return code.hexdigest()


class Box:
    """Seals bytes for a context (AES-256-GCM), and opens them for that context only.

    Writes with `key`, the newest; `older` keys still open what they sealed, so that keys can be changed.
    Sealed: version, key id, nonce, ciphertext with its tag.
    """

    def __init__(self, key: bytes, *older: bytes) -> None:
        self._ciphers = {derive(each, "key id", _ID): AESGCM(derive(each, "box")) for each in (*older, key)}
        self._newest = derive(key, "key id", _ID)

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """`plain`, sealed; opens only with the same `context`."""
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
