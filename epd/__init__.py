"""Encode, prefill and decode serving of vision-language models: the engine.

`LLM` runs all three stages in one process. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epd.request import SamplingParams

if TYPE_CHECKING:
    from epd.engine import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from epd import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
