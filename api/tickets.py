"""Tickets for EventSource, which cannot send a token: the request body waits, and its caller with it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from accounts.credentials import Principal
from accounts.users import UserLimits
from api.context import services
from api.middleware import enter_as, principal, recheck
from api.schemas.native import GenerateBody

SECONDS = 60


def issue(body: GenerateBody) -> str:
    """A ticket for `body` in the name of the caller; it dies with the caller's token. Raises TooLarge, RateLimited."""
    caller = principal()
    content = json.dumps([asdict(caller), body.model_dump(exclude_unset=True)])
    return services().tickets.put(caller.user_id, content.encode(), min(time.time() + SECONDS, caller.expires))


def redeem(ticket: str) -> GenerateBody | None:
    """The body of a ticket, once, and its caller let in; None for a ticket that is used, too old or never was."""
    content = services().tickets.take(ticket)
    if content is None:
        return None
    caller, body = json.loads(content)
    found = Principal(**{**caller, "limits": UserLimits(**caller["limits"])})
    recheck(found)()
    enter_as(found)
    return GenerateBody.model_validate(body)
