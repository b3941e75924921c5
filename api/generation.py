"""One generation, from a checked body to its last event: cleaned, limited, recorded, and given back in every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from secrets import token_hex
from typing import Any, Literal

from flask import request

from accounts.credentials import Principal
from api import sse
from api.audit_events import GenerationAudit
from api.context import current, services
from api.middleware import limits, principal, recheck
from api.schemas.native import GenerateBody
from errors import ClientGone, InvalidRequest, ServiceError
from model.types import Channel, Chunk, Done, Event, FinishReason, GenerateRequest, Message, Status, Usage
from quotas.usage import Counts, Reservation

CacheUse = Literal["hit", "miss", "off"]
_SHORT = 8_000  # characters: cleaning and tokenising fewer takes under 5 ms, and needs no place of its own


@dataclass(slots=True)
class Generation:
    """A generation under way. `close` gives everything back, any number of times; `cancel` lets its events end soon.

    events: None for each silence of a few seconds; Done comes when the end is in the audit log. state: loading, queued
    or running. begun: it counts as a request. error: the code of what ended it early.
    """

    id: str
    user: str
    request: GenerateRequest
    sanitised: int = 0
    cache: CacheUse | None = None
    events: Iterator[Event | None] = field(init=False)
    close: Callable[[], None] = field(init=False)
    cancel: Callable[[], None] = field(init=False)
    started: float = field(default_factory=time.time)
    state: str = "queued"
    chunks: list[Chunk] = field(default_factory=list)
    done: Done | None = None
    begun: bool = False
    error: str | None = None

    def observe(self, event: Event | None) -> None:
        if isinstance(event, Chunk):
            self.state = "running"
            self.chunks.append(event)
        elif isinstance(event, Status):
            self.state = event.stage
        else:
            self.done = event or self.done

    @property
    def tokens(self) -> int:
        """How many were sent so far."""
        return len(self.chunks)

    def texts(self) -> dict[Channel, str]:
        """What was said so far."""
        channels: tuple[Channel, ...] = ("reasoning", "answer")
        return {name: "".join(chunk.text for chunk in self.chunks if chunk.channel == name) for name in channels}

    def counts(self) -> Counts:
        """What the user pays: Done's figures, else what came. Cached answers, and failures without text, are free."""
        if not self.begun or self.cache == "hit":
            return Counts(int(self.begun))
        usage = self.done.usage if self.done else Usage(len(self.request.prompt_ids), self.tokens)
        failed = self.error not in (None, ClientGone.code)  # the service did, not the client
        prompt = 0 if failed and not usage.completion_tokens else usage.prompt_tokens
        return Counts(1, prompt, usage.cached_tokens, usage.completion_tokens, int(failed))


def start(body: GenerateBody) -> Generation:
    """Start what `body` asks for in the name of the caller. Raises ServiceError."""
    caller, log, found = principal(), current(), services()
    found.check_space()
    generation = log.generation = Generation(log.id, caller.name, _wanted(body, caller, log.id))
    audit, allowed = GenerationAudit(generation, caller, log), limits(caller)
    with ExitStack() as held:
        held.enter_context(found.generations.take())
        held.push(audit)
        held.enter_context(found.streams.hold(caller.user_id, allowed.streams))
        generation.request, generation.sanitised = cleaned, _ = _clean(body, generation.request)
        generation.cache, key, remembered = _look_up(body, cleaned)
        reservation = None
        if remembered is None:
            with _place(cleaned):
                generation.request = found.backend.prepare(cleaned)
            reservation = _reserve(generation.request, allowed.tokens_per_day)
        held.callback(lambda: found.usage.record(caller.user_id, cleaned.model, generation.counts(), reservation))
        if remembered is not None:
            generation.events = iter(_replay(remembered, generation))
            audit.end()
        else:
            audit.start()
            stream = found.backend.submit(generation.request)
            held.callback(stream.close)
            generation.cancel = stream.close
            found.running[cleaned.id] = generation
            held.callback(found.running.pop, cleaned.id, None)
            watched = sse.watched(stream, sse.client_check(request.environ), recheck(caller))
            keep = partial(found.cache.put, key) if key is not None else None
            generation.events = _observed(watched, generation, keep, audit)
        generation.begun = True
        generation.close = held.pop_all().close
    return generation


def read_all(generation: Generation) -> Done:
    """The end of the whole answer, whose texts are then there. Raises what the generation raises, and ClientGone."""
    with closing(generation):
        for _ in generation.events:
            pass
    if generation.done is None:
        raise ServiceError("The answer ended early.")
    return generation.done


def _wanted(body: GenerateBody, caller: Principal, id: str) -> GenerateRequest:
    return GenerateRequest(
        id=f"{id}.{token_hex(4)}",  # two callers may have chosen the same request id
        owner=caller.user_id,
        model=body.model or services().model,
        messages=tuple(Message(message.role, message.content) for message in body.conversation()),
        sampling=body.sampling(),
        max_new_tokens=body.max_new_tokens,
        stop=tuple(body.stop),
        timeout=services().settings.request_timeout,
    )


def _place(wanted: GenerateRequest) -> AbstractContextManager[None]:
    """Where a prompt is worked on. Long ones take turns: a megabyte holds the interpreter's lock for half a second."""
    return services().preparing.take(wanted.timeout) if _length(wanted) > _SHORT else nullcontext()


def _length(wanted: GenerateRequest) -> int:
    return sum(len(message.content) for message in wanted.messages)


def _clean(body: GenerateBody, wanted: GenerateRequest) -> tuple[GenerateRequest, int]:
    """The request cleaned, and how many elements were removed. What cannot fit is refused by its length alone."""
    length, fits = _length(wanted), services().backend.max_characters()
    param = "prompt" if body.messages is None else "messages"
    if length > fits:
        raise InvalidRequest(
            f"The prompt has {length} characters; the model's maximum context length holds at most {fits}. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )
    with _place(wanted):
        cleaned = [_cleaned(message) for message in wanted.messages]
    if not any(message.content.strip() for message, _ in cleaned):
        raise InvalidRequest("The prompt is blank, or nothing is left of it once HTML is removed.", param=param)
    messages = tuple(message for message, _ in cleaned)
    return replace(wanted, messages=messages), sum(removed for _, removed in cleaned)


def _cleaned(message: Message) -> tuple[Message, int]:
    if message.role == "assistant":
        return message, 0
    text, removed = services().sanitise(message.content)
    return Message(message.role, text), removed


def _reserve(prepared: GenerateRequest, tokens_per_day: int) -> Reservation | None:
    """The most that it may take, set aside from its caller's tokens of today. Raises LimitExceeded."""
    if not tokens_per_day:
        return None
    most = len(prepared.prompt_ids) + prepared.max_new_tokens
    reservation = services().usage.reserve(prepared.owner, most, tokens_per_day)
    current().remaining.append(reservation.remaining)
    return reservation


def _look_up(body: GenerateBody, wanted: GenerateRequest) -> tuple[CacheUse, str | None, dict[str, Any] | None]:
    """What the cache is to the request, the key under which its answer is kept, and the answer kept there."""
    if not (body.cache and wanted.sampling.deterministic) or request.cache_control.no_store:
        return "off", None, None
    cache, owner = services().cache, None if services().settings.cache_shared else wanted.owner
    model = wanted.model, services().backend.fingerprint()
    messages = tuple((message.role, message.content) for message in wanted.messages)
    key = cache.key("answer-2", owner, model, messages, astuple(wanted.sampling), wanted.max_new_tokens, wanted.stop)
    found = cache.get(key)
    return ("miss" if found is None else "hit"), key, found


def _observed(
    watched: Iterator[Event | None],
    generation: Generation,
    keep: Callable[[dict[str, Any]], None] | None,
    audit: GenerationAudit,
) -> Iterator[Event | None]:
    """The events, counted, recorded, and kept in the cache once they have ended well."""
    try:
        with audit:
            for event in watched:
                generation.observe(event)
                if isinstance(event, Done):
                    audit.end()
                    if keep is not None and event.finish_reason is not FinishReason.CANCELLED:
                        keep({"texts": generation.texts(), **asdict(event)})
                yield event
    except ServiceError as error:
        generation.error = error.code
        raise


def _replay(kept: dict[str, Any], generation: Generation) -> list[Event]:
    """The events of a kept answer, which the generation has seen then."""
    done = Done(FinishReason(kept["finish_reason"]), Usage(**kept["usage"]), kept["served_by"])
    events: list[Event] = [*(Chunk(text, channel) for channel, text in kept["texts"].items() if text), done]
    for event in events:
        generation.observe(event)
    return events
