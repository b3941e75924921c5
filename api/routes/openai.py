"""OpenAI's protocol: /v1/chat/completions and /v1/models, for the official client, unmodified.

Adds no ability of its own: a chat is one of our generations in other words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from accounts.roles import Permission
from api import sse
from api.calls import Call, Whole, open_call, read_all, stream
from api.context import services
from api.errors import ErrorBody, payload
from api.middleware import SECURED, Reply, needs
from api.schemas.chat import IGNORED, ChatBody
from api.schemas.chat_answers import ChatOut, ChatUsageOut, ChoiceOut, MessageOut, ModelOut, ModelsOut
from api.schemas.native import ModelPath
from errors import ServiceError, UnknownModel
from model.types import Chunk, Done, Event

blueprint = APIBlueprint(
    "openai",
    __name__,
    abp_tags=[Tag(name="OpenAI-compatible")],
    abp_security=SECURED,
    abp_responses={code: ErrorBody for code in (400, 401, 403, 404, 413, 415, 429, 503)},
)


@blueprint.post(
    "/v1/chat/completions",
    description="Taken and ignored: " + ", ".join(sorted(IGNORED)) + ". What else is unknown is refused by name.",
    responses={200: ChatOut},
)
@needs(Permission.GENERATE)
def chat(body: ChatBody) -> Reply:
    """Chat completion, streamed when `stream` is true."""
    call = open_call(body.generate())
    if body.stream:
        return stream(call, ChatFrames(call.id, call.model, body.include_usage))
    return _completion(call, read_all(call)).model_dump(), 200, {"X-Cache": call.cache}


@blueprint.get("/v1/models", responses={200: ModelsOut})
@needs(Permission.READ_MODELS)
def models() -> Reply:
    """The model that is served."""
    return ModelsOut(data=[ModelOut(id=services().model)]).model_dump()


@blueprint.get("/v1/models/<path:id>", responses={200: ModelOut})
@needs(Permission.READ_MODELS)
def model(path: ModelPath) -> Reply:
    """One model; a name of the hub has a slash in it."""
    if path.id != services().model:
        raise UnknownModel("This model is not served here.", param="model")
    return ModelOut(id=path.id).model_dump()


def _completion(call: Call, whole: Whole) -> ChatOut:
    reasoning = whole.reasoning or None
    message = MessageOut(content=whole.text, reasoning_content=reasoning, reasoning=reasoning)
    choice = ChoiceOut(message=message, finish_reason=_reason(whole.done))
    usage = ChatUsageOut.of(whole.done.usage)
    return ChatOut(id=_chat_id(call.id), model=call.model, choices=[choice], usage=usage)


@dataclass(slots=True)
class ChatFrames:
    """A generation as chat.completion.chunk events, ended by [DONE]."""

    id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    started: bool = False

    def event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Chunk):
            names = ("content",) if event.channel == "answer" else ("reasoning_content", "reasoning")
            yield from self._role()
            yield self._chunk(dict.fromkeys(names, event.text))
        elif isinstance(event, Done):
            yield from self._role()
            yield self._chunk({}, _reason(event))
            if self.include_usage:
                yield self._frame(choices=[], usage=ChatUsageOut.of(event.usage).model_dump())
            yield sse.frame("[DONE]")
        else:
            yield sse.PING

    def error(self, error: ServiceError) -> Iterator[bytes]:
        yield sse.frame(payload(error, None))

    def _role(self) -> Iterator[bytes]:
        if not self.started:
            self.started = True
            yield self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._frame(choices=[choice], **({"usage": None} if self.include_usage else {}))

    def _frame(self, **rest: Any) -> bytes:
        head = {"id": _chat_id(self.id), "object": "chat.completion.chunk", "created": self.created}
        return sse.frame({**head, "model": self.model, **rest})


def _chat_id(id: str) -> str:
    return f"chatcmpl-{id}"


def _reason(done: Done) -> Literal["stop", "length"]:
    """OpenAI knows no `cancelled`: to its clients a stopped answer is one that stopped."""
    return "length" if done.finish_reason == "length" else "stop"
