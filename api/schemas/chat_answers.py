"""OpenAI's chat answer and list of models, as pydantic models: what the document promises is what is sent.

Knows nothing of the events of a stream; openai.py writes those.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api import sse
from model.types import Usage


class ModelOut(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "local"


class ModelsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class MessageOut(BaseModel):
    """Reasoning is there under both names that clients look for, and null where there is none."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    reasoning_content: str | None
    reasoning: str | None


class ChoiceOut(BaseModel):
    index: Literal[0] = 0
    message: MessageOut
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class PromptDetailsOut(BaseModel):
    cached_tokens: int


class CompletionDetailsOut(BaseModel):
    reasoning_tokens: int


class ChatUsageOut(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetailsOut
    completion_tokens_details: CompletionDetailsOut

    @classmethod
    def of(cls, usage: Usage) -> ChatUsageOut:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptDetailsOut(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionDetailsOut(reasoning_tokens=usage.reasoning_tokens),
        )


class ChatOut(BaseModel):
    """The whole answer; with `stream` it comes as chat.completion.chunk events instead."""

    model_config = ConfigDict(openapi_extra=sse.DOCUMENTED)  # type: ignore[typeddict-unknown-key]

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChoiceOut]
    usage: ChatUsageOut
