"""Hashing, checking and making passwords."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from argon2 import PasswordHasher, extract_parameters
from argon2.profiles import RFC_9106_LOW_MEMORY

from accounts.passwords import Passwords, check_strength, generate
from errors import InvalidRequest


class Recording(PasswordHasher):
    """A real, cheap Argon2 that notes which hashes it was asked to verify."""

    def __init__(self) -> None:
        super().__init__(time_cost=1, memory_cost=64, parallelism=1)
        self.verified: list[str] = []

    def verify(self, hash: str | bytes, password: str | bytes) -> bool:
        self.verified.append(str(hash))
        return super().verify(hash, password)


@pytest.fixture
def hasher() -> Recording:
    return Recording()


@pytest.fixture
def passwords(hasher: Recording) -> Passwords:
    return Passwords(hasher)


def test_only_the_right_password_is_right(passwords: Passwords) -> None:
    stored = passwords.hash("correct horse")
    assert passwords.verify(stored, "correct horse")
    for wrong in ("Correct horse", "correct horse ", "", "correct horse\x00"):
        assert not passwords.verify(stored, wrong)
    assert "correct" not in stored and stored != passwords.hash("correct horse")


def test_hashes_are_argon2id_with_64_mib() -> None:
    parameters = extract_parameters(Passwords().hash("x"))
    assert parameters == RFC_9106_LOW_MEMORY and parameters.memory_cost == 64 << 10


@pytest.mark.promise(
    "P22", injected="a wrong password of a known and of an unknown name", counted="of equal parameters"
)
def test_known_and_unknown_users_cost_one_equal_verification(
    passwords: Passwords, hasher: Recording, counted: Callable[..., None]
) -> None:
    stored = passwords.hash("right")
    let_in = [passwords.verify(each, "wrong") for each in (stored, None)]
    counted(attempts=len(let_in), let_in=sum(let_in), argon2_verifications=len(hasher.verified))
    assert let_in == [False, False]
    known, unknown = hasher.verified
    assert known == stored != unknown
    assert extract_parameters(known) == extract_parameters(unknown)


def test_nobody_logs_in_as_the_unknown_user(passwords: Passwords, hasher: Recording) -> None:
    passwords.verify(None, "x")
    assert not passwords.verify(None, "") and not passwords.verify(None, hasher.verified[0])


@pytest.mark.parametrize("stored", ["", "plain", "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$", "\ud800"])
def test_a_damaged_hash_lets_nobody_in(passwords: Passwords, stored: str) -> None:
    assert not passwords.verify(stored, "plain")


@pytest.mark.parametrize("password", ["\ud800", "nul\x00nul", "密码", "x" * 100_000])
def test_any_text_can_be_a_password(passwords: Passwords, password: str) -> None:
    assert passwords.verify(passwords.hash(password), password)
    assert not passwords.verify(passwords.hash(password), password + "x")


class Meeting(Recording):
    """Each verification waits for a second one to run beside it, and counts how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = threading.Barrier(2, timeout=10)
        self.inside = self.most = 0
        self.counting = threading.Lock()

    def verify(self, hash: str | bytes, password: str | bytes) -> bool:
        with self.counting:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.pair.wait()
        with self.counting:
            self.inside -= 1
        return super().verify(hash, password)


def test_two_hashes_run_at_once_and_never_three() -> None:
    hasher = Meeting()
    passwords = Passwords(hasher)
    stored = passwords.hash("right")
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: passwords.verify(stored, "right"), range(16)))
    assert hasher.most == 2


def test_generated_passwords_are_readable_and_never_repeat() -> None:
    made = {generate() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"([a-hjkmnp-z2-9]{5}-){3}[a-hjkmnp-z2-9]{5}", password) for password in made)


@pytest.mark.parametrize(
    "password",
    [
        *("", "1234567", "x" * 1025, "password", "Password1", " qwerty123 ", "12345678", "iloveyou", "aaaaaaaa"),
        *(" " * 8, "\t \n \t \n ", "long.name", "LONG.NAME", "\u3000" * 9),
    ],
    ids=ascii,
)
def test_weak_passwords_are_refused(password: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_strength(password, "long.name")
    assert (refused.value.code, refused.value.param) == ("weak_password", "password")


@pytest.mark.parametrize("password", ["correct horse", "long.name2", "\u5bc6\u7801" * 4, "x" * 1023 + "y", "1234567 a"])
def test_other_passwords_are_not(password: str) -> None:
    check_strength(password, "long.name")


def test_generated_passwords_are_strong_enough() -> None:
    for _ in range(100):
        check_strength(generate(), "admin")
