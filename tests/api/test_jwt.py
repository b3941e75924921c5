"""Tokens that no change of a claim or header makes (those are in tests/corpus/jwt.jsonl) are 401 too."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from api.context import Services
from tests.api.conftest import Client

GOOD_HEADER = {"alg": "HS256", "typ": "JWT"}


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@pytest.fixture
def forge(admin: Client, services: Services) -> Callable[..., str]:
    """Signs, with the real key, the claims of a good token after some changes."""
    good = jwt.decode(admin.token or "", options={"verify_signature": False})

    def sign(changes: dict[str, Any] | None = None, headers: dict[str, Any] | None = None, **more: Any) -> str:
        claims = {name: value for name, value in {**good, **(changes or {})}.items() if value is not None}
        key = more.get("key", services.policy.key)
        return jwt.encode(claims, key, more.get("algorithm", "HS256"), headers={**GOOD_HEADER, **(headers or {})})

    return sign


@pytest.fixture
def status(nobody: Client) -> Callable[[str], int]:
    def ask(token: str) -> int:
        answer = nobody.post("/generate", {"no": "valid body"}, headers={"Authorization": f"Bearer {token}"})
        if answer.status_code == 401:
            assert answer.json["error"]["type"] == "authentication_error"
        return answer.status_code

    return ask


@pytest.mark.parametrize("algorithm", ["none", "nOnE", "HS512", "RS256"])
def test_other_algorithms_are_401(
    forge: Callable[..., str], status: Callable[[str], int], services: Services, algorithm: str
) -> None:
    if algorithm == "HS512":
        token = forge(headers={"alg": "HS512"}, algorithm="HS512", key=services.policy.key * 2)
    elif algorithm == "RS256":
        private = rsa.generate_private_key(65537, 2048)
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        token = forge(headers={"alg": "RS256"}, algorithm="RS256", key=pem)
    else:
        _, claims, _ = forge().split(".")
        token = f"{encode({**GOOD_HEADER, 'alg': algorithm})}.{claims}."
    assert status(token) == 401


@pytest.mark.promise("P23", injected="flipped bits, cut and long tokens")
@pytest.mark.parametrize(
    "garble",
    [
        lambda token: token[:-5] + ("A" if token[-5] != "A" else "B") + token[-4:],
        lambda token: token.rpartition(".")[0] + ".",
        lambda token: token.rpartition(".")[0],
        lambda token: token.replace(".", ""),
        lambda token: f"{encode(GOOD_HEADER)}.W10.{token.rpartition('.')[2]}",
        lambda token: "." .join([encode("[" * 900), *token.split(".")[1:]]),
        lambda token: base64.urlsafe_b64encode(b"[" * 2900).decode() + "." + ".".join(token.split(".")[1:]),
        lambda token: token + "A" * 10_000,
        lambda token: "é" + token,
        lambda token: "",
        lambda token: "a.b.c",
    ],
)  # fmt: skip
def test_garbled_tokens_are_401(
    forge: Callable[..., str], status: Callable[[str], int], counted: Callable[..., None], garble: Callable[[str], str]
) -> None:
    found = status(garble(forge()))
    counted(refused=int(found == 401))
    assert found == 401


def test_a_signature_by_another_key_is_401(forge: Callable[..., str], status: Callable[[str], int]) -> None:
    assert status(forge(key=b"x" * 32)) == 401


@pytest.mark.promise("P23", injected="a good token in a query string, a cookie or another scheme")
def test_only_the_authorization_header_counts(
    nobody: Client, forge: Callable[..., str], counted: Callable[..., None]
) -> None:
    token, statuses = forge(), []
    for place in ({"query_string": {"jwt": token, "access_token": token}}, {"headers": {"Cookie": f"jwt={token}"}}):
        statuses.append(nobody.post("/generate", {"prompt": "hi"}, **place).status_code)
    for scheme in ("Basic", "Token", "JWT"):
        statuses.append(nobody.get("/keys", headers={"Authorization": f"{scheme} {token}"}).status_code)
    counted(refused=statuses.count(401))
    assert statuses == [401] * 5


def test_a_body_is_not_even_read_without_a_token(nobody: Client) -> None:
    for body in (b"", b"{", b"[" * 100_000, b"\xff"):
        assert nobody.post("/generate", data=body, content_type="text/plain").status_code == 401


def test_a_token_that_was_good_a_moment_ago_expires_all_the_same(
    admin: Client, status: Callable[[str], int], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert admin.token and status(admin.token) == status(admin.token) == 422
    later = time.time() + services.policy.access_ttl + 1
    monkeypatch.setattr("api.bearer.time", SimpleNamespace(time=lambda: later))
    assert status(admin.token) == 401
