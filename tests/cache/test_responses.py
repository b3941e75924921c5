"""Encrypted answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from cache.responses import ResponseCache
from cache.sqlite_cache import SqliteCache
from crypto import Encryptor

ANSWER: dict[str, object] = {"text": "Ray\n\ud800 scatters", "usage": {"prompt_tokens": 3}, "parts": [["answer", "é"]]}


class Kept:
    """A response cache on a real file, with a look at what it writes and what it reports."""

    def __init__(self, folder: Path, key: bytes = bytes(32), mac_key: bytes = b"m" * 32, ttl: int = 60) -> None:
        self.raw = SqliteCache(folder / "cache.db")
        self.box = Encryptor(key)
        self.heard: list[str] = []
        self.responses = ResponseCache(self.raw, self.box, mac_key, ttl, self.heard.append)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_an_answer_comes_back_whole_and_is_counted(kept: Kept) -> None:
    key = kept.responses.key("model", "ann", 1)
    assert kept.responses.get(key) is None
    kept.responses.put(key, ANSWER)
    assert kept.responses.get(key) == ANSWER and kept.heard == ["miss", "hit"]


def test_another_process_with_the_same_keys_finds_it(kept: Kept, tmp_path: Path) -> None:
    kept.responses.put(kept.responses.key("a"), ANSWER)
    other = Kept(tmp_path)
    assert other.responses.get(other.responses.key("a")) == ANSWER


def test_neither_text_nor_key_can_be_read_in_the_file(kept: Kept, tmp_path: Path) -> None:
    kept.responses.put(kept.responses.key("a secret prompt"), ANSWER)
    kept.raw.close()
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert len(content) > 1000 and b"scatters" not in content and b"secret" not in content


@pytest.mark.parametrize("planted", [b"", b"{}", b'{"text": "planted"}', b"\x01" * 100])
def test_a_planted_value_is_a_miss(kept: Kept, planted: bytes) -> None:
    key = kept.responses.key("a")
    kept.raw.put(key, planted, 60)
    assert kept.responses.get(key) is None and kept.heard == ["miss"]


@pytest.mark.promise("P21", injected="a value copied to another key")
def test_an_answer_moved_to_another_key_is_a_miss(kept: Kept, counted: Callable[..., None]) -> None:
    mine, theirs = kept.responses.key("ann"), kept.responses.key("bob")
    kept.responses.put(mine, ANSWER)
    sealed = kept.raw.get(mine)
    assert sealed is not None
    kept.raw.put(theirs, sealed, 60)
    copied, own = kept.responses.get(theirs), kept.responses.get(mine)
    counted(misses=kept.heard.count("miss"), hits=kept.heard.count("hit"))
    assert copied is None and own == ANSWER and kept.heard == ["miss", "hit"]


def test_an_answer_under_another_secret_is_a_miss(kept: Kept, tmp_path: Path) -> None:
    key = kept.responses.key("a")
    kept.responses.put(key, ANSWER)
    assert Kept(tmp_path, key=b"k" * 32).responses.get(key) is None


@pytest.mark.parametrize("plain", [b"not json", b"\xff", b"[1]", b'"text"', b"null", b""])
def test_what_is_sealed_but_no_object_is_a_miss(kept: Kept, plain: bytes) -> None:
    key = kept.responses.key("a")
    kept.raw.put(key, kept.box.seal(plain, key.encode()), 60)
    assert kept.responses.get(key) is None


@pytest.mark.promise("P21", injected="parts cut in other places, and of other types")
def test_different_parts_never_share_a_key(kept: Kept, tmp_path: Path, counted: Callable[..., None]) -> None:
    lists: list[tuple[object, ...]] = [(), ("",), ("ab", "c"), ("a", "bc"), ("abc",), (("a", "b"), "c"), (1,), ("1",)]
    lists += [(None,), ("null",), (True,), (1.5,), ((1, 2), 3), ((1,), 2, 3), ('a", "b',), ("a", "b")]
    keys = [kept.responses.key(*parts) for parts in lists]  # type: ignore[arg-type]
    counted(lists_of_parts=len(keys), different_keys=len(set(keys)))
    assert all(a != b for a, b in combinations(keys, 2))
    assert kept.responses.key("a", 1) == kept.responses.key("a", 1)
    assert Kept(tmp_path, mac_key=b"x" * 32).responses.key("a", 1) != kept.responses.key("a", 1)


def test_a_life_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path, ttl=0)
    kept.responses.put(kept.responses.key("a"), ANSWER)
    assert kept.responses.get(kept.responses.key("a")) is None


def test_numbers_that_are_no_json_are_refused(kept: Kept) -> None:
    with pytest.raises(ValueError):
        kept.responses.put(kept.responses.key("a"), {"score": float("nan")})
    with pytest.raises(ValueError):
        kept.responses.key(float("inf"))
