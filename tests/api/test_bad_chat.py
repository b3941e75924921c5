"""What a client sends wrong to /v1 is refused in OpenAI's shape, and no address in it is ever fetched."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Client, assert_refused
from tests.api.scripted import CONTEXT, MODEL

PART = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
CHAT: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "path as model": (404, {"model": "../../etc/passwd"}, "model"),
    "URL as model": (404, {"model": "https://evil.example/m"}, "model"),
    "unknown model": (404, {"model": "gpt-4"}, "model"),
    "n 1e6": (400, {"n": 1e6}, "n"),
    "n 2": (400, {"n": 2}, "n"),
    "chat_template": (400, {"chat_template": "{{ x }}"}, "chat_template"),
    "api_base": (400, {"api_base": "http://evil.example"}, "api_base"),
    "base_url": (400, {"base_url": "http://evil.example"}, "base_url"),
    "tools": (400, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "logprobs": (400, {"logprobs": True}, "logprobs"),
    "logit_bias": (400, {"logit_bias": {"50256": 101}}, "logit_bias"),
    "penalty": (400, {"presence_penalty": 1.5}, "presence_penalty"),
    "json_schema": (400, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
    "bad role": (400, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    "no messages": (400, {"messages": []}, "messages"),
    "1,000 messages": (400, {"messages": [{"role": "user", "content": "x"}] * 1000}, "messages"),
    "picture": (400, {"messages": [{"role": "user", "content": [PART]}]}, "messages.0.content"),
    "text with more": (
        400,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "url": "y"}]}]},
        "messages.0.content",
    ),
    "blank": (400, {"messages": [{"role": "user", "content": "  "}]}, None),
    "five limits": (400, {"max_tokens": "five"}, "max_tokens"),
    "over the context": (400, {"max_tokens": CONTEXT}, "max_new_tokens"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "change", "param"), CHAT.values(), ids=CHAT)
def test_a_wrong_chat_is_refused_in_openais_shape(
    admin: Client, status: int, change: dict[str, Any], param: str | None, stream: bool
) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream, **change}
    answer = admin.post("/v1/chat/completions", chat)
    assert_refused(answer, status)
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.json["error"]["param"] == param
