"""What is known of role switches: a record each, what a new one would do, what old ones cost."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

from epd.roles import StageSet, format_stages
from epd_services.gateway.refusals import OperatorError, UnknownSwitchError

__all__ = ["PHASES", "SwitchHistory", "SwitchPreview", "SwitchRecord", "SwitchState"]

PHASES = ("drain", "unload", "load", "commit", "total")
_KEPT = 1000


class SwitchState(StrEnum):
    """Where a switch stands; the last four are final, and `unchanged` means it was not needed."""

    DRAINING = "draining"
    SWITCHING = "switching"
    COMMITTING = "committing"
    DONE = "done"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    LOST = "lost"


_OPEN = (SwitchState.DRAINING, SwitchState.SWITCHING, SwitchState.COMMITTING)


@dataclass(slots=True, kw_only=True)
class SwitchRecord:
    """One switch. `old` and `new` are letters, `epoch` is the one it starts from.

    `phases` has seconds by name (`PHASES`), drain, unload and load on the worker's clock;
    `started_at` is seconds since 1970, `moved` counts the answers sent to a peer.
    """

    switch_id: str
    worker: str
    old: str
    new: str
    epoch: int
    reason: str
    drain_seconds: float
    started_at: float
    state: SwitchState = SwitchState.DRAINING
    phases: dict[str, float] = field(default_factory=dict)
    moved: int = 0
    resident_bytes: int | None = None
    error: str | None = None

    @property
    def final(self) -> bool:
        """Whether the switch is over."""
        return self.state not in _OPEN

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"state": self.state.value, "final": self.final}


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchPreview:
    """What a switch would do: refusals (none if it may start), what moves where, and its cost.

    `cost` has median seconds per phase of the `measured` switches between these stages so far;
    when there is none, of those that load and unload the same weights.
    """

    worker: str
    old: str
    new: str
    epoch: int
    refused: tuple[OperatorError, ...]
    moves: tuple[str, ...]
    cost: dict[str, float]
    measured: int

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "worker": self.worker,
            "old": self.old,
            "new": self.new,
            "epoch": self.epoch,
            "refused": [
                {"code": r.code, "what": r.what, "why": r.why, "next": r.hint} for r in self.refused
            ],
            "moves": list(self.moves),
            "cost": dict(self.cost),
            "measured": self.measured,
        }


class SwitchHistory:
    """The last switches of this gateway's life, oldest first."""

    def __init__(self) -> None:
        self._records: deque[SwitchRecord] = deque(maxlen=_KEPT)

    def add(self, record: SwitchRecord) -> None:
        """Note a switch."""
        self._records.append(record)

    def records(self) -> list[SwitchRecord]:
        """All of them."""
        return list(self._records)

    def get(self, switch_id: str) -> SwitchRecord:
        """The switch of that id. Raises `UnknownSwitchError`."""
        for record in self._records:
            if record.switch_id == switch_id:
                return record
        raise UnknownSwitchError(
            f"There is no switch {switch_id[:64]!r}.",
            "A gateway remembers its last switches until it ends.",
            "epd admin history",
        )

    def last(self, worker: str) -> SwitchRecord | None:
        """The last switch of a worker."""
        return next((r for r in reversed(self._records) if r.worker == worker), None)

    def cost(self, old: StageSet, new: StageSet) -> tuple[dict[str, float], int]:
        """Median seconds per phase of the switches like this one, and how many there were."""
        done = [r for r in self._records if r.state is SwitchState.DONE]
        pair = (format_stages(old), format_stages(new))
        alike = [r for r in done if (r.old, r.new) == pair]
        alike = alike or [r for r in done if _weights(r.old, r.new) == _weights(*pair)]
        names = [name for name in PHASES if any(name in r.phases for r in alike)]
        return {n: median(r.phases[n] for r in alike if n in r.phases) for n in names}, len(alike)


def _weights(old: str, new: str) -> tuple[bool, ...]:
    """Which weights come and go between two roles: the vision side's, the language model's."""
    return tuple(bool(side & set(letters)) for letters in (old, new) for side in ({"E"}, {*"PD"}))
