"""Errors as HTTP: one JSON envelope, fixed texts, nothing of the request in it."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from epd.errors import EPDError, InvalidRequestError

__all__ = [
    "BodyTooLargeError",
    "MediaTypeError",
    "NotFoundError",
    "UnauthorizedError",
    "envelope",
    "error_response",
    "http_status_response",
]

_MAX_TEXT = 300
# object addresses, paths and URLs have no place in an answer, whatever raised the error
_PRIVATE = re.compile(r"0x[0-9a-fA-F]{6,}|(?:^|[\s'\"(=:])/\w|[A-Za-z]:\\|\w+://|data:|[\r\n\0]")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_DEFAULTS = {
    400: "The request is invalid.",
    401: "A valid API key is required.",
    404: "No such route.",
    405: "This route does not take that method.",
    408: "The request's deadline passed.",
    409: "That cannot be done now.",
    413: "The request body is too large.",
    415: "The body must be application/json.",
    429: "The service is at capacity; try again later.",
    503: "The service cannot take this request now; try again later.",
}


class UnauthorizedError(InvalidRequestError):
    """No API key, or a wrong one."""

    code = "unauthorized"
    status = 401


class NotFoundError(InvalidRequestError):
    """A model that is not served here."""

    code = "model_not_found"
    status = 404


class BodyTooLargeError(InvalidRequestError):
    """A body above the limit."""

    code = "body_too_large"
    status = 413


class MediaTypeError(InvalidRequestError):
    """A body that is no JSON, or is compressed."""

    code = "unsupported_media_type"
    status = 415


def _status(error: EPDError) -> int:
    return error.status if error.status in _TYPES else 500


def _message(error: EPDError, status: int) -> str:
    text = str(error)
    if status == 500:
        return "Internal error."
    if not text or len(text) > _MAX_TEXT or _PRIVATE.search(text):
        return _DEFAULTS[status]
    return text


def envelope(error: EPDError, request_id: str) -> dict[str, Any]:
    """The JSON envelope of `error`; internal errors keep their text to themselves."""
    status = _status(error)
    return {
        "error": {
            "message": _message(error, status),
            "type": _TYPES.get(status, "internal_error"),
            "param": getattr(error, "param", None),
            "code": error.code if status != 500 else "internal_error",
            "request_id": request_id,
        }
    }


def error_response(error: EPDError, request_id: str) -> JSONResponse:
    """The envelope with its status, and Retry-After where waiting helps."""
    status = _status(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(getattr(error, "retry_after", 1.0))))
    if status == 408:
        # OpenAI's clients repeat a 408 by themselves; the same work would be late again
        headers["X-Should-Retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 413:
        headers["Connection"] = "close"
    return JSONResponse(envelope(error, request_id), status, headers)


def http_status_response(
    status: int, request_id: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The envelope of a bare HTTP status such as 404 or 405."""
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = {
        "message": _DEFAULTS.get(status, "Internal error."),
        "type": _TYPES.get(status, "internal_error"),
        "param": None,
        "code": code,
        "request_id": request_id,
    }
    return JSONResponse({"error": body}, status, headers)
