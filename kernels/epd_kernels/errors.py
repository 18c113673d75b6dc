"""The errors a caller of this room can cause."""

from __future__ import annotations

__all__ = ["FormatError"]


class FormatError(ValueError):
    """A weight, scale or KV layout that no format here can hold."""
