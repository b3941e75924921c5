"""What every request passes before its view: host, size, token, permission, rate. Denied unless said otherwise.

Does not look into bodies; body.py reads them, and only after all this.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import Flask, Request, Response, current_app, g, request
from flask.json.provider import DefaultJSONProvider
from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from werkzeug.wrappers import Response as WerkzeugResponse

from accounts.credentials import Principal
from accounts.roles import Permission, allowed
from accounts.tokens import TokenType
from api import bearer, metering
from api.body import read_json
from api.context import current, services
from errors import Forbidden, Malformed, TooLarge, Unauthorized, UnsupportedMedia

# What a view returns; flask's own type cannot be looked at while running, and flask-openapi3 looks.
Reply = WerkzeugResponse | dict[str, Any] | tuple[dict[str, Any], int] | tuple[dict[str, Any], int, dict[str, str]]
View = TypeVar("View", bound=Callable[..., Any])

SECURED: list[dict[str, list[str]]] = [{"bearer": []}]
_LARGE = ("/generate", "/stream", "/v1/")  # where MAX_BODY holds; elsewhere nobody sends more than a password
_SMALL_BODY = 64 << 10
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT"})
# Text becomes HTML or a script's address only through the two named policies: web/js/trusted.js, and DOMPurify's own.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; manifest-src 'self'; "
    "worker-src 'self'; require-trusted-types-for 'script'; trusted-types page dompurify; "
)


class StrictJSON(DefaultJSONProvider):
    """NaN is not JSON: an answer that holds one is a bug, and ends as a 500 instead of confusing its reader."""

    def dumps(self, obj: Any, **options: Any) -> str:
        return super().dumps(obj, allow_nan=False, **options)


class StrictRequest(Request):
    """A request whose JSON is read strictly, whoever reads it."""

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """The body as an object. Raises Malformed, UnsupportedMedia, TooLarge or InvalidRequest, never returns None."""
        if self.mimetype != "application/json" or self.content_encoding not in (None, "identity"):
            raise UnsupportedMedia("Send JSON with Content-Type: application/json and no Content-Encoding.")
        try:
            raw = self.get_data(cache=False)
        except (OSError, ParseException) as error:  # gunicorn's, for chunks that are none
            raise Malformed("The body could not be read.") from error
        if len(raw) >= (self.max_content_length or 0):
            raise TooLarge("The body is too large.")
        return read_json(raw)


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
    """Put the guards before every view of `app`, and the safe headers on every answer."""
    app.request_class = StrictRequest
    app.json = StrictJSON(app)
    app.before_request(_check_label)
    app.before_request(_check_host)
    app.before_request(_check_size)
    app.before_request(_check_caller)
    app.after_request(_harden)


def principal() -> Principal:
    """The caller of this request."""
    caller: Principal = g.principal
    return caller


def enter_as(caller: Principal) -> None:
    """Let `caller` in, for this request, if the token still stands. Raises Unauthorized."""
    recheck(caller)()
    _enter(caller)


def recheck(caller: Principal) -> Callable[[], None]:
    """A check, good for any thread and time, that raises Unauthorized once the caller's token is void."""
    credentials = services().credentials

    def check() -> None:
        if not credentials.still_stands(caller, time.time()):
            raise Unauthorized("The token is no longer valid.", code="invalid_token")

    return check


def _enter(caller: Principal) -> None:
    g.principal = caller
    current().user, current().user_id, current().key = caller.name, caller.user_id, caller.key_id
    metering.allow(caller)


def _check_label() -> None:
    """Before anything may refuse: a method that HTTP does not know is a client's word, and must not become a label."""
    if request.method not in _METHODS:
        request.prom_do_not_track = True  # type: ignore[attr-defined]


def _check_host() -> None:
    """Refuse names that are not ours: with none listed, on loopback (a page elsewhere may rebind its name to here).

    An address or localhost cannot be rebound, and behind a proxy the names are the proxy's to know.
    """
    settings = services().settings
    if not settings.allowed_hosts and (settings.trusted_proxies or not _is_loopback(settings.host)):
        return
    name = _host_name()
    if name not in {"localhost", settings.host, *settings.allowed_hosts} and not _is_address(name):
        raise Malformed("This host name is not served here; ALLOWED_HOSTS lists those that are.", code="unknown_host")


def _check_size() -> None:
    limit = services().settings.max_body if request.path.startswith(_LARGE) else _SMALL_BODY
    request.max_content_length = limit + 1  # a body that does not say its length is cut there, without a word
    if (request.content_length or 0) > limit:
        raise TooLarge("The body is too large.")


def _check_caller() -> None:
    if request.routing_exception is not None:
        return  # 404 or 405 follows
    view = current_app.view_functions[request.endpoint or ""]
    if getattr(view, "public", False):
        return
    caller = _caller()
    _enter(caller)
    metering.count_request(caller.user_id)
    permission = getattr(view, "permission", None)
    if permission is None or not allowed(caller.role, permission, caller.scopes):
        raise Forbidden("Your role or key does not allow this.")


def _caller() -> Principal:
    caller = services().credentials.find(bearer.claims(TokenType.ACCESS, TokenType.KEY), time.time())
    if caller is None:
        raise Unauthorized("The token is no longer valid.", code="invalid_token")
    return caller


def _host_name() -> str:
    try:
        return urlsplit(f"//{request.host}").hostname or ""
    except ValueError:  # brackets around what is no address
        return ""


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _harden(response: Response) -> Response:
    headers = response.headers
    headers.setdefault("Cache-Control", "no-store")
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Content-Security-Policy"] = _POLICY + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return response
