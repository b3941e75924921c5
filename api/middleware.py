"""What every request passes before its view: host, size, token, permission, rate; and the strict JSON reader."""

from __future__ import annotations

import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog
from flask import Flask, Request, Response, current_app, g, request
from flask.json.provider import DefaultJSONProvider
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from werkzeug.exceptions import ClientDisconnected
from werkzeug.wrappers import Response as WerkzeugResponse

from accounts.credentials import Principal
from accounts.roles import Permission, allowed
from accounts.tokens import TokenType
from api import bearer
from api.context import RequestLog, current, services
from api.errors import ErrorBody
from errors import Forbidden, InvalidRequest, Malformed, Stalled, TooLarge, Unauthorized, UnsupportedMedia
from quotas.limits import Limits
from telemetry import request_id

# What a view returns; flask's own type cannot be looked at while running, and flask-openapi3 looks.
Reply = WerkzeugResponse | dict[str, Any] | tuple[dict[str, Any], int]
View = TypeVar("View", bound=Callable[..., Any])

TOKENS = (TokenType.ACCESS, TokenType.KEY)  # the types that let in; a refresh token is for /refresh alone
SECURED: list[dict[str, list[str]]] = [{"bearer": []}]
_LARGE = ("/generate", "/stream", "/v1/")  # where MAX_BODY holds; elsewhere a password is the most
_SMALL_BODY = 64 << 10
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT"})
# Text becomes HTML or a script's address only through the two named policies: web/js/trusted.js, and DOMPurify's own.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; manifest-src 'self'; "
    "worker-src 'self'; require-trusted-types-for 'script'; trusted-types page dompurify; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class StrictJSON(DefaultJSONProvider):
    """NaN is not JSON: an answer that holds one is a bug, and becomes a 500."""

    def dumps(self, obj: Any, **options: Any) -> str:
        return super().dumps(obj, allow_nan=False, **options)


class StrictRequest(Request):
    """A request whose JSON is always read strictly."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """The body as an object. Raises Malformed, UnsupportedMedia, TooLarge or InvalidRequest, never returns None."""
        if self.mimetype != "application/json" or self.content_encoding not in (None, "identity"):
            raise UnsupportedMedia("Send JSON with Content-Type: application/json and no Content-Encoding.")
        try:
            raw = self.get_data(cache=False)
        except (OSError, ParseException, ClientDisconnected) as error:  # gunicorn's second, for malformed chunks
            if isinstance(error, BlockingIOError) or isinstance(error.__context__, BlockingIOError):
                raise Stalled("The request took too long to arrive.") from error
            raise Malformed("The body could not be read.") from error
        if len(raw) >= (self.max_content_length or 0):
            raise TooLarge("The body is too large.")
        return read_json(raw)


_DEEPEST = 32  # the deepest body of the contract has four levels
# Half a UTF-16 pair cannot be written as UTF-8 again, and a NUL ends strings in C: neither is text.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")


def read_json(raw: bytes) -> dict[str, object]:
    """The object in `raw`. Raises Malformed (400) for what is not JSON, InvalidRequest (422) for unusable text."""
    if not raw:
        raise Malformed("The body is empty; send a JSON object.")
    try:
        body = _DECODER.decode(raw.decode("utf-8"))
    except RecursionError:
        raise Malformed("The JSON is nested too deeply.") from None
    except ValueError:
        raise Malformed("The body is not valid JSON in UTF-8.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    for field, value in body.items():
        for text in _strings([field, value]):
            if found := _UNUSABLE.search(text):
                what = "a NUL character" if found.group() == "\0" else "half a surrogate pair"
                name = field[:64].encode("ascii", "backslashreplace").decode()
                raise InvalidRequest(f"Text must not hold {what}.", param=name)
    return body


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("A key appears twice in one JSON object.")
    return found


def _bounded(digits: str) -> int:
    if len(digits) > 40:  # Python reads up to 4,300 digits, in quadratic time
        raise Malformed("A number has too many digits.")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=int, parse_int=_bounded)  # NaN is no int


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


def api_blueprint(name: str, tag: str, *errors: int, secured: bool = True) -> APIBlueprint:
    """The routes of one file under one heading of /docs. errors: the statuses that they may have beside their own."""
    return APIBlueprint(
        name,
        __name__,
        abp_tags=[Tag(name=tag)],
        abp_security=SECURED if secured else [],
        abp_responses=dict.fromkeys(errors, ErrorBody),
    )


def needs(permission: Permission) -> Callable[[View], View]:
    """Mark a view: only for tokens that hold `permission`."""

    def mark(view: View) -> View:
        view.permission = permission  # type: ignore[attr-defined]
        return view

    return mark


def public(view: View) -> View:
    """Mark a view: for everybody."""
    view.public = True  # type: ignore[attr-defined]
    return view


def register(app: Flask) -> None:
    """Put the guards before every view of `app`, and an id, the safe headers and a line in the log on every answer."""
    app.request_class = StrictRequest
    app.json = StrictJSON(app)
    app.before_request(_begin)  # one, because Flask looks at each anew for every request
    app.after_request(_finish)


def principal() -> Principal:
    """The caller of this request."""
    caller: Principal = g.principal
    return caller


def enter(claims: Mapping[str, Any]) -> Principal:
    """Let in whose token made these claims, for this request. Raises Unauthorized when it is no longer good."""
    caller = services().credentials.find(claims, time.time())
    if caller is None:
        raise Unauthorized("The token is no longer valid.", code="invalid_token")
    g.principal = caller
    current().user, current().user_id, current().key = caller.name, caller.user_id, caller.key_id
    return caller


def recheck(caller: Principal) -> Callable[[], None]:
    """A check, good for any thread and time, that raises Unauthorized once the caller's token is void."""
    credentials = services().credentials

    def check() -> None:
        if not credentials.still_stands(caller, time.time()):
            raise Unauthorized("The token is no longer valid.", code="invalid_token")

    return check


def limits(caller: Principal) -> Limits:
    """What the caller may have."""
    return services().limits.of(caller.role, **asdict(caller.limits))


def count_request(caller: Principal) -> None:
    """Raises LimitExceeded."""
    current().remaining.append(services().rate.hit(caller.user_id, limits(caller).rpm))


def _begin() -> None:
    id = request_id(request.headers.get("X-Request-Id"))
    route = request.url_rule.rule if request.url_rule else None
    g.request_log = RequestLog(id, request.method[:16], route, request.path[:256])
    structlog.contextvars.bind_contextvars(request_id=id)
    if request.method not in _METHODS:  # what a client makes up must not become a label
        request.prom_do_not_track = True  # type: ignore[attr-defined]
    _check_host()
    limit = services().settings.max_body if request.path.startswith(_LARGE) else _SMALL_BODY
    request.max_content_length = limit + 1  # a body that does not say its length is cut there, without a word
    if (request.content_length or 0) > limit:
        raise TooLarge("The body is too large.")
    if request.routing_exception is None:  # else 404 or 405 follows
        _check_caller(current_app.view_functions[request.endpoint or ""])


def _check_host() -> None:
    """Refuse names that are not ours: with none listed, on loopback (a page elsewhere may rebind its name to here).

    An address or localhost cannot be rebound, and behind a proxy the names are the proxy's to know.
    """
    settings = services().settings
    listens = ip_address(settings.host)
    loopback = settings.host == "localhost" or (listens is not None and listens.is_loopback)
    guarded = settings.allowed_hosts or (loopback and not settings.trusted_proxies)
    if guarded and not _is_served(request.host, (settings.host, *settings.allowed_hosts)):
        raise Malformed("This host name is not served here; ALLOWED_HOSTS lists those that are.", code="unknown_host")


def _check_caller(view: Callable[..., Any]) -> None:
    if getattr(view, "public", False):
        return
    caller = enter(bearer.claims(*TOKENS))
    count_request(caller)
    permission = getattr(view, "permission", None)
    if permission is None or not allowed(caller.role, permission, caller.scopes):
        raise Forbidden("Your role or key does not allow this.")


@lru_cache(256)
def _is_served(host: str, names: tuple[str, ...]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets around what is no address
        return False
    return name == "localhost" or name in names or ip_address(name) is not None


@lru_cache(256)
def ip_address(name: str) -> IPv4Address | IPv6Address | None:
    """The address that `name` is, if it is one."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _finish(response: Response) -> Response:
    headers, log = response.headers, current()
    if response.status_code in (429, 503):  # also where nothing below could tell when to come back
        headers.setdefault("Retry-After", "1")
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Content-Security-Policy"] = _POLICY
    headers["X-Request-Id"] = log.id
    if response.status_code == 200 and (made := log.generation):
        headers["X-Cache"] = str(made.cache)
        if made.sanitised:
            headers["X-Sanitised"] = str(made.sanitised)
    for each in log.remaining:  # in the names that OpenAI's clients know
        headers[f"X-RateLimit-Limit-{each.kind}"] = str(each.limit)
        headers[f"X-RateLimit-Remaining-{each.kind}"] = str(each.left)
        headers[f"X-RateLimit-Reset-{each.kind}"] = f"{each.reset:.3f}s"
    response.call_on_close(lambda: log.write(response.status_code))
    return response
