"""What a change or a loss of keys costs, and what lies on disk in plain text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
from flask import Flask

from crypto import rotate
from tests.api.conftest import Client

BODY = {"prompt": "why is the sky blue", "temperature": 0}


def served(make_app: Callable[..., Flask], **settings: object) -> Client:
    """The service, started anew."""
    return Client(make_app(**settings)).login()


def test_after_a_change_of_keys_cached_answers_are_still_hits(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    served(make_app).post("/generate", BODY).close()
    rotate(tmp_path / "keys")
    assert served(make_app).post("/generate", BODY).headers["X-Cache"] == "hit"
    again = {**BODY, "prompt": "why is it dark at night"}
    served(make_app).post("/generate", again).close()
    newest = (tmp_path / "keys").read_bytes().splitlines()[0]
    (tmp_path / "keys").write_bytes(newest)
    assert served(make_app).post("/generate", again).headers["X-Cache"] == "hit", "the new key had written it"
    assert served(make_app).post("/generate", BODY).headers["X-Cache"] == "miss", "the old key is gone"


def test_losing_the_keys_loses_the_cache_and_not_the_service(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    before = served(make_app)
    key = before.post("/keys", {"name": "app", "expires_in_days": 1}).json["key"]
    before.post("/generate", BODY).close()
    (tmp_path / "keys").unlink()
    after = served(make_app)
    assert after.post("/generate", BODY).headers["X-Cache"] == "miss"
    assert Client(after.app, before.token).get("/keys").status_code == 200, "sessions go on"
    assert Client(after.app, key).post("/generate", BODY).headers["X-Cache"] == "hit", "API keys too"


@pytest.mark.promise("P14", injected="the key file deleted between two starts")
def test_losing_the_keys_is_seen_in_the_audit(
    make_app: Callable[..., Flask], tmp_path: Path, counted: Callable[..., None]
) -> None:
    served(make_app)
    (tmp_path / "keys").unlink()
    after = served(make_app)
    result = after.app.test_cli_runner().invoke(args=["audit", "verify"])
    counted(unsigned_record=result.output.count("not signed with a known key"))
    assert result.exit_code == 1 and "not signed with a known key" in result.output


def test_a_key_file_of_the_operator_is_used(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    file = tmp_path / "handed over"
    file.write_text("# for flask-llm\n" + "ab" * 32 + "\n")
    served(make_app, key_file=file).post("/generate", BODY).close()
    assert not (tmp_path / "keys").exists()
    assert served(make_app, key_file=file).post("/generate", BODY).headers["X-Cache"] == "hit"


@pytest.mark.parametrize(("text", "words"), [("", "needs 64 hex digits"), (None, "KEY_FILE: cannot read")])
def test_a_key_file_that_is_no_good_stops_the_start_in_one_line(
    make_app: Callable[..., Flask], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "file").write_text(text)
    with pytest.raises(SystemExit):
        make_app(key_file=tmp_path / "file")
    assert words in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_no_key_answer_or_prompt_lies_on_disk_in_plain_text(make_app: Callable[..., Flask], tmp_path: Path) -> None:
    admin = served(make_app)
    key = admin.post("/keys", {"name": "app", "expires_in_days": 1}).json["key"]
    Client(admin.app, key).post("/generate", BODY).close()
    jti = jwt.decode(key, options={"verify_signature": False})["jti"]
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    hashed = hashlib.sha256(jti.encode()).hexdigest()
    for secret in (key, jti, hashed, hashed.upper(), "why is the sky"):
        assert secret.encode() not in written
