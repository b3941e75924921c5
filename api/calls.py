"""One generation on behalf of one caller: cleaned, limited, opened, watched, and given back whatever happens.

Knows no dialect: how the events are written is the routes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from secrets import token_hex

from flask import Response, request

from api import generation_audit, sse
from api.answers import CacheUse
from api.context import RequestLog, current, services
from api.generation_audit import GenerationAudit
from api.metering import Meter, allowance
from api.middleware import Principal, principal, recheck
from api.schemas.native import GenerateBody
from errors import InvalidRequest, ServiceError
from model.types import Chunk, Done, Event, GenerateRequest, Message, Stream
from quotas.limits import Lease


@dataclass(frozen=True, slots=True)
class Whole:
    """A finished answer in one piece."""

    text: str
    reasoning: str
    done: Done


@dataclass(frozen=True, slots=True)
class Call:
    """A generation under way. `close` gives everything back, any number of times."""

    id: str
    model: str
    cache: CacheUse
    close: Callable[[], None]
    events: Iterator[Event | None]


def open_call(body: GenerateBody) -> Call:
    """Start what `body` asks for in the name of the caller. Raises ServiceError and LimitExceeded."""
    rooms, caller, trace = services(), principal(), current()
    meter = Meter(caller.owner)
    with ExitStack() as held:
        held.enter_context(rooms.calls.take())
        wanted = _request(body, caller, trace.id)
        entry = generation_audit.start(wanted, body.turns(), caller, trace, None)
        held.push(entry)
        lease = rooms.streams.take(caller.owner, allowance().streams)
        held.callback(lease.give_back)
        held.callback(meter.settle)
        use_cache = body.cache and not request.cache_control.no_store
        answer = rooms.answers.open(wanted, use_cache, meter.reserve)
        held.callback(answer.stream.close)
        held.callback(rooms.running.add(caller.owner, trace.id, answer.stream.close))
        trace.cache = entry.cache = answer.cache
        events = _traced(answer.stream, _watch(caller, lease), trace, meter, entry)
        return Call(trace.id, wanted.model, answer.cache, held.pop_all().close, events)
    raise AssertionError("unreachable")  # for mypy: an ExitStack may swallow exceptions, this one does not


def read_all(call: Call) -> Whole:
    """Wait for the whole answer. Raises what the generation raises, and ClientGone."""
    texts = {"answer": "", "reasoning": ""}
    with closing(call):
        for event in call.events:
            if isinstance(event, Chunk):
                texts[event.channel] += event.text
            elif isinstance(event, Done):
                return Whole(texts["answer"], texts["reasoning"], event)
    raise ServiceError("The answer ended early.")


def stream(call: Call, frames: sse.Frames) -> Response:
    """The answer as server-sent events in the dialect of `frames`."""
    response = sse.respond(call.events, frames, call.close)
    response.headers["X-Cache"] = call.cache
    return response


def _request(body: GenerateBody, caller: Principal, id: str) -> GenerateRequest:
    rooms = services()
    messages = tuple(Message(turn.role, rooms.sanitise(turn.content)) for turn in body.turns())
    if not any(message.content.strip() for message in messages):
        raise InvalidRequest("The prompt is blank once HTML is taken out.", param="prompt")
    return GenerateRequest(
        id=f"{id}.{token_hex(4)}",  # two callers may have chosen the same request id
        owner=caller.owner,
        model=body.model or rooms.model,
        messages=messages,
        sampling=body.sampling(),
        max_new_tokens=body.max_new_tokens,
        stop=tuple(body.stop),
        timeout=rooms.settings.request_timeout,
    )


def _watch(caller: Principal, lease: Lease) -> sse.Check:
    """What is looked at while a generation runs: that its caller may still have it. Keeps its place meanwhile."""
    still_stands = recheck(caller)

    def check() -> None:
        still_stands()
        lease.keep()

    return check


def _traced(
    source: Stream, check: sse.Check, trace: RequestLog, meter: Meter, entry: GenerationAudit
) -> Iterator[Event | None]:
    meter.begin()
    try:
        with entry:
            for event in sse.watched(source, sse.client_check(request.environ), check):
                meter.saw(event)
                entry.observe(event)
                if isinstance(event, Done):
                    trace.done = event
                yield event
    except ServiceError as error:
        trace.error = error.code
        if not isinstance(error, sse.ClientGone):
            meter.failed()
        raise
