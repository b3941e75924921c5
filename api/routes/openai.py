"""OpenAI's protocol for the official client, unmodified: /v1/chat/completions and /v1/models."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from accounts.roles import Permission
from api import sse
from api.context import services
from api.errors import payload
from api.generation import Generation, read_all, start
from api.middleware import Reply, api_blueprint, needs
from api.schemas.chat import IGNORED, ChatBody, ChatOut, ModelOut, ModelsOut
from api.schemas.native import IdPath
from errors import ServiceError, UnknownModel
from model.types import Chunk, Done, Event, Usage

_REASONING = ("reasoning_content", "reasoning")  # clients look for either
blueprint = api_blueprint("openai", "OpenAI-compatible", 400, 401, 403, 404, 408, 413, 415, 429, 503)


@blueprint.post(
    "/v1/chat/completions",
    description="Taken and ignored: " + ", ".join(sorted(IGNORED)) + ". What else is unknown is refused by name.",
    responses={200: ChatOut},
)
@needs(Permission.GENERATE)
def chat(body: ChatBody) -> Reply:
    """Chat completion, streamed when `stream` is true."""
    generation = start(body.generate())
    if body.stream:
        return sse.respond(generation.events, ChatDialect(generation, body.include_usage), generation.close)
    done, texts = read_all(generation), generation.texts()
    said = {"role": "assistant", "content": texts["answer"], "refusal": None}
    message = said | dict.fromkeys(_REASONING, texts["reasoning"] or None)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(done)}
    head = _head(generation, "chat.completion", int(time.time()))
    return {**head, "choices": [choice], "usage": _usage(done.usage)}


@blueprint.get("/v1/models", responses={200: ModelsOut})
@needs(Permission.READ_MODELS)
def models() -> Reply:
    """The model that is served."""
    return ModelsOut(data=[ModelOut(id=services().model)]).model_dump()


@blueprint.get("/v1/models/<path:id>", responses={200: ModelOut})
@needs(Permission.READ_MODELS)
def model(path: IdPath) -> Reply:
    """One model; a name of the hub has a slash in it."""
    if path.id != services().model:
        raise UnknownModel("This model is not served here.", param="model")
    return ModelOut(id=path.id).model_dump()


@dataclass(slots=True)
class ChatDialect:
    """A generation as chat.completion.chunk events, ended by [DONE]."""

    generation: Generation
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    started: bool = False

    def event(self, event: Event) -> bytes:
        if isinstance(event, Chunk):
            names = ("content",) if event.channel == "answer" else _REASONING
            return self._role() + self._chunk(dict.fromkeys(names, event.text))
        if isinstance(event, Done):
            frames = self._role() + self._chunk({}, _reason(event))
            if self.include_usage:
                frames += self._frame(choices=[], usage=_usage(event.usage))
            return frames + b"data: [DONE]\n\n"
        return sse.PING

    def error(self, error: ServiceError) -> bytes:
        return sse.frame(payload(error, None))

    def _role(self) -> bytes:
        if self.started:
            return b""
        self.started = True
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._frame(choices=[choice], **({"usage": None} if self.include_usage else {}))

    def _frame(self, **rest: Any) -> bytes:
        return sse.frame({**_head(self.generation, "chat.completion.chunk", self.created), **rest})


def _head(generation: Generation, kind: str, created: int) -> dict[str, Any]:
    return {"id": f"chatcmpl-{generation.id}", "object": kind, "created": created, "model": generation.request.model}


def _usage(usage: Usage) -> dict[str, Any]:
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {
        **{name: getattr(usage, name) for name in counts},
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _reason(done: Done) -> Literal["stop", "length"]:
    """OpenAI knows no `cancelled`: to its clients a stopped answer is one that stopped."""
    return "length" if done.finish_reason == "length" else "stop"
