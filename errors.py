"""What may go wrong and be told to a client: a status, a code and a message; no HTTP library knows these."""

from __future__ import annotations


class ServiceError(Exception):
    """A failure with a message for the client, which never holds a prompt, a path or an address.

    param: the field that is to blame. retry_after: seconds until another try can succeed. detail: for the log alone.
    """

    status = 503
    code = "unavailable"

    def __init_subclass__(cls, status: int | None = None, code: str | None = None) -> None:
        cls.status, cls.code = status or cls.status, code or cls.code

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(message if detail is None else detail)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after
        self.detail = detail


class Malformed(ServiceError, status=400, code="malformed"):
    """Not a request that can be read at all."""


class Unauthorized(ServiceError, status=401, code="unauthorized"): ...


class Forbidden(ServiceError, status=403, code="forbidden"): ...


class NotFound(ServiceError, status=404, code="not_found"): ...


class UnknownModel(ServiceError, status=404, code="model_not_found"): ...


class Stalled(ServiceError, status=408, code="request_timeout"):
    """The body stopped arriving (gunicorn.conf.py bounds the wait)."""


class Conflict(ServiceError, status=409, code="conflict"): ...


class TooLarge(ServiceError, status=413, code="too_large"): ...


class UnsupportedMedia(ServiceError, status=415, code="unsupported_media_type"): ...


class InvalidRequest(ServiceError, status=422, code="invalid_value"):
    """Well-formed, but it cannot be served: names the field."""


class RateLimited(ServiceError, status=429, code="rate_limited"):
    """More than this client may ask for now."""


class ClientGone(ServiceError, status=499, code="client_gone"):
    """The client has closed its connection; the status (nginx's) is for the log alone."""


class Overloaded(ServiceError, code="overloaded"):
    """The queue is full. `retry_after` comes from the measured speed and the backlog."""


class ModelUnavailable(ServiceError, code="model_unavailable"):
    """Loading failed or takes too long, the engine is down, or the service is stopping."""


class DeadlineExceeded(ServiceError, code="timeout"): ...


class GenerationFailed(ServiceError, code="generation_failed"):
    """The model could not compute this request (numbers that are not finite, out of memory)."""


class StoreUnavailable(ServiceError, code="store_unavailable"):
    """The database cannot answer: disk full, read-only, corrupt, unreachable or locked. Never means "no such row"."""

    def __init__(self, detail: str) -> None:
        super().__init__("The service cannot look up its state just now.", retry_after=5, detail=detail)
