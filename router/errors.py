"""What a client is told when something is its fault, or ours, in OpenAI's error shape.

Owns the shape and its bound of 1 KiB. Never repeats what the client sent: an error must be smaller than its request."""

from __future__ import annotations

import msgspec

MESSAGE_MAX_CHARS = 600  # with the other fields well under the promised 1 KiB of body

Headers = list[tuple[bytes, bytes]]
JSON: Headers = [(b"content-type", b"application/json")]
CHALLENGE: Headers = [(b"www-authenticate", b"Bearer")]
NO_RETRY: Headers = [(b"x-should-retry", b"false")]  # SDKs would try again in seconds
QUOTA = "insufficient_quota"  # OpenAI's code where waiting a little helps nobody

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(msgspec.Struct, frozen=True):
    """OpenAI's `error` object."""

    message: str
    type: str
    param: str | None
    code: str | None


class RequestError(Exception):
    """The request cannot be served, and the client is told why. Raised once, at the door; never logged as our fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.detail = ErrorDetail(message[:MESSAGE_MAX_CHARS], error_type(status), param, code)

    def headers(self) -> Headers:
        """The response headers."""
        headers = JSON + CHALLENGE if self.status == 401 else JSON
        if self.retry_after_s is not None:
            headers = headers + retry_headers(self.retry_after_s)
        return headers + NO_RETRY if self.detail.code == QUOTA else headers

    def body(self) -> bytes:
        """The response body."""
        return error_body(self.detail)


def error_type(status: int) -> str:
    """OpenAI's `type` of a status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(detail: ErrorDetail) -> bytes:
    """`{"error": {...}}`."""
    return msgspec.json.encode({"error": detail})


def retry_headers(retry_after_s: float | None) -> Headers:
    """When to come back: SDKs read the milliseconds, everybody else the seconds. None: a retry cannot succeed."""
    if retry_after_s is None:
        return NO_RETRY
    return [
        (b"retry-after", b"%d" % max(1, round(retry_after_s))),
        (b"retry-after-ms", b"%d" % max(1, round(retry_after_s * 1000))),
    ]
