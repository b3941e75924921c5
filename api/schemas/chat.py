"""OpenAI's dialect as pydantic models, as far as it is served: what would change an answer and isn't is refused."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from api import sse
from api.schemas import native
from api.schemas.native import WHOLE, ChatMessage, GenerateBody, Strict

# Fields that name the caller or the bill and leave the text as it is.
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
# Fields of an answer that clients send back with the conversation; the text is in `content`.
_IGNORED_IN_MESSAGES = frozenset({"name", "refusal", "reasoning", "reasoning_content", "annotations", "audio"})


class _Dialect(Strict):
    """Drops what is ignored before anything else is refused."""

    ignored: ClassVar[frozenset[str]]

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        empty = {"tool_calls", "function_call"}  # clients send them back as null
        return {k: v for k, v in fields.items() if k not in cls.ignored and not (k in empty and v is None)}


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _text(content: object) -> object:
    """A string, or a list of text parts put together; pictures and sounds are refused, and never fetched."""
    if not isinstance(content, list):
        return content
    try:
        return "".join(TextPart.model_validate(part).text for part in content)
    except ValidationError:
        raise ValueError("Only text parts are served: {'type': 'text', 'text': '...'}.") from None


class ChatTurn(_Dialect):
    ignored = _IGNORED_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart])]

    def message(self) -> ChatMessage:
        role: native.Role = "system" if self.role == "developer" else self.role
        return ChatMessage.model_construct(role=role, content=self.content)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ChatBody(_Dialect):
    """Defaults are this service's own (temperature 0.6, 256 tokens), not OpenAI's."""

    ignored = IGNORED

    messages: list[ChatTurn] = Field(min_length=1, max_length=256)
    model: str = Field(min_length=1, max_length=256)
    max_tokens: native.MaxTokens | None = None
    max_completion_tokens: native.MaxTokens | None = None
    temperature: native.Temperature | None = None
    top_p: native.TopP | None = None
    top_k: native.TopK | None = None
    repetition_penalty: native.Penalty | None = None
    seed: native.Seed | None = None
    stop: native.Stop | Annotated[list[native.Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    def generate(self) -> GenerateBody:
        """The same request in our dialect; what was not sent keeps our default."""
        same = {"model", "temperature", "top_p", "top_k", "repetition_penalty", "seed"}
        wanted = self.model_dump(include=same, exclude_none=True)
        if limit := self.max_completion_tokens or self.max_tokens:
            wanted["max_new_tokens"] = limit
        if self.stop is not None:
            wanted["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return GenerateBody.model_construct(messages=[turn.message() for turn in self.messages], **wanted)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


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


class ChatUsageOut(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]
    completion_tokens_details: dict[Literal["reasoning_tokens"], int]


class ChatOut(BaseModel):
    """The whole answer; with `stream` it comes as chat.completion.chunk events instead."""

    model_config = ConfigDict(openapi_extra=sse.DOCUMENTED)  # type: ignore[typeddict-unknown-key]

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChoiceOut]
    usage: ChatUsageOut
