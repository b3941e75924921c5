"""P2 to P5 over HTTP: the real engine behind a real gunicorn, and requests that make its steps fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import PASSWORD
from tests.api.server import Server, eventually
from tests.api.test_generate import events
from tests.api.test_gunicorn import reading

POISONED = "tests.api.served:poisoned()"
FAILURES = "llm_engine_failures_total"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("poisoned"), PASSWORD, POISONED, SLOTS="4", USER_STREAMS="100") as running:
        yield running


def answer(server: Server, prompt: str, tokens: int = 8) -> tuple[int, dict[str, Any], str | None]:
    """Status, body and X-Cache of a greedy request."""
    body = {"prompt": prompt, "max_new_tokens": tokens, "temperature": 0}
    with closing(server.connect("POST", "/generate", body)) as connection, connection.getresponse() as response:
        return response.status, json.loads(response.read()), response.headers["X-Cache"]


def details(server: Server) -> dict[str, Any]:
    return dict(server.ask("GET", "/readyz")["details"])


@pytest.mark.promise(
    "P2",
    injected="a step that raises, out of memory or NaN, beside three others",
    counted="their texts are those alone",
)
@pytest.mark.parametrize("poison", ["!raise", "!memory", "!nan"])
def test_a_hostile_request_changes_no_other(server: Server, poison: str) -> None:
    prompts = [f"good {poison[1:]} {n}" for n in range(3)]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(answer, server, prompt, 300) for prompt in prompts]
        hostile = pool.submit(answer, server, f"{poison} now", 300)
        texts = [each.result()[1]["response"] for each in together]
        assert hostile.result()[0] == 503
    for prompt, text in zip(prompts, texts, strict=True):
        alone = server.ask(
            "POST", "/generate", {"prompt": prompt, "max_new_tokens": 300, "temperature": 0, "cache": False}
        )
        assert (alone["response"], alone["cached"], len(text)) == (text, False, 300)


@pytest.mark.promise("P3", injected="out of memory for one request alone", counted="that one 503, then 20 of 20 fine")
def test_out_of_memory_for_one_is_that_ones_alone(server: Server) -> None:
    before = details(server).get("injected", 0)
    status, body, _ = answer(server, "!memory please")
    assert (status, body["error"]["code"]) == (503, "generation_failed")
    assert details(server)["injected"] > before, "the fault was not injected"
    assert [answer(server, f"after {n}")[0] for n in range(20)] == [200] * 20


@pytest.mark.promise(
    "P5", injected="a row of NaN, the same greedy request twice", counted="503 each time, no text, no cache, a counter"
)
def test_numbers_that_are_none_are_no_text_and_not_remembered(server: Server) -> None:
    before = server.metric(FAILURES)
    for _ in range(2):
        status, body, cache = answer(server, "!nan is what I say")
        assert (status, body["error"]["code"], cache) == (503, "generation_failed", None)
        assert "response" not in body
    assert server.metric(FAILURES) == before + 2
    with closing(server.connect("POST", "/stream", {"prompt": "!nan again"})) as connection:
        assert connection.getresponse().status == 503, "no 200 before a failure"


@pytest.mark.promise(
    "P4", injected="the model thread killed", counted="503 in 2 s, the next request served by a new one"
)
def test_a_killed_model_thread_is_replaced(server: Server) -> None:
    process = details(server).get("pid")
    status, body, _ = answer(server, "!kill yourself")
    assert (status, body["error"]["code"]) == (503, "engine_failed")
    eventually(lambda: answer(server, "are you there")[0] == 200, 30)
    assert server.ask("GET", "/readyz")["ready"] and details(server)["pid"] == process


@pytest.mark.promise(
    "P4", injected="a step that hangs, under gunicorn", counted="503, not ready, another process in 30 s"
)
def test_a_model_that_hangs_is_exchanged_for_a_new_process(tmp_path: Path) -> None:
    with (
        Server(tmp_path, PASSWORD, POISONED, SLOTS="4", PACE="0.01") as server,
        reading(server, {"prompt": "a long story", "max_new_tokens": 8000}) as stream,
    ):
        before = details(server)["pid"]
        with ThreadPoolExecutor(1) as pool:
            hung = pool.submit(answer, server, "!hang now")
            eventually(lambda: server.ask("GET", "/readyz")["stage"] == "stalled", 5)
            status, body, _ = hung.result(10)
        assert (status, body["error"]["code"]) == (503, "engine_stalled")
        name, last = events(stream.read().decode())[-1]
        assert (name, last["error"]["code"]) == ("error", "engine_stalled"), "also in the middle of a stream"
        eventually(lambda: served_by_another(server, before), 30)
        assert "hangs (no step for 1 seconds)" in server.log.read_text()


def served_by_another(server: Server, process: int) -> bool:
    try:
        return answer(server, "hello")[0] == 200 and details(server)["pid"] != process
    except OSError:  # just now there is none
        return False
