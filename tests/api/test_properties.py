"""The parser and the framing against anything at all."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import sse
from api.middleware import read_json
from errors import InvalidRequest, Malformed

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=5)


@pytest.mark.promise("P1", injected="any JSON object, however written", counted="read as what it is")
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_every_object_is_read_as_what_it_is(body: dict[str, object], ascii: bool, indent: int | None) -> None:
    assert read_json(json.dumps(body, ensure_ascii=ascii, indent=indent).encode()) == body


@pytest.mark.promise(
    "P1", injected="any bytes, and any object with a few bytes changed", counted="an object, 400 or 422; no other error"
)
@given(st.binary(max_size=200) | OBJECTS.map(lambda body: json.dumps(body).encode()), st.integers(0, 1 << 32))
def test_no_bytes_at_all_raise_anything_else(raw: bytes, seed: int) -> None:
    dice, changed = random.Random(seed), bytearray(raw)
    for _ in range(dice.randrange(3) if raw else 0):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    try:
        assert isinstance(read_json(bytes(changed)), dict)
    except (Malformed, InvalidRequest) as error:
        assert error.status in (400, 422)


@pytest.mark.promise(
    "P1", injected="any text in an event", counted="one event, read back as it was, by the rules of EventSource"
)
@given(st.dictionaries(TEXT, VALUES, max_size=4), st.none() | st.integers(0, 1 << 40))
def test_every_event_is_one_event(fields: dict[str, object], id: int | None) -> None:
    written = (sse.frame(fields, event="message", id=id) * 2 + sse.PING).decode()
    blocks = written.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    assert len(blocks) == 4 and blocks[2:] == [": ping", ""]
    for block in blocks[:2]:
        named = dict(line.split(": ", 1) for line in block.split("\n"))
        assert json.loads(named["data"]) == fields
        assert named["event"] == "message" and named.get("id") == (None if id is None else str(id))
