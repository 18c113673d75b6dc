"""The elastic controller: which workers to move, when it is worth it, and why. Pure.

Every decision compares the forecast of the present split with that of every other split, the
switch charged: while it lasts the moved workers serve nobody. Four things keep it steady: a
split must win by a margin, for some time, after a cool-down, and a move back waits twice as long
as the one before. The margin is a share of what requests usually take, not only of what they take
just now: saving half of very little is no reason to give up what a busier moment will need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from epd.roles import Stage, StageSet
from epd_services.elastic.forecast import Forecast, forecast
from epd_services.elastic.load import (
    Decision,
    Move,
    Snapshot,
    WorkerLoad,
    single_stage,
    split_name,
)

__all__ = ["Controller", "Policy"]

_WORDS = {Stage.ENCODE: "encode", Stage.PREFILL: "prefill", Stage.DECODE: "decode"}
_LONGEST_BACK_OFF = 16.0
_NEARLY = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How eager the controller is. Seconds; `margin` is the share of the time that must be saved.

    A forecast looks `horizon` ahead; what is usual fades with `memory`. A split must win for
    `confirm`. After a switch nothing moves for `cool_down`, and nothing moves back for twice as
    long; each such return doubles that again, up to sixteen times, until there was peace for ten
    cool-downs. A gain of less than `least_gain` is none.
    """

    horizon: float = 30.0
    margin: float = 0.25
    memory: float = 60.0
    least_gain: float = 0.25
    confirm: float = 1.5
    cool_down: float = 15.0


@dataclass(frozen=True, slots=True)
class _Plan:
    gives: dict[Stage, int]
    forecast: Forecast
    now: Forecast

    @property
    def gain(self) -> float:
        return self.now.total - self.forecast.total


class Controller:
    """The `Balancer` of `epd serve --elastic`."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self._winning_since: float | None = None
        self._winner: Stage | None = None
        self._quiet_until = 0.0
        self._moved_at: float | None = None
        self._received: dict[Stage, float] = {}
        self._back_off = 2.0
        self._usual = _Usual(self.policy.memory)
        self._workers = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        """Moves towards the split of the shortest forecast, or none; always with the reason."""
        if why := self._disturbed(snapshot):
            self._winning_since = None
            self._quiet_until = max(self._quiet_until, snapshot.at + self.policy.cool_down)
            return Decision((), f"stay: {why}")
        now = forecast(snapshot, snapshot.split, horizon=self.policy.horizon)
        self._usual.take(snapshot.at, now.total)
        plan = self._best(snapshot, now)
        if plan is None or not self._worth(plan):
            self._winning_since = None
            return Decision((), self._stay(plan))
        wait = self._wait(snapshot.at, plan)
        if wait > 0:
            return Decision((), f"stay: {wait:.1f} s of confirmation or cool-down left")
        return self._go(snapshot, plan)

    def _disturbed(self, snapshot: Snapshot) -> str | None:
        """Why this is no moment to judge: what is under way or lost may soon look different."""
        before, self._workers = self._workers, len(snapshot.workers)
        if self._workers < before:
            return "a worker is gone, and may come back"
        if any(not worker.serving for worker in snapshot.workers):
            return "a switch is under way"
        return None

    def _best(self, snapshot: Snapshot, now: Forecast) -> _Plan | None:
        """The fewest moves that are forecast nearly the best; None if nothing would be saved."""
        plans = (
            _Plan(gives, self._charged(snapshot, gives), now) for gives in _exchanges(snapshot)
        )
        better = [plan for plan in plans if plan.gain > 0]
        least = min((plan.forecast.total for plan in better), default=0.0)
        enough = [plan for plan in better if plan.forecast.total <= _NEARLY * least]
        return min(enough, key=lambda plan: (_moved(plan.gives), -plan.gain), default=None)

    def _charged(self, snapshot: Snapshot, gives: dict[Stage, int]) -> Forecast:
        horizon = self.policy.horizon
        share = min(1.0, snapshot.times.switch / horizon)
        split = snapshot.split
        during = {stage: split[stage] - max(0, gives[stage]) for stage in Stage}
        after = {stage: split[stage] - gives[stage] for stage in Stage}
        return forecast(snapshot, during, horizon=horizon).mixed(
            forecast(snapshot, after, horizon=horizon), share
        )

    def _worth(self, plan: _Plan) -> bool:
        return plan.gain > max(self.policy.least_gain, self.policy.margin * self._base(plan))

    def _base(self, plan: _Plan) -> float:
        return max(plan.now.total, self._usual.seconds)

    def _wait(self, at: float, plan: _Plan) -> float:
        """Seconds until a plan that goes on winning may be carried out."""
        receiver = min(plan.gives, key=lambda stage: plan.gives[stage])
        if self._winning_since is None or receiver is not self._winner:
            self._winning_since, self._winner = at, receiver
        until = max(self._winning_since + self.policy.confirm, self._quiet_until)
        if self._returns(at, plan):
            assert self._moved_at is not None
            until = max(until, self._moved_at + self._back_off * self.policy.cool_down)
        return until - at

    def _returns(self, at: float, plan: _Plan) -> bool:
        """Whether the plan takes workers out of a stage that was given some not long ago."""
        memory = 10 * self.policy.cool_down
        return any(
            count > 0 and at - self._received.get(stage, -memory) < memory
            for stage, count in plan.gives.items()
        )

    def _go(self, snapshot: Snapshot, plan: _Plan) -> Decision:
        moves = _choose(snapshot, plan.gives)
        returns = self._returns(snapshot.at, plan)
        self._back_off = min(2 * self._back_off, _LONGEST_BACK_OFF) if returns else 2.0
        self._moved_at = snapshot.at
        self._quiet_until = snapshot.at + self.policy.cool_down
        self._winning_since = None
        self._received |= {s: snapshot.at for s, count in plan.gives.items() if count < 0}
        return Decision(moves, _explain(snapshot, plan, moves))

    def _stay(self, plan: _Plan | None) -> str:
        if plan is None:
            return "stay: no split is forecast to be faster"
        share = plan.gain / self._base(plan)
        return f"stay: the best split saves {share:.0%}, less than {self.policy.margin:.0%}"


class _Usual:
    """A mean over time that fades with `memory` seconds."""

    def __init__(self, memory: float) -> None:
        self.seconds = 0.0
        self._memory = memory
        self._at: float | None = None

    def take(self, at: float, seconds: float) -> None:
        """Note what a request takes from now on."""
        past = math.exp(-(at - self._at) / self._memory) if self._at is not None else 0.0
        self.seconds = past * self.seconds + (1 - past) * seconds
        self._at = at


def _exchanges(snapshot: Snapshot) -> Iterator[dict[Stage, int]]:
    """What each stage gives, for every way to move workers that leaves one in each stage."""
    movable = dict.fromkeys(Stage, 0)
    for worker in snapshot.workers:
        if (stage := single_stage(worker)) is not None:
            movable[stage] += 1
    fixed = {stage: snapshot.split[stage] - movable[stage] for stage in Stage}
    total = sum(movable.values())
    for encode in range(total + 1):
        for prefill in range(total + 1 - encode):
            after = dict(zip(Stage, (encode, prefill, total - encode - prefill), strict=True))
            gives = {stage: movable[stage] - after[stage] for stage in Stage}
            if any(gives.values()) and all(after[s] + fixed[s] > 0 for s in Stage):
                yield gives


def _moved(gives: dict[Stage, int]) -> int:
    return sum(max(0, count) for count in gives.values())


def _choose(snapshot: Snapshot, gives: dict[Stage, int]) -> tuple[Move, ...]:
    """The least busy workers of the stages that give, and which stage each goes to."""
    leaving: list[WorkerLoad] = []
    for stage, count in gives.items():
        members = [w for w in snapshot.workers if single_stage(w) is stage]
        members.sort(key=lambda w: (w.load, w.worker_id))
        leaving += members[: max(0, count)]
    targets = [stage for stage, count in gives.items() for _ in range(max(0, -count))]
    return tuple(
        Move(worker.worker_id, frozenset((stage,)))
        for worker, stage in zip(leaving, targets, strict=True)
    )


def _explain(snapshot: Snapshot, plan: _Plan, moves: tuple[Move, ...]) -> str:
    stage = plan.now.bottleneck
    target: dict[str, StageSet] = {move.worker_id: move.stages for move in moves}
    after = [target.get(w.worker_id, w.stages) for w in snapshot.workers]
    backlog, rates = snapshot.backlog, snapshot.rates
    names = ", ".join(move.worker_id for move in moves)
    share = f"{plan.now.stage(stage):.1f} s of {plan.now.total:.1f} s a request"
    if not snapshot.split[stage]:
        share = "it has no worker"
    return (
        f"{_WORDS[stage]} is the bottleneck ({share}; {backlog.images} images, "
        f"{backlog.prompts} prompts, {backlog.decoding} decodes, "
        f"{backlog.tokens:.0f} tokens to go, {rates.requests:.1f} requests/s): "
        f"{split_name(after)} is forecast at {plan.forecast.total:.1f} s, a switch of "
        f"{snapshot.times.switch:.1f} s charged; moving {names}"
    )
