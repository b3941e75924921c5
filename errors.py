"""What may go wrong and be told to a client: a status, a code and a message; no HTTP library knows these."""

from __future__ import annotations


class ServiceError(Exception):
    """A failure with a message for the client, which never holds a prompt, a path or an address.

    param: the field that is to blame. retry_after: seconds until another try can succeed. detail: for the log alone.
    """

    status = 503
    code = "unavailable"

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


class Malformed(ServiceError):
    """Not a request that can be read at all."""

    status = 400
    code = "malformed"


class Unauthorized(ServiceError):
    status = 401
    code = "unauthorized"


class Forbidden(ServiceError):
    status = 403
    code = "forbidden"


class NotFound(ServiceError):
    status = 404
    code = "not_found"


class UnknownModel(ServiceError):
    status = 404
    code = "model_not_found"


class Conflict(ServiceError):
    status = 409
    code = "conflict"


class TooLarge(ServiceError):
    status = 413
    code = "too_large"


class UnsupportedMedia(ServiceError):
    status = 415
    code = "unsupported_media_type"


class InvalidRequest(ServiceError):
    """Well-formed, but it cannot be served: names the field."""

    status = 422
    code = "invalid_value"


class RateLimited(ServiceError):
    """More than this client may ask for now."""

    status = 429
    code = "rate_limited"


class Overloaded(ServiceError):
    """The queue is full. `retry_after` comes from the measured speed and the backlog."""

    code = "overloaded"


class ModelUnavailable(ServiceError):
    """Loading failed or takes too long, the engine is down, or the service is stopping."""

    code = "model_unavailable"


class DeadlineExceeded(ServiceError):
    code = "timeout"


class GenerationFailed(ServiceError):
    """The model could not compute this request (numbers that are not finite, out of memory)."""

    code = "generation_failed"


class StoreUnavailable(ServiceError):
    """The database cannot answer: disk full, read-only, corrupt, unreachable or locked. Never means "no such row"."""

    code = "store_unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__("The service cannot look up its state just now.", retry_after=5, detail=detail)
