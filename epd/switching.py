"""The state of a role switch on its worker, as a pure machine: orders and events in, decisions out.

SERVING → DRAINING → UNLOADING → LOADING → READY → COMMITTING → SERVING in the new role under the
next epoch; or from any of them RETURNING → SERVING in the old role under the old epoch. Stages and
epoch change in `publish` alone, and together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from epd.errors import RoleError
from epd.roles import StageSet, format_stages

__all__ = ["AbandonedError", "RoleSwitch", "SwitchOrder", "SwitchState"]


class SwitchState(Enum):
    """Where a switch stands; the value is what the phase is called in reports."""

    SERVING = "serving"
    DRAINING = "drain"
    UNLOADING = "unload"
    LOADING = "load"
    READY = "ready"
    COMMITTING = "commit"
    RETURNING = "return"


_NEXT = {
    SwitchState.DRAINING: SwitchState.UNLOADING,
    SwitchState.UNLOADING: SwitchState.LOADING,
    SwitchState.LOADING: SwitchState.READY,
}
_ABANDONABLE = (*_NEXT, SwitchState.READY)


class AbandonedError(RoleError):
    """The switch was called off; the worker is to take up its old role again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchOrder:
    """What a worker was told: from `old`, held under `epoch`, to `new`. Times on its clock."""

    switch_id: str
    old: StageSet
    new: StageSet
    epoch: int
    drain_until: float

    @property
    def ending(self) -> StageSet:
        """The stages that the worker gives up."""
        return self.old - self.new


class RoleSwitch:
    """The role of a worker and the switch under way, if any. `clock` is in seconds.

    A worker that is ready waits `commit_seconds` for the commit.
    """

    def __init__(
        self,
        stages: StageSet,
        epoch: int = 0,
        *,
        clock: Callable[[], float],
        commit_seconds: float = 10.0,
    ) -> None:
        self.stages = stages
        self.epoch = epoch
        self.state = SwitchState.SERVING
        self.order: SwitchOrder | None = None
        self._clock = clock
        self._commit_seconds = commit_seconds
        self._since = clock()
        self._called_off: str | None = None
        self._last_id: str | None = None

    @property
    def switch_id(self) -> str | None:
        """The switch under way; None from the moment the worker serves again."""
        return self.order.switch_id if self.order else None

    def begin(
        self, switch_id: str, stages: StageSet, *, epoch: int, drain_seconds: float
    ) -> SwitchOrder | None:
        """The order taken up, DRAINING from now on; None when the order was heard before.

        Raises `RoleError`, with nothing changed, while another switch is under way, from another
        epoch than this worker's, or to the stages that it has.
        """
        if switch_id in (self.switch_id, self._last_id):
            return None
        if self.order is not None:
            raise RoleError("another switch is under way")
        if epoch != self.epoch:
            raise RoleError(f"the worker is in epoch {self.epoch}, not {epoch}")
        if not stages or stages == self.stages:
            raise RoleError(f"the worker hosts {format_stages(self.stages)} already")
        self.order = SwitchOrder(
            switch_id=switch_id, old=self.stages, new=stages, epoch=epoch,
            drain_until=self._clock() + drain_seconds,
        )  # fmt: skip
        self._last_id = switch_id
        self._enter(SwitchState.DRAINING)
        return self.order

    def advance(self) -> tuple[str, float]:
        """The phase that ends now and its seconds; the next one begins.

        Raises `AbandonedError` if the switch was called off.
        """
        self.check()
        phase, seconds = self.state.value, max(0.0, self._clock() - self._since)
        self._enter(_NEXT[self.state])
        return phase, seconds

    def check(self) -> None:
        """Raise `AbandonedError` if the switch was called off."""
        if self._called_off is not None:
            raise AbandonedError(self._called_off)

    @property
    def commit_left(self) -> float:
        """Seconds that a ready worker goes on waiting for its commit."""
        return max(0.0, self._since + self._commit_seconds - self._clock())

    def commit(self, switch_id: str) -> bool:
        """Whether the commit counts: of this switch, ready, in time and not called off."""
        current = self.state is SwitchState.READY and switch_id == self.switch_id
        if not current or self._called_off is not None or self.commit_left <= 0.0:
            return False
        self._enter(SwitchState.COMMITTING)
        return True

    def publish(self) -> tuple[StageSet, int]:
        """The new role and epoch of a committed switch, which count from now on."""
        assert self.state is SwitchState.COMMITTING and self.order is not None
        self.stages, self.epoch = self.order.new, self.epoch + 1
        self._serve()
        return self.stages, self.epoch

    def abandon(self, why: str, switch_id: str | None = None) -> bool:
        """Whether the switch (of that id, if one is named) was called off by this."""
        if switch_id is not None and switch_id != self.switch_id:
            return False
        if self.state not in _ABANDONABLE or self._called_off is not None:
            return False
        self._called_off = why
        return True

    def turn_back(self) -> str:
        """The phase in which the switch failed; the worker is RETURNING to its old role."""
        assert self.order is not None and self.state is not SwitchState.RETURNING
        phase: str = self.state.value
        self._enter(SwitchState.RETURNING)
        return phase

    def returned(self) -> None:
        """The old role counts again, under the epoch it had."""
        assert self.state is SwitchState.RETURNING
        self._serve()

    def _serve(self) -> None:
        self.order = self._called_off = None
        self._enter(SwitchState.SERVING)

    def _enter(self, state: SwitchState) -> None:
        self.state, self._since = state, self._clock()
