"""What an operator's wish is refused with: a stable code, and what, why and what to do next."""

from __future__ import annotations

from typing import ClassVar

from epd.errors import RoleError

__all__ = [
    "ImpossibleStagesError",
    "LastWorkerError",
    "OperatorError",
    "StaleEpochError",
    "SwitchUnderWayError",
    "UnknownSwitchError",
    "UnknownWorkerError",
    "UnsettledWorkerError",
]


class OperatorError(RoleError):
    """A refusal in three lines; nothing was changed."""

    def __init__(self, what: str, why: str, hint: str) -> None:
        super().__init__(f"{what}\n{why}\n{hint}")
        self.what = what
        self.why = why
        self.hint = hint


class UnknownWorkerError(OperatorError):
    """No live worker has that name."""

    code: ClassVar[str] = "unknown_worker"
    status: ClassVar[int] = 404


class UnknownSwitchError(OperatorError):
    """No switch of this gateway's life has that id."""

    code: ClassVar[str] = "unknown_switch"
    status: ClassVar[int] = 404


class ImpossibleStagesError(OperatorError):
    """Letters that are no stage set, or a limit that is none."""

    code: ClassVar[str] = "impossible_stages"
    status: ClassVar[int] = 400


class SwitchUnderWayError(OperatorError):
    """The worker is switching to another role already."""

    code: ClassVar[str] = "switch_under_way"


class StaleEpochError(OperatorError):
    """The caller looked at an older role of the worker."""

    code: ClassVar[str] = "stale_epoch"


class LastWorkerError(OperatorError):
    """A stage would have no worker left."""

    code: ClassVar[str] = "last_worker"


class UnsettledWorkerError(OperatorError):
    """The worker is fenced, or about to end."""

    code: ClassVar[str] = "worker_unsettled"
