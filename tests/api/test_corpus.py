"""P1 and P23: each line of tests/corpus, sent to a real gunicorn, gets what it must, soon, and changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest

from crypto import derive
from tests.api.conftest import PASSWORD
from tests.api.corpus import Answer, Case, cases, grown, send
from tests.api.server import Server
from tests.api.test_generate import events

SECRET = "0123456789abcdef" * 4
SOON = 2.0  # seconds
# What no answer to bad input may hold: our own code, or an address of it.
INSIDE = ("Traceback", "werkzeug", "pydantic", "/site-packages/", ".py", "<html")
CANARY = {"prompt": "the quick brown fox", "temperature": 0, "cache": False}
PLACES = ("http", "generate", "text", "v1", "login", "admin")


def lines(*places: str) -> list[Any]:
    return [pytest.param(case, id=f"{place}: {case.name}") for place in places for case in cases(place)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gunicorn whose secret is known; after all lines it is the same process and says what it said before."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "secret").write_text(SECRET)
    with Server(folder, PASSWORD, JWT_SECRET_FILE=str(folder / "secret")) as running:
        before = canary(running)
        yield running
        assert canary(running) == before


def canary(server: Server) -> tuple[str, int]:
    """What a good request gets, and from which process."""
    return server.ask("POST", "/generate", CANARY)["response"], process(server)


def process(server: Server) -> int:
    return int(server.ask("GET", "/readyz")["details"]["pid"])


def submitted(server: Server) -> int:
    """How many requests have reached the model."""
    return int(server.ask("GET", "/readyz")["details"]["submitted"])


def check(case: Case, answer: Answer) -> None:
    assert answer.status in case.statuses, answer.text[:500]
    for words in (*INSIDE, *case.forbidden):
        assert words not in answer.text
    if case.code is not None:
        assert answer.error["code"] == case.code
        assert case.param is None or answer.error["param"] == case.param
        assert {"message", "type", "code", "param"} <= set(answer.error)


@pytest.mark.promise(
    "P1", injected="each line of tests/corpus", counted="each in 2 s, one process, what is refused reaches no model"
)
@pytest.mark.parametrize("case", lines(*PLACES))
def test_a_line_of_the_corpus(server: Server, counted: Callable[..., None], case: Case) -> None:
    before, started = submitted(server), time.monotonic()
    answer = send(server, case.request, server.token)
    assert time.monotonic() - started < SOON
    counted(served=int(answer.status < 400), refused=int(400 <= answer.status < 500))
    counted(server_errors=int(answer.status >= 500))
    check(case, answer)
    if answer.status >= 400:
        assert submitted(server) == before, "it reached the model"
    if case.says is not None:
        assert json.loads(answer.text)["response"] == grown(case.says)


@pytest.mark.promise("P1", injected="each odd text of the corpus, streamed", counted="the joined events are the text")
@pytest.mark.parametrize("case", [line for line in lines("text") if line.values[0].says is not None])
def test_odd_text_survives_a_stream(server: Server, counted: Callable[..., None], case: Case) -> None:
    found = events(send(server, {**case.request, "path": "/stream"}, server.token).text)
    said = "".join(data["text"] for name, data in found if name == "message")
    counted(unchanged_texts=int(said == grown(case.says)))
    assert said == grown(case.says)
    assert found[-1][0] == "done"


@pytest.mark.promise("P1", injected="each bad chat of the corpus, as a stream", counted="before a 200 is sent")
@pytest.mark.parametrize("case", [line for line in lines("v1") if "messages" in line.values[0].request.get("json", {})])
def test_a_bad_chat_is_refused_before_its_stream_begins(
    server: Server, counted: Callable[..., None], case: Case
) -> None:
    chat = {**case.request["json"], "stream": case.request["json"].get("stream", True)}
    answer = send(server, {**case.request, "json": chat}, server.token)
    counted(refused=int(answer.status >= 400))
    check(case, answer)
    assert set(answer.error) == {"message", "type", "param", "code"}, "OpenAI's shape"


def forged(good: str, changes: dict[str, Any]) -> str:
    """A good token after some changes, signed with the real key."""
    claims: dict[str, Any] = jwt.decode(good, options={"verify_signature": False})
    claims |= {name: _number(value) for name, value in changes.get("claims", {}).items()}
    header = {"alg": "HS256", "typ": "JWT", **changes.get("header", {})}
    kept = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(kept, derive(SECRET.encode(), "jwt"), "HS256", headers=header)


def _number(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"now"}:
        return time.time() + value["now"]
    return float(value["float"]) if isinstance(value, dict) and set(value) == {"float"} else value


@pytest.mark.promise("P23", injected="each forged token of the corpus", counted="before the body is looked at")
@pytest.mark.parametrize("case", lines("jwt"))
def test_a_forged_token(server: Server, counted: Callable[..., None], case: Case) -> None:
    answer = send(server, {"json": {"no": "valid body"}}, forged(server.token, case.request["forge"]))
    counted(refused=int(answer.status == 401))
    check(case, answer)


@pytest.mark.promise("P23", injected="nothing: the forger's own token", counted="its body is looked at")
def test_the_unchanged_token_is_good(server: Server, counted: Callable[..., None]) -> None:
    status = send(server, {"json": {"no": "valid body"}}, forged(server.token, {})).status
    counted(let_in=int(status == 422))
    assert status == 422
