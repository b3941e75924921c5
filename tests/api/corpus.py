"""The corpus of bad input: tests/corpus/*.jsonl, one request a line with what it must get.

Judges nothing: it turns a line into bytes, and sends them to a server over a connection of their own.

    name      what is wrong with it
    request   method (POST), path (/generate), type (application/json, or null for none), headers, and one of
              json     a value, in which {"*": [x, n]} is the text or list x repeated n times
              pieces   the body in pieces: text, [text, n], {"hex": digits} or {"gzip": pieces}
              wire     everything that is sent, in pieces, with {token} for a good one
              forge    claims and header that are changed in a good token: null takes one out, {"now": s} is a time from
                      now, {"float": word} a number that JSON does not know
    status    what it must get, or a list of what it may get
    code      of the error; param, where the line has one
    says      the text of a good answer, where it is told: whole, and as a stream
    not       what must not be in the answer
"""

from __future__ import annotations

import gzip
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.api.server import SECONDS, Server

FOLDER = Path(__file__).parents[1] / "corpus"


@dataclass(frozen=True, slots=True)
class Case:
    """One line."""

    name: str
    request: dict[str, Any]
    status: int | list[int]
    code: str | None = None
    param: str | None = None
    says: Any = None
    forbidden: list[str] = field(default_factory=list)

    @property
    def statuses(self) -> list[int]:
        return self.status if isinstance(self.status, list) else [self.status]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    text: str

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)["error"]
        return found


def cases(place: str) -> list[Case]:
    """The lines of one file."""
    lines = (FOLDER / f"{place}.jsonl").read_text().splitlines()
    return [Case(forbidden=line.pop("not", []), **line) for line in map(json.loads, lines)]


def send(server: Server, request: dict[str, Any], token: str) -> Answer:
    """The answer to this request; without a status line it is 0."""
    if "wire" in request:
        return _send_wire(server, joined(request["wire"]).replace(b"{token}", token.encode()))
    headers = {"Authorization": f"Bearer {token}"} | request.get("headers", {})
    path = request.get("path", "/generate").replace("{token}", token)
    if kind := request.get("type", "application/json"):
        headers["Content-Type"] = kind
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        connection.request(request.get("method", "POST"), path, _body(request), headers)
        with connection.getresponse() as response:
            return Answer(response.status, response.read().decode())


def _send_wire(server: Server, sent: bytes) -> Answer:
    with closing(socket.create_connection(("127.0.0.1", server.port), SECONDS)) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return Answer(response.status, response.read().decode())


def _body(request: dict[str, Any]) -> bytes | None:
    if "json" in request:
        return json.dumps(grown(request["json"])).encode()
    return joined(request["pieces"]) if "pieces" in request else None


def grown(value: Any) -> Any:
    """A value with its repetitions written out."""
    if isinstance(value, dict) and set(value) == {"*"}:
        repeated, times = value["*"]
        return repeated * times
    if isinstance(value, dict):
        return {key: grown(inner) for key, inner in value.items()}
    return [grown(inner) for inner in value] if isinstance(value, list) else value


def joined(pieces: list[Any]) -> bytes:
    return b"".join(_bytes(pieces))


def _bytes(pieces: list[Any]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, str):
            yield piece.encode()
        elif isinstance(piece, list):
            yield piece[0].encode() * piece[1]
        elif "hex" in piece:
            yield bytes.fromhex(piece["hex"])
        else:
            yield gzip.compress(joined(piece["gzip"]))
