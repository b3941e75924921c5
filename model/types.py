"""The words shared by everyone who asks for text and everyone who makes it.

Imports no torch, no Flask and no storage, so that the HTTP side can use it without loading a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

Channel = Literal["answer", "reasoning"]
ServedBy = str  # "local", "upstream:NAME" or "offline"


class FinishReason(StrEnum):
    """Why a generation ended well. Endings that are not well are exceptions."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is system, user or assistant; `content` is plain text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature 0 is greedy; top_k 0 and top_p 1 switch these filters off; seed None draws a fresh one.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def deterministic(self) -> bool:
        """Whether the same request gives the same text again, and may therefore be cached."""
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation, checked at the edge. `Backend.prepare` fills in `prompt_ids` and the token limit.

    owner: the user it is for; nothing that is derived from a prompt is ever shared between owners.
    timeout: seconds from submission until the request is given up, wherever it is by then.
    """

    id: str
    owner: str
    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    timeout: float = 300.0
    prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request. `cached_tokens` are prompt tokens whose KV was reused."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Status:
    """What a request is waiting for: stage is `loading` (with percent) or `queued` (with position and eta)."""

    stage: str
    percent: int | None = None
    position: int | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text. Joined, the chunks of one channel are exactly that channel's whole text."""

    text: str
    channel: Channel = "answer"


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a stream that ended well."""

    finish_reason: FinishReason
    usage: Usage
    served_by: ServedBy = "local"


Event = Status | Chunk | Done


class Stream(Protocol):
    """The events of one submitted request. One reader; `close` may come from any thread, any number of times."""

    def get(self, timeout: float) -> Event | None:
        """The next event, or None when `timeout` seconds passed without one.

        Raises a ServiceError when the generation failed. After Done or an error it must not be called again.
        """

    def close(self) -> None:
        """Give up: the slot is free again at the next step, and `get` ends with Done(cancelled)."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What /readyz tells. stage: cold, fetching, loading, ready, stalled, failed, stopping or stopped.

    details: plain figures for operators (compiled buckets, slots, KV bytes, the 4-bit product in use).
    """

    ready: bool
    stage: str
    percent: int = 0
    reason: str | None = None
    details: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Backend(Protocol):
    """Something that makes text: the local engine, or another server."""

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Render and tokenise the messages, without loading weights.

        Returns the request with `prompt_ids` set. Raises InvalidRequest when prompt and limit cannot fit
        the context, UnknownModel when this backend does not serve `request.model`.
        """

    def max_characters(self) -> int:
        """A prompt with more characters in all its messages cannot fit the context."""

    def submit(self, request: GenerateRequest) -> Stream:
        """Queue a prepared request. Raises Overloaded at once when the queue is full, ModelUnavailable when down."""

    def fingerprint(self) -> str:
        """Model name, revision and quantisation: what a cached text depends on beside the request."""

    def status(self) -> BackendStatus: ...

    def preload(self, on_failure: Callable[[str], None] | None = None) -> None:
        """Start loading the weights now, in the background; later calls do nothing.

        on_failure: called once, from another thread and with one line, if the model cannot be served after all.
        """

    def watch(self, on_hang: Callable[[str], None]) -> None:
        """on_hang: called from another thread, with one line, when only a new process heals what makes the text."""

    def close(self, grace: float) -> None:
        """Admit nothing more, let running streams finish for `grace` seconds, then end the rest with an error."""
