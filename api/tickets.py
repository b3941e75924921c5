"""Single-use tickets: a request body waiting, sealed, for an EventSource that cannot send a token.

Does not stream; generate.py does, with what comes out of here.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from secrets import token_urlsafe

from api.context import services
from api.middleware import Principal, enter_as, principal
from api.schemas.native import GenerateBody

SECONDS = 60


def issue(body: GenerateBody) -> str:
    """A ticket for `body` in the name of the caller; it dies with the caller's token."""
    rooms, caller, ticket = services(), principal(), token_urlsafe(32)
    plain = json.dumps({"caller": asdict(caller), "body": body.model_dump()}).encode()
    now = time.time()
    sealed = rooms.box.seal(plain, _context(caller.owner))
    rooms.state.put_ticket(ticket, caller.owner, sealed, now + SECONDS, now)
    return ticket


def redeem(ticket: str) -> GenerateBody | None:
    """The body of a ticket, once, and its caller let in; None for a ticket that is used, too old or never was."""
    rooms = services()
    found = rooms.state.take_ticket(ticket, time.time())
    if found is None:
        return None
    kept = json.loads(rooms.box.open(found.body, _context(found.owner)))
    scopes = kept["caller"].pop("scopes")
    enter_as(Principal(**kept["caller"], scopes=None if scopes is None else tuple(scopes)))
    return GenerateBody.model_validate(kept["body"])


def _context(owner: str) -> bytes:
    return b"ticket:" + owner.encode()
