"""The official openai client, unmodified, against a real gunicorn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.conftest import Client
from tests.api.scripted import MODEL
from tests.api.server import Server, eventually

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello big wide world"}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    key = server.ask("POST", "/keys", {"name": "openai"})["key"]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **more})


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello big wide world")
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4


def test_a_stream_has_one_id_its_role_first_and_its_reason_last(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello big wide world"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(client: openai.OpenAI) -> None:
    *others, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage.completion_tokens) == ([], 4)
    assert all(chunk.usage is None for chunk in others)


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_both_names_of_the_token_limit(client: openai.OpenAI, limit: str, stream: bool) -> None:
    answer = chat(client, stream=stream, **{limit: 2})
    reason = [chunk.choices[0] for chunk in answer][-1].finish_reason if stream else answer.choices[0].finish_reason
    assert reason == "length"


@pytest.mark.parametrize("stop", [" wide", [" zzz", " wide"]])
def test_stop_as_a_string_or_a_list(client: openai.OpenAI, stop: str | list[str]) -> None:
    assert chat(client, stop=stop).choices[0].message.content == "hello big"


def test_a_seed_makes_an_answer_one_that_can_be_remembered(client: openai.OpenAI) -> None:
    sent = {"seed": 11, "messages": [{"role": "user", "content": "remember this"}]}
    uses = [client.chat.completions.with_raw_response.create(model=MODEL, **sent).headers["X-Cache"] for _ in range(2)]
    assert uses == ["miss", "hit"]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_there_under_both_names(client: openai.OpenAI, stream: bool) -> None:
    answer = chat(client, stream=stream, messages=[{"role": "user", "content": "think twice"}])
    parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    for name in ("reasoning_content", "reasoning"):
        assert "".join(getattr(part, name, None) or "" for part in parts) == "hm"
    assert "".join(part.content or "" for part in parts) == "think twice"


def test_content_as_text_parts_and_a_conversation_sent_back(client: openai.OpenAI) -> None:
    said = chat(client).choices[0].message
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    answer = chat(client, messages=[{"role": "developer", "content": "x"}, said, {"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "one two"


def test_fields_that_change_nothing_are_ignored(client: openai.OpenAI) -> None:
    answer = chat(client, user="me", metadata={"a": "b"}, store=False, n=1, logprobs=False, presence_penalty=0)
    assert answer.choices[0].message.content == "hello big wide world"


def test_our_own_sampling_fields_come_through_extra_body(client: openai.OpenAI) -> None:
    assert chat(client, extra_body={"top_k": 5, "repetition_penalty": 1.1}).choices


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    for unknown in ("gpt-4", "org/name", "../healthz"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(unknown)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="gpt-4")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools"
    with pytest.raises(openai.AuthenticationError):
        chat(openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0))
    with pytest.raises(openai.InternalServerError) as full:
        chat(client, messages=[{"role": "user", "content": "refuse"}])
    assert (full.value.status_code, full.value.response.headers["Retry-After"]) == (503, "3")


def test_an_error_in_the_middle_of_a_stream_is_raised(client: openai.OpenAI) -> None:
    said = ""
    with pytest.raises(openai.APIError, match="not numbers"):
        for chunk in chat(client, stream=True, messages=[{"role": "user", "content": "break one two three"}]):
            said += chunk.choices[0].delta.content or ""
    assert said == "break one"


def test_a_client_that_closes_its_stream_frees_the_slot(client: openai.OpenAI, server: Server) -> None:
    stream = chat(client, stream=True, messages=[{"role": "user", "content": "slow " + "on and " * 500}])
    next(iter(stream))
    assert server.open_streams() == 1
    stream.close()
    eventually(lambda: server.open_streams() == 0, 5)


def test_a_chat_stream_has_no_status_events_and_ends_with_done(admin: Client) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "silent"}], "stream": True}
    answer = admin.post("/v1/chat/completions", body, headers={"X-Request-Id": "c-1"})
    assert admin.ask("DELETE", "/requests/chatcmpl-c-1").status_code == 204
    text = answer.text
    answer.close()
    assert text.startswith(": ping\n\n") and text.endswith("data: [DONE]\n\n") and "event:" not in text
