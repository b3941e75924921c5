"""Strict JSON: bytes in, one object out, and nothing that two parsers could read differently.

Knows no HTTP and no schema: what the fields mean is schemas.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from errors import InvalidRequest, Malformed

_DEEPEST = 32  # the deepest body of the contract has four levels
# Half a UTF-16 pair cannot be written as UTF-8 again, and a NUL ends strings in C: neither is text.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")


def read_json(raw: bytes) -> dict[str, object]:
    """The object in `raw`. Raises Malformed (400) for what is not JSON, InvalidRequest (422) for unusable text."""
    if not raw:
        raise Malformed("The body is empty; send a JSON object.")
    try:
        body = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_bounded
        )
    except RecursionError:
        raise Malformed("The JSON is nested too deeply.") from None
    except ValueError:
        raise Malformed("The body is not valid JSON in UTF-8.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    for field, value in body.items():
        for text in _strings([field, value]):
            _check_text(text, field)
    return body


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("A key appears twice in one JSON object.")
    return found


def _no_constant(name: str) -> object:
    raise Malformed(f"{name} is not JSON.")


def _bounded(digits: str) -> int:
    if len(digits) > 40:  # Python reads up to 4,300 digits, in quadratic time
        raise Malformed("A number has too many digits.")
    return int(digits)


def _strings(value: object, depth: int = 0) -> Iterator[str]:
    if depth > _DEEPEST:
        raise Malformed("The JSON is nested too deeply.")
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item, depth + 1)


def _check_text(text: str, field: str) -> None:
    if found := _UNUSABLE.search(text):
        what = "a NUL character" if found.group() == "\0" else "half a surrogate pair"
        raise InvalidRequest(f"Text must not hold {what}.", param=printable(field))


def printable(name: str) -> str:
    """A key as a client sent it, made safe to show: short, and plain ASCII."""
    return name[:64].encode("ascii", "backslashreplace").decode()
