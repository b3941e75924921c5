"""What the tests of the audit log share: the ways to have text made, and a look at what was recorded.

Proves nothing itself.
"""

from __future__ import annotations

import hashlib
from typing import Any

from audit.audit import Wanted

from api.context import Services
from audit.verify import verify

PROMPT = "<b>why</b> is the sky blue"
SENT, CLEANED = f'[["user","{PROMPT}"]]', '[["user","why is the sky blue"]]'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records(rooms: Services, *kinds: str) -> list[dict[str, Any]]:
    """In order, those of generations unless said otherwise."""
    wanted = kinds or ("start", "end")
    return [each for each in rooms.audit.find(Wanted(), newest_first=False) if each["kind"] in wanted]


def whole(rooms: Services) -> bool:
    place = rooms.audit.place
    return not verify(place.folder, place.head, place.signer).problems


WAYS = {
    "/generate": {"prompt": PROMPT, "temperature": 0},
    "/stream": {"prompt": PROMPT, "temperature": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": PROMPT}],
        "model": "smollm2-135m-instruct",
        "temperature": 0,
    },
}
