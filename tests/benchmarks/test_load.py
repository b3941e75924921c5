"""The load generator reads real streams as any server may send them, and counts what was asked of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import cache
from benchmarks.load import Answer, Target, ask, prompt, run, summary


class Peer(BaseHTTPRequestHandler):
    """A server of a few tokens: chunked as OpenAI's protocol has it, or a cached answer on a kept connection."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if body.get("max_tokens") == -1:
            return self._reply(422, b"{}")
        if self.path == "/cached":
            return self._reply(200, b'{"response": "x"}', ("X-Cache", "hit"))
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": text}}], "usage": None} for text in ("one", " two", " three")]
        events += [{"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 9,
                                             "prompt_tokens_details": {"cached_tokens": 5}}}]  # fmt: skip
        lines = [": ping", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        self._reply(200, "\n\n".join(lines).encode())

    def _reply(self, status: int, payload: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(payload))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving() -> Iterator[tuple[str, list[dict[str, object]]]]:
    handler = type("Handler", (Peer,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.seen
        finally:
            server.shutdown()
            thread.join()


def test_an_answer_is_timed_and_counted_by_the_servers_own_usage() -> None:
    with serving() as (url, _):
        answer = asyncio.run(ask(Target(url, "m"), "hi", 4))
    assert (answer.text, len(answer.times), len(answer.gaps)) == ("one two three", 3, 2)
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (4, 9, 5)
    assert 0 < answer.first <= answer.ended - answer.sent


def test_every_client_asks_something_new_and_wants_it_uncached() -> None:
    with serving() as (url, seen):
        load = run(Target(url, "m"), 3, 4, first_prompt=7)
    assert len({json.dumps(body["messages"]) for body in seen}) == 3
    assert all(body["temperature"] == 0 and body["max_tokens"] == 4 for body in seen)
    assert (load.clients, load.tokens, load.prompt_tokens) == (3, 12, 9) and load.tokens_per_second > 0


def test_a_refusal_is_an_error_with_its_status() -> None:
    with serving() as (url, _), pytest.raises(ConnectionError, match="422"):
        run(Target(url, "m"), 1, -1, 0)


def test_the_summary_takes_medians_and_the_slowest() -> None:
    answers = [Answer(0.0, [1.0, 1.1, 1.4], end) for end in (2.0, 3.0, 9.0)]
    load = summary(answers, wall=9.0)
    assert (load.first, load.slowest, load.tokens) == (1.0, 9.0, 9)
    assert load.gap == pytest.approx(0.2) and load.longest_gap == pytest.approx(0.3)


def test_a_longer_prompt_is_longer_and_no_two_begin_alike() -> None:
    assert len(prompt(1, 100)) > len(prompt(1)) + 400 and prompt(1)[:2] != prompt(2)[:2]


def test_a_storm_counts_hits_on_kept_connections() -> None:
    with serving() as (url, seen):
        hits = cache.storm(f"{url}/cached", "key", 2, 0.2, b"x-cache: hit")
        assert hits.per_second == pytest.approx(len(seen) / 0.2, rel=0.5) and 0 < hits.p50 <= hits.p99
        with pytest.raises(ConnectionError, match="200"):
            cache.storm(f"{url}/uncached", "key", 1, 0.2, b"x-cache: hit")


def test_a_body_is_as_long_as_its_head_says() -> None:
    assert cache.length(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n") == 17
    assert cache.length(b"HTTP/1.1 204 No Content\r\n\r\n") == 0
