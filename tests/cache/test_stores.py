"""The one cache interface, on both of its backends, and what is particular to each."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cache.redis_cache import RedisLink
from cache.sqlite_cache import SqliteCache

Cache = RedisLink | SqliteCache


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sqlite(tmp_path: Path, clock: Clock) -> Iterator[SqliteCache]:
    cache = SqliteCache(tmp_path / "cache.db", max_bytes=2000, clock=clock)
    yield cache
    cache.close()


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture
def logged() -> Iterator[list[dict[str, object]]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture(params=["redis", "sqlite"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(backend: str, request: pytest.FixtureRequest) -> Iterator[Cache]:
    if backend == "sqlite":
        yield request.getfixturevalue("sqlite")
        return
    request.getfixturevalue("server")
    cache = RedisLink(request.getfixturevalue("redis_url"))
    yield cache
    cache.close()


@pytest.fixture
def age(backend: str, request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Make everything in the cache some seconds older, without waiting for it."""
    if backend == "sqlite":
        clock = request.getfixturevalue("clock")
        return lambda seconds: setattr(clock, "now", clock.now + seconds)
    client: redis.Redis = request.getfixturevalue("server")

    def shorten(seconds: int) -> None:
        for key in client.scan_iter():
            client.pexpire(key, int(client.pttl(key)) - seconds * 1000)

    return shorten


class TestAnyCache:
    """Holds for every backend."""

    def test_what_was_put_is_found(self, cache: Cache) -> None:
        assert cache.get("k") is None
        cache.put("k", b"value", 60)
        assert cache.get("k") == b"value" and cache.get("K") is None

    @pytest.mark.parametrize("value", [b"", b"\x00\xff\r\n$-1\r\n", bytes(range(256))])
    def test_any_bytes_come_back_as_they_were(self, cache: Cache, value: bytes) -> None:
        cache.put("k", value, 60)
        assert cache.get("k") == value

    def test_the_last_value_wins(self, cache: Cache) -> None:
        cache.put("k", b"first", 60)
        cache.put("k", b"second, longer", 60)
        assert cache.get("k") == b"second, longer"

    def test_a_value_lives_as_long_as_told(self, cache: Cache, age: Callable[[int], None]) -> None:
        cache.put("short", b"1", 60)
        cache.put("long", b"2", 6000)
        age(50)
        assert cache.get("short") == b"1"
        age(11)
        assert cache.get("short") is None and cache.get("long") == b"2"

    def test_a_new_value_gets_a_new_life(self, cache: Cache, age: Callable[[int], None]) -> None:
        cache.put("k", b"1", 60)
        age(50)
        cache.put("k", b"2", 60)
        age(50)
        assert cache.get("k") == b"2"

    def test_a_life_of_nothing_keeps_nothing(self, cache: Cache) -> None:
        cache.put("k", b"value", 0)
        assert cache.get("k") is None

    def test_threads_share_it(self, cache: Cache) -> None:
        def work(i: int) -> bool:
            cache.put(f"k{i % 5}", b"%d" % (i % 5), 60)
            return cache.get(f"k{i % 5}") == b"%d" % (i % 5)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(80)))

    def test_closing_it_twice_is_harmless(self, cache: Cache) -> None:
        cache.close()
        cache.close()


def test_a_full_file_drops_the_oldest_first(sqlite: SqliteCache) -> None:
    for i in range(10):
        sqlite.put(f"k{i}", bytes(298), 60)  # 300 with its key: six of them fit
    assert [i for i in range(10) if sqlite.get(f"k{i}") is not None] == [4, 5, 6, 7, 8, 9]
    sqlite.put("large", bytes(1900), 60)
    assert [i for i in range(10) if sqlite.get(f"k{i}") is not None] == [] and sqlite.get("large") is not None


def test_a_value_that_cannot_fit_drops_nothing(sqlite: SqliteCache) -> None:
    sqlite.put("k", b"value", 60)
    sqlite.put("huge", bytes(2000), 60)
    assert sqlite.get("huge") is None and sqlite.get("k") == b"value"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 1500), st.integers(0, 3)), max_size=25))
def test_the_file_never_holds_more_than_its_bound(
    sqlite: SqliteCache, clock: Clock, tmp_path: Path, puts: list[tuple[str, int, int]]
) -> None:
    for key, size, pause in puts:
        clock.now += pause
        sqlite.put(key, bytes(size), 5)
        found = sqlite.get(key)
        assert found == bytes(size), "what was just put is there"
    with closing(sqlite3.connect(tmp_path / "cache.db")) as reader:
        sums = "SELECT coalesce(sum(size), 0), coalesce(sum(length(key) + length(value)), 0) FROM entries"
        size, held = reader.execute(sums).fetchone()
    assert held == size <= 2000


def test_expired_values_leave_the_file(sqlite: SqliteCache, clock: Clock, tmp_path: Path) -> None:
    for i in range(50):
        sqlite.put(f"k{i}", b"v", 5)
        clock.now += 5
    with closing(sqlite3.connect(tmp_path / "cache.db")) as reader:
        assert reader.execute("SELECT count(*) FROM entries").fetchone() == (1,)


def test_a_cache_file_outlives_its_process(sqlite: SqliteCache, clock: Clock, tmp_path: Path) -> None:
    sqlite.put("k", b"value", 60)
    sqlite.close()
    assert SqliteCache(tmp_path / "cache.db", clock=clock).get("k") == b"value"


def break_file(path: Path) -> None:
    """Overwrite everything but the first page, as a failing disk might."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


@pytest.mark.parametrize("content", [b"no database" * 1000, b"\x00" * 8192])
def test_a_file_that_is_no_database_is_renamed_and_a_new_one_made(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(content)
    cache = SqliteCache(path)
    for _ in range(2):  # the first use may be the one that finds it broken
        cache.put("k", b"value", 60)
    assert cache.get("k") == b"value" and cache.problem() is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert content[:1] == b"\x00" or path.with_name("cache.db.broken").read_bytes() == content


def test_a_file_that_breaks_later_is_renamed_and_logged_once(tmp_path: Path, logged: list[dict[str, object]]) -> None:
    path = tmp_path / "cache.db"
    cache = SqliteCache(path)
    for number in range(50):
        cache.put(f"k{number}", bytes(4000), 60)
    cache.close()  # and with it goes the WAL
    break_file(path)
    assert [cache.get(f"k{number}") for number in range(50)] == [None] * 50
    cache.put("k", b"value", 60)
    assert cache.get("k") == b"value" and cache.problem() is None
    assert path.with_name("cache.db.broken").exists()
    assert [line["problem"] for line in logged] == ["SQLITE_CORRUPT"]


def test_a_file_that_is_only_busy_is_a_miss_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    first = SqliteCache(path)
    first.put("k", b"value", 60)
    first.close()
    inode = path.stat().st_ino
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        second = SqliteCache(path)
        second.put("k", b"other", 60)
        assert second.get("k") is None
    assert second.get("k") == b"value" and second.problem() is None
    assert path.stat().st_ino == inode and not path.with_name("cache.db.broken").exists()


def test_processes_that_find_one_file_broken_make_one_new_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    caches = [SqliteCache(path) for _ in range(2)]
    caches[0].put("k", b"value", 60)
    for suffix in ("", "-wal"):
        file = path.with_name(path.name + suffix)
        file.write_bytes(b"\xff" * file.stat().st_size)
    for cache in caches:
        assert cache.get("k") in (None, b"value")  # what a process had read it may still know
        cache.close()
        cache.get("k")
    caches[0].put("k", b"new", 60)
    assert [cache.get("k") for cache in caches] == [b"new", b"new"]


def test_a_folder_that_cannot_be_used_is_a_miss_and_is_told(tmp_path: Path, logged: list[dict[str, object]]) -> None:
    (tmp_path / "file").touch()
    cache = SqliteCache(tmp_path / "file" / "cache.db")
    for _ in range(3):
        cache.put("k", b"value", 60)
        assert cache.get("k") is None
    assert cache.problem() == "NotADirectoryError" and len(logged) == 1


@pytest.mark.parametrize(
    "breaks",
    ["DROP TABLE entries", "CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(FAIL, 'full'); END"],
)
def test_a_store_that_takes_no_values_is_told_once(
    sqlite: SqliteCache, tmp_path: Path, logged: list[dict[str, object]], breaks: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "cache.db")) as breaking:
        breaking.execute(breaks)
    for number in range(5):
        sqlite.put(f"k{number}", b"value", 60)
        assert sqlite.get(f"k{number}") is None
    assert sqlite.problem() in ("SQLITE_ERROR", "SQLITE_CONSTRAINT_TRIGGER") and len(logged) == 1


def test_a_key_of_another_kind_is_a_miss(server: redis.Redis, redis_url: str) -> None:
    server.lpush("k", "not a string")
    cache = RedisLink(redis_url)
    assert cache.get("k") is None
    cache.close()


def test_a_restarted_redis_costs_no_miss(server: redis.Redis, redis_url: str) -> None:
    cache = RedisLink(redis_url)
    cache.put("k", b"value", 60)
    assert server.client_kill_filter(_type="normal", skipme=True) >= 1, "no connection was cut"
    assert cache.get("k") == b"value"
    cache.close()


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        RedisLink(url)
