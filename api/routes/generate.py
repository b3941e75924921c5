"""Text in our own format: whole, as a stream, by ticket for EventSource; who is on it now, and how to end one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from flask import Response

from accounts.roles import Permission, allowed
from api import bearer, sse
from api.audit_events import record
from api.context import services
from api.errors import payload
from api.generation import Generation, read_all, start
from api.middleware import SECURED, TOKENS, Reply, api_blueprint, enter, needs, principal, public
from api.schemas.native import GenerateBody, GenerateOut, IdPath, RequestsOut, TicketOut, TicketQuery
from errors import NotFound, ServiceError
from model.types import Chunk, Done, Event, Status

TICKET_SECONDS = 60

blueprint = api_blueprint("generate", "Generate", 400, 401, 403, 404, 408, 413, 415, 422, 429, 503, secured=False)


@blueprint.post("/generate", security=SECURED, responses={200: GenerateOut})
@needs(Permission.GENERATE)
def generate(body: GenerateBody) -> Reply:
    """The whole answer at once."""
    generation = start(body)
    done, texts = read_all(generation), generation.texts()
    out = {"model": generation.request.model, "response": texts["answer"], "reasoning": texts["reasoning"]}
    return {**out, **_ending(generation, done)}


@blueprint.post("/stream", security=SECURED, responses={200: sse.DOCUMENTED})
@needs(Permission.GENERATE)
def stream_body(body: GenerateBody) -> Reply:
    """The answer as server-sent events."""
    return _stream(body)


@blueprint.post("/stream/ticket", security=SECURED, responses={200: TicketOut})
@needs(Permission.GENERATE)
def ticket(body: GenerateBody) -> Reply:
    """A single-use ticket for `GET /stream`, because EventSource cannot send a token."""
    caller, expires = principal(), min(time.time() + TICKET_SECONDS, principal().expires)
    content = json.dumps([bearer.claims(*TOKENS), body.model_dump(exclude_unset=True)])
    return {"ticket": services().tickets.put(caller.user_id, content.encode(), expires), "expires_in": TICKET_SECONDS}


@blueprint.get("/stream", responses={200: sse.DOCUMENTED, 204: None})
@public
def stream_ticket(query: TicketQuery) -> Reply:
    """The answer to the body that the ticket was made for; 204 for a used ticket, so that EventSource stops."""
    content = services().tickets.take(query.ticket)
    if content is None:
        return Response(status=204)
    claims, body = json.loads(content)
    enter(claims)
    return _stream(GenerateBody.model_validate(body))


@blueprint.get("/admin/requests", security=SECURED, responses={200: RequestsOut})
@needs(Permission.MANAGE_USERS)
def running() -> Reply:
    """The generations under way, oldest first: whose they are and how far, never what they say."""
    return RequestsOut(requests=list(services().running.values())).model_dump()


@blueprint.delete("/requests/<id>", security=SECURED, responses={204: None})
@needs(Permission.GENERATE)
def cancel(path: IdPath) -> Reply:
    """Cancel one's own request, or as an administrator anyone's: its stream ends with `cancelled`."""
    caller, id = principal(), path.id.removeprefix("chatcmpl-")
    found = [each for each in list(services().running.values()) if each.id == id]
    mine = [each for each in found if each.request.owner == caller.user_id]
    if not mine and allowed(caller.role, Permission.MANAGE_USERS, caller.scopes):
        mine = found
        for each in found:
            record(caller.name, "request cancelled", of_request=id, account=each.user)
    if not mine:
        raise NotFound("No request of yours with this id is running.", param="id")
    for each in mine:
        each.cancel()
    return Response(status=204)


def _stream(body: GenerateBody) -> Response:
    generation = start(body)
    return sse.respond(generation.events, NativeDialect(generation), generation.close)


def _ending(generation: Generation, done: Done) -> dict[str, Any]:
    return {
        "id": generation.id,
        "finish_reason": done.finish_reason,
        "usage": {**asdict(done.usage), "total_tokens": done.usage.total_tokens},
        "cached": generation.cache == "hit",
        "served_by": done.served_by,
        "sanitised": generation.sanitised,
    }


@dataclass(slots=True)
class NativeDialect:
    """Events as docs/api.md writes them; only texts are numbered."""

    generation: Generation
    sent: int = 0

    def event(self, event: Event) -> bytes:
        if isinstance(event, Chunk):
            self.sent += 1
            return sse.frame({"text": event.text, "channel": event.channel}, id=self.sent)
        if isinstance(event, Status):
            known = {name: value for name, value in asdict(event).items() if value is not None}
            return sse.frame(known, event="status")
        return sse.frame(_ending(self.generation, event), event="done")

    def error(self, error: ServiceError) -> bytes:
        return sse.frame(payload(error, self.generation.id), event="error")
