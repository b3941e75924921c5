"""Text in our own format: whole, as a stream, by ticket for EventSource, and cancelled.

Makes no text and keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from accounts.roles import Permission
from api import sse, tickets
from api.calls import Call, open_call, read_all, stream
from api.context import services
from api.errors import ErrorBody, payload
from api.middleware import SECURED, Reply, needs, principal, public
from api.schemas.native import GenerateBody, GenerateOut, IdPath, TicketOut, TicketQuery, UsageOut
from errors import NotFound, ServiceError
from model.types import Chunk, Event, Status

blueprint = APIBlueprint(
    "generate",
    __name__,
    abp_tags=[Tag(name="Generate")],
    abp_responses={code: ErrorBody for code in (400, 401, 403, 404, 413, 415, 422, 429, 503)},
)


@blueprint.post("/generate", security=SECURED, responses={200: GenerateOut})
@needs(Permission.GENERATE)
def generate(body: GenerateBody) -> Reply:
    """The whole answer at once."""
    call = open_call(body)
    whole = read_all(call)
    out = GenerateOut(
        id=call.id,
        model=call.model,
        response=whole.text,
        reasoning=whole.reasoning,
        finish_reason=whole.done.finish_reason,
        usage=UsageOut.of(whole.done.usage),
        cached=call.cache == "hit",
        served_by=whole.done.served_by,
    )
    return out.model_dump(mode="json"), 200, {"X-Cache": call.cache}


@blueprint.post("/stream", security=SECURED, responses={200: sse.DOCUMENTED})
@needs(Permission.GENERATE)
def stream_body(body: GenerateBody) -> Reply:
    """The answer as server-sent events."""
    return _stream(body)


@blueprint.post("/stream/ticket", security=SECURED, responses={200: TicketOut})
@needs(Permission.GENERATE)
def ticket(body: GenerateBody) -> Reply:
    """A single-use ticket for `GET /stream`, because EventSource cannot send a token."""
    return TicketOut(ticket=tickets.issue(body), expires_in=tickets.SECONDS).model_dump()


@blueprint.get("/stream", responses={200: sse.DOCUMENTED, 204: None})
@public
def stream_ticket(query: TicketQuery) -> Reply:
    """The answer to the body that the ticket was made for; 204 for a used ticket, so that EventSource stops."""
    body = tickets.redeem(query.ticket)
    return Response(status=204) if body is None else _stream(body)


@blueprint.delete("/requests/<id>", security=SECURED, responses={204: None})
@needs(Permission.GENERATE)
def cancel(path: IdPath) -> Reply:
    """Cancel one's own request: its stream ends with `cancelled`."""
    if not services().running.cancel(principal().user_id, path.id.removeprefix("chatcmpl-")):
        raise NotFound("No request of yours with this id is running.", param="id")
    return Response(status=204)


def _stream(body: GenerateBody) -> Response:
    call = open_call(body)
    return stream(call, NativeFrames(call))


@dataclass(slots=True)
class NativeFrames:
    """Events as API.md writes them; only texts are numbered."""

    call: Call
    sent: int = 0

    def event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Chunk):
            self.sent += 1
            yield sse.frame({"text": event.text, "channel": event.channel}, id=self.sent)
        elif isinstance(event, Status):
            known = {name: value for name, value in asdict(event).items() if value is not None}
            yield sse.frame(known, event="status")
        else:
            usage = UsageOut.of(event.usage).model_dump()
            ending = {"id": self.call.id, "finish_reason": event.finish_reason, "usage": usage}
            hit = self.call.cache == "hit"
            yield sse.frame({**ending, "cached": hit, "served_by": event.served_by}, event="done")

    def error(self, error: ServiceError) -> Iterator[bytes]:
        yield sse.frame(payload(error, self.call.id), event="error")
