"""One generation on behalf of one caller: cleaned, limited, opened, watched, and given back whatever happens.

Knows no dialect: how the events are written is the routes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from secrets import token_hex

from flask import Response, request

from api import sse
from api.answers import CacheUse
from api.context import RequestLog, current, services
from api.entry import Entry, begin
from api.metering import Meter, limits
from api.middleware import Principal, principal, recheck
from api.schemas.native import GenerateBody
from errors import InvalidRequest, ServiceError
from model.types import Chunk, Done, Event, GenerateRequest, Message, Stream


@dataclass(frozen=True, slots=True)
class Whole:
    """A finished answer in one piece."""

    text: str
    reasoning: str
    done: Done


@dataclass(frozen=True, slots=True)
class Call:
    """A generation under way. `close` gives everything back, any number of times.

    settle: returns once its beginning is on record, which has to be before anybody hears of it; the end of `events`
    comes when all of it is.
    """

    id: str
    model: str
    cache: CacheUse
    settle: Callable[[], None]
    close: Callable[[], None]
    events: Iterator[Event | None]


def open_call(body: GenerateBody) -> Call:
    """Start what `body` asks for in the name of the caller. Raises ServiceError."""
    rooms, caller, trace = services(), principal(), current()
    meter = Meter(caller.owner, body.model or rooms.model)
    with ExitStack() as held:
        held.enter_context(rooms.calls.take())
        wanted = _request(body, caller, trace.id)
        entry = begin(wanted, body.turns(), caller, trace)
        held.push(entry)
        held.enter_context(rooms.streams.hold(caller.owner, limits().streams))
        held.callback(meter.settle)
        use_cache = body.cache and not request.cache_control.no_store
        answer = rooms.answers.open(wanted, use_cache, lambda prepared: _admit(prepared, entry, meter))
        held.callback(answer.stream.close)
        held.callback(rooms.running.add(caller.owner, trace.id, answer.stream.close))
        trace.cache = entry.cache = answer.cache
        events = _traced(answer.stream, recheck(caller), trace, meter, entry)
        return Call(trace.id, wanted.model, answer.cache, entry.settle, held.pop_all().close, events)
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
    response = sse.respond(_settled(call), frames, call.close)
    response.headers["X-Cache"] = call.cache
    return response


def _settled(call: Call) -> Iterator[Event | None]:
    call.settle()  # a hit has not waited for it yet: in one piece it needs one sync for beginning and end
    yield from call.events


def _admit(prepared: GenerateRequest, entry: Entry, meter: Meter) -> None:
    """What has to be sure before the model is asked."""
    meter.reserve(prepared)
    entry.settle()


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


def _traced(source: Stream, check: sse.Check, trace: RequestLog, meter: Meter, entry: Entry) -> Iterator[Event | None]:
    meter.begin()
    try:
        with entry:
            for event in sse.watched(source, sse.client_check(request.environ), check):
                meter.observe(event)
                entry.hear(event)
                if isinstance(event, Done):
                    trace.done = event
                yield event
    except ServiceError as error:
        trace.error = error.code
        if not isinstance(error, sse.ClientGone):
            meter.fail()
        raise
