"""What is wrong with a Redis is told once in the log and stays in `problem()`; each kind on a real server."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from accounts.guard import LoginGuard
from accounts.tickets import Tickets
from cache.redis_cache import Breaker, RedisLink
from crypto import Encryptor
from errors import Unauthorized
from ops.stack import free_port
from quotas.limits import RequestRate
from tests.conftest import program
from tests.faults import FaultProxy

Serve = Callable[..., int]
Connect = Callable[..., RedisLink]


@contextmanager
def server(folder: Path, *options: str) -> Iterator[int]:
    """The port of a redis-server with these options; it has no port but tls-port where that is one of them."""
    port = free_port()
    place = ["--port", "0", "--tls-port", str(port)] if "--tls-cert-file" in options else ["--port", str(port)]
    command = [program("redis-server"), "--bind", "127.0.0.1", *place, "--dir", str(folder), "--save", "", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any("Ready to accept connections" in line for line in process.stdout or ())
        try:
            yield port
        finally:
            process.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as running:
        yield lambda *options: running.enter_context(server(tmp_path, *options))


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as open_links:

        def connect(url: str, breaker: Breaker | None = None) -> RedisLink:
            link = RedisLink(url, breaker)
            open_links.callback(link.close)
            return link

        yield connect


def certificate(folder: Path) -> list[str]:
    """Options that let a server speak TLS with a certificate that it has signed itself."""
    key, cert = str(folder / "tls.key"), str(folder / "tls.crt")
    make = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([program("openssl"), *make, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no"]


def problems(url: str) -> tuple[str | None, list[str]]:
    """What a link says after three requests, and the problems in the log."""
    link = RedisLink(url)
    cache, rate = link, RequestRate((link.redis, link.ask))
    with capture_logs() as lines:
        for number in range(3):
            rate.hit("ann", 100)
            assert cache.get(f"k{number}") is None
            cache.put(f"k{number}", bytes(10_000), 60)
    cache.close()
    return cache.problem(), [line["problem"] for line in lines if line["log_level"] == "warning"]


def test_nothing_there_is_refused() -> None:
    assert problems(f"redis://127.0.0.1:{free_port()}/0") == ("refused", ["refused"])


@pytest.mark.parametrize("user", ["", ":wrong@", "ann:wrong@"])
def test_a_missing_or_wrong_password(serve: Serve, user: str) -> None:
    port = serve("--requirepass", "secret")
    assert problems(f"redis://{user}127.0.0.1:{port}/0") == ("password", ["password"])


def test_a_password_that_the_server_does_not_have(serve: Serve) -> None:
    assert problems(f"redis://ann:secret@127.0.0.1:{serve()}/0") == ("password", ["password"])


def test_a_certificate_that_nobody_trusts_and_the_wrong_side_of_tls(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    tls, plain = serve(*certificate(tmp_path)), serve()
    assert problems(f"rediss://127.0.0.1:{tls}/0") == ("certificate", ["certificate"])
    assert problems(f"redis://127.0.0.1:{tls}/0") == ("refused", ["refused"])
    assert problems(f"rediss://127.0.0.1:{plain}/0") == ("timeout", ["timeout"]), "it waits for the rest of a line"
    link = connect(f"rediss://localhost:{tls}/0?ssl_ca_certs={tmp_path}/tls.crt&ssl_check_hostname=false")
    link.put("k", b"value", 60)
    assert link.get("k") == b"value" and link.problem() is None


def test_a_full_server_that_may_not_evict(serve: Serve) -> None:
    port = serve("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    assert problems(f"redis://127.0.0.1:{port}/0") == ("full", ["full"])


def test_a_node_of_a_cluster(serve: Serve, tmp_path: Path) -> None:
    port = serve("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    assert problems(f"redis://127.0.0.1:{port}/0") == ("cluster", ["cluster"])


def test_a_server_that_takes_too_long(redis_url: str) -> None:
    with FaultProxy(("127.0.0.1", int(redis_url.split(":")[2].split("/")[0]))) as proxy:
        proxy.mode = "black hole"
        assert problems(f"redis://127.0.0.1:{proxy.port}/0") == ("timeout", ["timeout"])


def with_acl(serve: Serve, folder: Path, commands: str) -> str:
    """The address of a server whose user may use these commands."""
    (folder / "acl").write_text(f"user app on nopass ~* -@all {commands}\n")
    return f"redis://app:x@127.0.0.1:{serve('--aclfile', str(folder / 'acl'))}/0"


def test_a_user_who_may_not_count(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    link = connect(with_acl(serve, tmp_path, "+get +set +ping"))
    rate, cache = RequestRate((link.redis, link.ask)), link
    for left in range(9, 0, -1):
        assert rate.hit("ann", 10).left == left
    cache.put("k", b"value", 60)
    assert cache.get("k") == b"value", "what is refused at once opened the breaker"
    assert link.problem() == "permission"


def test_the_acl_of_make_secrets_allows_all_that_is_asked(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    script = (Path(__file__).parents[2] / "ops/make-secrets").read_text()
    user = next(line for line in script.splitlines() if line.startswith("user app on "))
    link = connect(with_acl(serve, tmp_path, user.partition("-@all")[2]))
    rate, cache = RequestRate((link.redis, link.ask)), link
    assert link.ask(link.redis.ping)
    cache.put("k", b"value", 60)
    assert rate.hit("ann", 2).left == 1 and cache.get("k") == b"value" and link.problem() is None
    guard = LoginGuard(b"key", 16, (link.redis, link.ask))
    tickets = Tickets(Encryptor(bytes(32)), (link.redis, link.ask))
    with suppress(Unauthorized), guard.attempt("198.51.100.1", "ann", {}):
        raise Unauthorized("wrong")
    with guard.attempt("198.51.100.1", "ann", {}):
        assert tickets.take(tickets.put("ann", b"content", time.time() + 60)) == b"content"
    assert link.problem() is None


def test_a_problem_that_is_mended_is_gone_and_a_new_one_is_told_again(serve: Serve, connect: Connect) -> None:
    port = serve()
    clock = [0.0]
    link = connect(f"redis://127.0.0.1:{port}/0", Breaker(faults=2, clock=lambda: clock[0]))
    cache = link
    with redis.Redis(port=port) as admin, capture_logs() as lines:
        for _ in range(2):
            admin.config_set("requirepass", "secret")
            admin.execute_command("AUTH", "secret")
            admin.client_kill_filter(_type="normal", skipme=True)
            for _ in range(3):
                assert cache.get("k") is None
            assert link.problem() == "password"
            admin.config_set("requirepass", "")
            clock[0] += 5
            cache.put("k", b"value", 60)
            assert cache.get("k") == b"value" and link.problem() is None
            cache.put("k", b"", 0)
            admin.delete("k")
    assert [line["log_level"] for line in lines] == ["warning", "info"] * 2
