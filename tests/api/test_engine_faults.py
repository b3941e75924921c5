"""P2 to P5 over HTTP: the real engine behind a real gunicorn, and requests that make its steps fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
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
    "P2", injected="a step that raises, out of memory or NaN, beside three others", counted="compared with those alone"
)
@pytest.mark.parametrize("poison", ["!raise", "!memory", "!nan"])
def test_a_hostile_request_changes_no_other(server: Server, counted: Callable[..., None], poison: str) -> None:
    prompts = [f"good {poison[1:]} {n}" for n in range(3)]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(answer, server, prompt, 300) for prompt in prompts]
        hostile = pool.submit(answer, server, f"{poison} now", 300)
        texts = [each.result()[1]["response"] for each in together]
        failed = hostile.result()[0]
    body = {"max_new_tokens": 300, "temperature": 0, "cache": False}
    alone = [server.ask("POST", "/generate", {"prompt": prompt, **body}) for prompt in prompts]
    unchanged = [each["response"] == text for each, text in zip(alone, texts, strict=True)]
    counted(failed=int(failed == 503), unchanged_texts=sum(unchanged))
    assert failed == 503 and unchanged == [True] * 3
    assert [(each["cached"], len(each["response"])) for each in alone] == [(False, 300)] * 3


@pytest.mark.promise("P3", injected="out of memory for one request alone")
def test_out_of_memory_for_one_is_that_ones_alone(server: Server, counted: Callable[..., None]) -> None:
    before = details(server).get("injected", 0)
    status, body, _ = answer(server, "!memory please")
    assert (status, body["error"]["code"]) == (503, "generation_failed")
    assert details(server)["injected"] > before, "the fault was not injected"
    after = [answer(server, f"after {n}")[0] for n in range(20)]
    counted(failed=int(status == 503), served_afterwards=after.count(200))
    assert after == [200] * 20


@pytest.mark.promise(
    "P5", injected="a row of NaN, the same greedy request twice, then streamed", counted="none cached, none a 200"
)
def test_numbers_that_are_none_are_no_text_and_not_remembered(server: Server, counted: Callable[..., None]) -> None:
    before, texts = server.metric(FAILURES), 0
    for _ in range(2):
        status, body, cache = answer(server, "!nan is what I say")
        texts += "response" in body
        assert (status, body["error"]["code"], cache) == (503, "generation_failed", None)
    assert server.metric(FAILURES) == before + 2
    with closing(server.connect("POST", "/stream", {"prompt": "!nan again"})) as connection:
        assert connection.getresponse().status == 503, "no 200 before a failure"
    counted(failures=int(server.metric(FAILURES) - before), texts=texts)
    assert texts == 0


@pytest.mark.promise("P4", injected="the model thread killed", counted="in 2 s; a new one serves within 30 s")
def test_a_killed_model_thread_is_replaced(server: Server, counted: Callable[..., None]) -> None:
    process, started = details(server).get("pid"), time.monotonic()
    status, body, _ = answer(server, "!kill yourself")
    counted(failed=int(status == 503))
    assert (status, body["error"]["code"]) == (503, "engine_failed") and time.monotonic() - started < 2
    eventually(lambda: answer(server, "are you there")[0] == 200, 30)
    assert server.ask("GET", "/readyz")["ready"] and details(server)["pid"] == process


@pytest.mark.promise(
    "P4", injected="a step that hangs, under gunicorn", counted="not ready in 5 s, another process in 30 s"
)
def test_a_model_that_hangs_is_exchanged_for_a_new_process(tmp_path: Path, counted: Callable[..., None]) -> None:
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
        counted(failed=int(status == 503), ended_in_an_error=int(name == "error"))
        assert (name, last["error"]["code"]) == ("error", "engine_stalled"), "also in the middle of a stream"
        eventually(lambda: served_by_another(server, before), 30)
        assert "hangs (no step for 1 seconds)" in server.log.read_text()


def served_by_another(server: Server, process: int) -> bool:
    try:
        return answer(server, "hello")[0] == 200 and details(server)["pid"] != process
    except OSError:  # just now there is none
        return False
