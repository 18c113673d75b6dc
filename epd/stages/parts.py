"""What stages are built from, and how a worker comes by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from epd.core import EngineCore
from epd.roles import StageSet
from epd.vision_pool import ImageEncoder, TokenSelector

__all__ = ["StageLoader", "StageParts"]


@dataclass(frozen=True, slots=True)
class StageParts:
    """The encoder for E, the core for P and D, the selector for P; None where not loaded."""

    encoder: ImageEncoder | None = None
    core: EngineCore | None = None
    selector: TokenSelector | None = None


class StageLoader(Protocol):
    """Owns the parts of one worker. `unload` and `load` may run outside the event loop."""

    @property
    def parts(self) -> StageParts:
        """What is loaded now."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that are loaded now."""

    def check(self, stages: StageSet) -> None:
        """Raise `RoleError` if this worker can never host `stages`."""

    def unload(self, stages: StageSet) -> None:
        """Drop what `stages` do not need; nobody else holds it any more."""

    def load(self, stages: StageSet) -> None:
        """Load what `stages` need and is not there; nothing else is touched."""
