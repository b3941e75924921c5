"""What the tests of the audit log share: the ways to have text made, and a look at what was recorded."""

from __future__ import annotations

import hashlib
from typing import Any

from api.context import Services
from audit.verify import verify
from tests.audit.logs import find

PROMPT = "why is <!-- not --><script></script>the sky blue"
SENT, CLEANED = f'[["user","{PROMPT}"]]', '[["user","why is the sky blue"]]'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def records(services: Services, *kinds: str) -> list[dict[str, Any]]:
    """In order, those of generations unless said otherwise."""
    return [each for each in find(services.audit) if each["kind"] in (kinds or ("start", "end"))]


def whole(services: Services) -> bool:
    log = services.audit
    return not verify(log.database, log.keys, log.head_path).problems


WAYS = {
    "/generate": {"prompt": PROMPT, "temperature": 0},
    "/stream": {"prompt": PROMPT, "temperature": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": PROMPT}],
        "model": "smollm2-135m-instruct",
        "temperature": 0,
    },
}
