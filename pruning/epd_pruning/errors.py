"""The one error of this room, torch-free: a gateway can name a bad field without a model."""

from __future__ import annotations

__all__ = ["PruningError"]


class PruningError(ValueError):
    """A pruning setting or input that cannot work: `field` says which one, `allowed` what would."""

    def __init__(self, field: str, allowed: str, got: object) -> None:
        super().__init__(f"{field} must be {allowed}, got {got!r}")
        self.field = field
        self.allowed = allowed
