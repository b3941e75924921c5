"""The parser and the framing against anything at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
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
# `counted` adds up over the examples of a test, as it does over parameters.
adding_up = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.promise("P1", injected="any JSON object, however written")
@adding_up
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_every_object_is_read_as_what_it_is(
    counted: Callable[..., None], body: dict[str, object], ascii: bool, indent: int | None
) -> None:
    read = read_json(json.dumps(body, ensure_ascii=ascii, indent=indent).encode())
    counted(equal_objects=int(read == body))
    assert read == body


@pytest.mark.promise("P1", injected="any bytes, and any object with a few bytes changed", counted="no other error")
@adding_up
@given(st.binary(max_size=200) | OBJECTS.map(lambda body: json.dumps(body).encode()), st.integers(0, 1 << 32))
def test_no_bytes_at_all_raise_anything_else(counted: Callable[..., None], raw: bytes, seed: int) -> None:
    dice, changed = random.Random(seed), bytearray(raw)
    for _ in range(dice.randrange(3) if raw else 0):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    try:
        read = read_json(bytes(changed))
        counted(objects=int(isinstance(read, dict)))
        assert isinstance(read, dict)
    except (Malformed, InvalidRequest) as error:
        counted(refused=int(error.status in (400, 422)))
        assert error.status in (400, 422)


@pytest.mark.promise(
    "P1", injected="any text in an event", counted="read back as they were, by the rules of EventSource"
)
@adding_up
@given(st.dictionaries(TEXT, VALUES, max_size=4), st.none() | st.integers(0, 1 << 40))
def test_every_event_is_one_event(counted: Callable[..., None], fields: dict[str, object], id: int | None) -> None:
    written = (sse.frame(fields, event="message", id=id) * 2 + sse.PING).decode()
    blocks = written.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    assert len(blocks) == 4 and blocks[2:] == [": ping", ""]
    counted(events=len(blocks[:2]))
    for block in blocks[:2]:
        named = dict(line.split(": ", 1) for line in block.split("\n"))
        assert json.loads(named["data"]) == fields
        assert named["event"] == "message" and named.get("id") == (None if id is None else str(id))
