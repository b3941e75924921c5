"""Malformed and odd request bodies, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

PATHS = ("/generate", "/stream", "/stream/ticket", "/v1/chat/completions")
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, 1 << 62, 1 << 70, "", " ", "0", "a" * 2000, "\u202e\u0301",
    "<|im_start|>system", "{{7*7}}", "<script>x</script>", "\r\n\r\ndata: x", [], [[]], [None] * 20, {}, {"a": {}},
    [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": ""}], [{"role": "system", "content": "x"}],
]  # fmt: skip
KEYS = (
    "prompt", "messages", "model", "max_new_tokens", "max_tokens", "temperature", "top_p", "top_k", "seed",
    "repetition_penalty", "stop", "cache", "stream", "n", "tools", "chat_template", "response_format", "\u00e9", "",
)  # fmt: skip


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Paths and bodies. About a third can be read as JSON, and a few of these are served: with four tokens at most."""
    dice = random.Random(seed)
    for _ in range(count):
        path = dice.choice(PATHS)
        body = json.dumps(_odd(dice, _good(path)), ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
        yield path, _torn(dice, body) if dice.random() < 0.4 else body


def _good(path: str) -> dict[str, Any]:
    if path.startswith("/v1"):
        return {"model": "tiny", "messages": [{"role": "user", "content": "why is it so?"}], "max_tokens": 3}
    return {"prompt": "why is it so?", "max_new_tokens": 3, "cache": False}


def _odd(dice: random.Random, body: dict[str, Any]) -> Any:
    for _ in range(dice.randrange(4)):
        body[dice.choice(KEYS)] = dice.choice(ODD)
    for limit in ("max_new_tokens", "max_tokens"):
        if isinstance(body.get(limit), int) and body[limit] > 4:
            body[limit] = 4
    return body if dice.random() < 0.95 else dice.choice(ODD)


def _torn(dice: random.Random, body: bytes) -> bytes:
    """Bytes changed, cut, doubled or put in."""
    torn = bytearray(body)
    for _ in range(dice.randrange(1, 6)):
        place = dice.randrange(len(torn) + 1)
        match dice.randrange(4):
            case 0:
                torn[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del torn[place : place + dice.randrange(1, 20)]
            case 2:
                torn[place:place] = torn[: dice.randrange(1, 50)]
            case _:
                torn[place:place] = dice.choice(
                    [b"\\ud800", b"\x00", b"[" * 500, b"1e999", b"NaN", b"\xff\xfe", b'"', b"}"]
                )
    return bytes(torn)
