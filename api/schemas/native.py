"""Our own dialect as pydantic models: the one list of fields and bounds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, RootModel, model_validator

from model.types import BackendStatus, FinishReason, Sampling, ServedBy

Role = Literal["system", "user", "assistant"]


def _whole(value: object) -> object:
    """JSON has one kind of number: 1.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1), WHOLE]
MaxTokens = Annotated[int, Field(ge=1, le=1 << 20), WHOLE]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[
    float,
    Field(gt=0, le=1, allow_inf_nan=False, description="Acts among the 256 most likely tokens; 1 switches it off."),
]
TopK = Annotated[
    int, Field(ge=0, le=1 << 20, description="0 switches the filter off; more than 256 acts as 256."), WHOLE
]
Penalty = Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)]


class Strict(BaseModel):
    """A body from outside: no coercion, no unknown key."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ChatMessage(Strict):
    role: Role
    content: str


_ONE_SOURCE: list[JsonValue] = [
    {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
    {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
]


class GenerateBody(Strict):
    """One of `prompt` and `messages`; `prompt` is one user message."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_SOURCE})

    prompt: str | None = Field(None, min_length=1, examples=["Why is the sky blue?"])
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=256)
    model: str | None = Field(None, min_length=1, max_length=256)
    max_new_tokens: MaxTokens = 256
    temperature: Temperature = 0.6
    top_p: TopP = 0.95
    top_k: TopK = 50
    repetition_penalty: Penalty = 1.0
    seed: Seed | None = None
    stop: list[Stop] = Field(default_factory=list, max_length=16)
    cache: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Send one of prompt and messages.")
        return self

    def conversation(self) -> list[ChatMessage]:
        """The messages, or the prompt as one."""
        return self.messages or [ChatMessage.model_construct(role="user", content=self.prompt or "")]

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.seed)


class IdPath(BaseModel):
    id: str = Field(min_length=1, max_length=256)


class TicketQuery(BaseModel):
    ticket: str = Field(min_length=1, max_length=256)


class TicketOut(BaseModel):
    ticket: str
    expires_in: int


class UsageOut(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    reasoning_tokens: int


class GenerateOut(BaseModel):
    id: str
    model: str
    response: str
    reasoning: str
    finish_reason: FinishReason
    usage: UsageOut
    cached: bool
    served_by: ServedBy
    sanitised: int = Field(description="HTML elements removed from the prompt.")


class RequestOut(BaseModel):
    """A generation under way."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    user: str
    model: str = Field(validation_alias=AliasPath("request", "model"))
    started: float
    state: str = Field(description="loading, queued or running.")
    tokens: int


class RequestsOut(BaseModel):
    requests: list[RequestOut]


class HealthOut(BaseModel):
    status: Literal["ok"]
    version: str


class ReadyOut(RootModel[BackendStatus]):
    """Whether a request can be answered with text now, and the stage of the model."""
