"""Claims that are refused although the signature holds."""

from __future__ import annotations

import pytest

from accounts.tokens import InvalidToken, TokenPolicy, TokenType

NOW = 1_800_000_000.0
POLICY = TokenPolicy(b"key", access_ttl=900, refresh_ttl=604_800)
HEADER: dict[str, object] = {"alg": "HS256", "typ": "JWT"}


def claims(kind: str = "access", **changes: object) -> dict[str, object]:
    sound = {"iss": "flask-llm", "aud": "flask-llm", "jti": "j1", "sub": "ann", "type": kind, "iat": NOW, "nbf": NOW}
    return {**sound, "exp": NOW + 600, **changes}


@pytest.mark.parametrize("kind", list(TokenType))
def test_a_sound_token_passes_for_its_whole_life(kind: TokenType) -> None:
    expires = NOW + POLICY.ttl(kind)
    POLICY.check(claims(kind, exp=expires), NOW)
    POLICY.check(claims(kind, exp=expires), expires - 1)
    with pytest.raises(InvalidToken, match="exp has passed"):
        POLICY.check(claims(kind, exp=expires), expires)


@pytest.mark.parametrize("kind", list(TokenType))
def test_no_token_may_live_longer_than_its_type(kind: TokenType) -> None:
    with pytest.raises(InvalidToken, match="later"):
        POLICY.check(claims(kind, exp=NOW + POLICY.ttl(kind) + 6), NOW)


@pytest.mark.parametrize("name", ["iss", "aud", "jti", "sub", "type", "exp"])
def test_a_missing_claim_is_refused(name: str) -> None:
    whole = claims()
    POLICY.check(whole, NOW)
    with pytest.raises(InvalidToken, match=name):
        POLICY.check({k: v for k, v in whole.items() if k != name}, NOW)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("iss", "aud", "jti", "sub", "type") for value in (None, 1, True, "", [], {}, "x" * 200)]
    + [
        ("aud", ["flask-llm"]),
        ("aud", ["flask-llm", "other"]),
        ("iss", "Flask-LLM"),
        ("type", "Access"),
        ("type", "id"),
    ]
    + [("exp", value) for value in (None, "1800000600", True, [], float("nan"), float("inf"), -float("inf"), 1e308)]
    + [("exp", 10**400), ("exp", -(10**400)), ("exp", 0), ("exp", NOW - 0.5)]
    + [(name, value) for name in ("iat", "nbf") for value in (None, "0", True, float("nan"), 1e308, 10**400, NOW + 6)],
)
def test_a_claim_of_the_wrong_type_or_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidToken, match=name):
        POLICY.check(claims(**{name: value}), NOW)


def test_a_clock_a_little_ahead_is_forgiven() -> None:
    POLICY.check(claims(iat=NOW + 4, nbf=NOW + 4), NOW)


def test_tokens_may_leave_out_when_they_were_made() -> None:
    POLICY.check({k: v for k, v in claims().items() if k not in ("iat", "nbf")}, NOW)


def test_no_message_repeats_a_value() -> None:
    with pytest.raises(InvalidToken) as refused:
        POLICY.check(claims(type="tell-me-back"), NOW)
    assert "tell-me-back" not in str(refused.value)


def test_our_header_passes() -> None:
    POLICY.check_header(HEADER)


@pytest.mark.parametrize(
    "change",
    [
        *({"alg": alg} for alg in ("none", "nOnE", "HS512", "RS256", None)),
        *({"kid": "../../dev/null"}, {"jku": "https://evil.example"}, {"jwk": {}}, {"x5u": ""}),
        *({"crit": ["exp"]}, {"typ": "JWE"}),
    ],
    ids=str,
)
def test_any_other_header_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidToken):
        POLICY.check_header(HEADER | change)
