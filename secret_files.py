"""The secrets that the operator hands over, in the environment or in files, or else made once in DATA_DIR.

Keeps none of them and prints none: a complaint names the setting and the file.
"""

from __future__ import annotations

from pathlib import Path

import keys
from crypto import load_or_create_key
from keys import KeyRing
from settings import Settings, SettingsError


def signing_secret(settings: Settings) -> bytes:
    """What signs tokens, and names cached answers and API keys. Raises SettingsError, KeyFileError."""
    if settings.jwt_secret_file is None:
        return load_or_create_key(settings.data_dir / "secret")
    secret = _read("JWT_SECRET_FILE", settings.jwt_secret_file)
    if len(secret) < 32:
        raise SettingsError("JWT_SECRET_FILE: needs 32 characters or more (for example from: openssl rand -hex 32)")
    return secret


def key_ring(settings: Settings) -> KeyRing:
    """What encrypts cached answers and stored contents, and signs the audit log. Raises SettingsError, KeyFileError."""
    if settings.key_file is None:
        return KeyRing.load_or_create(settings.data_dir / keys.NAME)
    return KeyRing.parse(_read("KEY_FILE", settings.key_file), settings.key_file)


def _read(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {file}: {error.strerror}") from None
