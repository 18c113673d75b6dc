"""The one exception hierarchy.

`code` is stable and public, `status` is the HTTP status the gateway answers with.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "EPDError",
    "InvalidRequestError",
    "MediaError",
    "RoleError",
    "UnavailableError",
    "WireError",
    "WorkerFailedError",
    "error_from_code",
]


class EPDError(Exception):
    """Base of every error a user or a peer can cause."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500


class ConfigError(EPDError):
    """A setting, flag, topology or environment that cannot work."""

    code = "config_error"


class CheckpointError(EPDError):
    """A model that cannot be found, read or served."""

    code = "checkpoint_error"


class InvalidRequestError(EPDError):
    """A request whose fields are malformed or out of range; `param` names the field."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MediaError(InvalidRequestError):
    """An image that cannot be fetched, decoded or accepted."""

    code = "invalid_media"


class DeadlineError(EPDError):
    """The request's deadline passed."""

    code = "deadline_exceeded"
    status = 408


class CapacityError(EPDError):
    """A bounded queue is full; try again after `retry_after` seconds."""

    code = "queue_full"
    status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(EPDError):
    """No live worker hosts a stage the request needs, or the service is draining."""

    code = "unavailable"
    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerFailedError(EPDError):
    """Every attempt at the request died with its worker."""

    code = "worker_failed"
    status = 503
    retry_after = 1.0


class RoleError(EPDError):
    """An impossible stage set, or a message for a stage or epoch the worker does not hold."""

    code = "role_error"
    status = 409


class WireError(EPDError):
    """A frame that is malformed, oversized, replayed or not authentic. Never names its content."""

    code = "wire_error"


_BY_CODE = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        MediaError,
        DeadlineError,
        CapacityError,
        UnavailableError,
        WorkerFailedError,
        RoleError,
    )
}


def error_from_code(code: str, message: str, param: str | None = None) -> EPDError:
    """The typed error a worker reported by `code`; an unknown code is a plain `EPDError`."""
    cls = _BY_CODE.get(code, EPDError)
    error = cls(message)
    if isinstance(error, InvalidRequestError):
        error.param = param
    return error
