"""What is said between those who ask for text and those who make it: requests, events, and the Backend protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

Channel = Literal["answer", "reasoning"]
ServedBy = str  # "local", "upstream:NAME" or "offline"
Progress = Callable[[str, int], None]  # takes the stage of a load, and its percent


class FinishReason(StrEnum):
    """Why a generation ended well. Other endings are exceptions."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role`: system, user or assistant; `content`: plain text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy, top_k 0 and top_p 1 are off, seed None is a fresh one."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def deterministic(self) -> bool:  # the same request gives the same text again, which may be cached
        return self.temperature == 0 or self.seed is not None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. `Backend.prepare` fills in `prompt_ids`."""

    id: str
    owner: str  # the user it is for: nothing derived from a prompt is ever shared between owners
    model: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    timeout: float = 300.0  # seconds from submission until it fails
    prompt_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Status:
    """What a request waits for: stage is `loading` (with percent) or `queued` (with position and eta)."""

    stage: str
    percent: int | None = None
    position: int | None = None
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of text. Joined, the chunks of one channel are that channel's whole text."""

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
    """The events of one submitted request, for one reader; the last is Done or an error."""

    def get(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds without one. Raises the ServiceError that ended it."""

    def close(self) -> None:
        """Give up, from any thread: the slot is freed before the next step, and `get` ends with Done(cancelled)."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What /readyz tells. `details`: figures for operators (slots, KV bytes, compiled steps)."""

    ready: bool
    stage: str  # cold, fetching, loading, ready, stalled, failed, stopping or stopped
    percent: int = 0
    reason: str | None = None  # one line that holds no path
    details: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Backend(Protocol):
    """Something that makes text: the local engine, or another server."""

    def max_characters(self) -> int:
        """The most characters that the messages of a prompt which fits the context can have."""

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """The request with `prompt_ids`, without loading weights. Raises InvalidRequest (too long), UnknownModel."""

    def submit(self, request: GenerateRequest) -> Stream:
        """Queue a prepared request. Raises Overloaded at once when the queue is full, ModelUnavailable when down."""

    def fingerprint(self) -> str:
        """Revision and quantisation, and the date where prompts hold it: what a text depends on beside the request."""

    def status(self) -> BackendStatus: ...

    def preload(self, on_failure: Callable[[str], None]) -> None:
        """Start loading the weights in the background. on_failure: called from there, with one line, if that fails."""

    def watch(self, on_hang: Callable[[str], None]) -> None:
        """on_hang: called from another thread, with one line, when only a new process can help."""

    def close(self, grace: float) -> None:
        """Admit nothing more, let running streams finish for `grace` seconds, then end the rest with an error."""
