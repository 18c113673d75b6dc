"""The switch machine: whatever happens in whatever order, one role per epoch and always a way
home.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epd.errors import RoleError
from epd.roles import StageSet, format_stages, parse_stages
from epd.switching import AbandonedError, RoleSwitch, SwitchState

SETS = ["E", "P", "D", "EP", "ED", "PD", "EPD"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ready(clock: Clock, new: str = "D") -> RoleSwitch:
    """A worker that went from PD to the end of loading."""
    switch = RoleSwitch(parse_stages("PD"), 4, clock=clock)
    assert switch.begin("a", parse_stages(new), epoch=4, drain_seconds=1.0)
    for _ in range(3):
        switch.advance()
    assert switch.state is SwitchState.READY
    return switch


def test_a_switch_takes_its_phases_in_order_and_times_them() -> None:
    clock = Clock()
    switch = RoleSwitch(parse_stages("PD"), 4, clock=clock)
    order = switch.begin("a", parse_stages("ED"), epoch=4, drain_seconds=2.5)
    assert order is not None
    assert (order.drain_until, format_stages(order.ending)) == (102.5, "P")
    seen = []
    for seconds in (0.5, 0.25, 1.0):
        clock.now += seconds
        seen.append(switch.advance())
    assert seen == [("drain", 0.5), ("unload", 0.25), ("load", 1.0)]
    assert (switch.stages, switch.epoch) == (parse_stages("PD"), 4)
    assert switch.commit("a")
    assert switch.publish() == (parse_stages("ED"), 5)
    assert (switch.state, switch.switch_id) == (SwitchState.SERVING, None)


@pytest.mark.parametrize(
    ("switch_id", "stages", "epoch", "said"),
    [("b", "D", 3, "epoch 4"), ("b", "D", 5, "epoch 4"), ("b", "PD", 4, "hosts PD")],
)
def test_an_impossible_order_is_refused_and_changes_nothing(
    switch_id: str, stages: str, epoch: int, said: str
) -> None:
    switch = RoleSwitch(parse_stages("PD"), 4, clock=Clock())
    with pytest.raises(RoleError, match=said):
        switch.begin(switch_id, parse_stages(stages), epoch=epoch, drain_seconds=1.0)
    assert (switch.state, switch.order) == (SwitchState.SERVING, None)
    assert switch.begin(switch_id, parse_stages("D"), epoch=4, drain_seconds=1.0)


def test_a_second_order_is_refused_and_a_repeated_one_ignored() -> None:
    switch = ready(Clock())
    with pytest.raises(RoleError, match="under way"):
        switch.begin("b", parse_stages("E"), epoch=4, drain_seconds=1.0)
    assert switch.begin("a", parse_stages("D"), epoch=4, drain_seconds=1.0) is None
    assert switch.commit("a")
    switch.publish()
    assert switch.begin("a", parse_stages("PD"), epoch=5, drain_seconds=1.0) is None


def test_a_commit_after_the_limit_or_an_abort_has_no_effect() -> None:
    clock = Clock()
    late = ready(clock)
    clock.now += 10.0
    assert not late.commit("a")
    stopped = ready(clock)
    assert stopped.abandon("told to", "a")
    assert not stopped.commit("a")
    with pytest.raises(AbandonedError, match="told to"):
        stopped.check()
    assert stopped.turn_back() == "ready"
    stopped.returned()
    assert (stopped.stages, stopped.epoch) == (parse_stages("PD"), 4)


def test_an_abort_after_the_commit_has_no_effect() -> None:
    switch = ready(Clock())
    assert switch.commit("a")
    assert not switch.abandon("too late", "a")
    switch.check()
    assert switch.publish() == (parse_stages("D"), 5)


class AnyOrder(RuleBasedStateMachine):
    """Orders, commits, aborts and accidents in any order against one worker."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.switch = RoleSwitch(parse_stages("PD"), clock=self.clock)
        self.roles: dict[int, StageSet] = {0: parse_stages("PD")}
        self.ids = 0

    @property
    def under_way(self) -> bool:
        return self.switch.order is not None

    @rule(stages=st.sampled_from(SETS), behind=st.integers(-1, 1), drain=st.floats(0, 5))
    def order(self, stages: str, behind: int, drain: float) -> None:
        wanted, before = parse_stages(stages), self.switch.order
        self.ids += 1
        right = behind == 0 and wanted != self.switch.stages and before is None
        try:
            order = self.switch.begin(
                str(self.ids), wanted, epoch=self.switch.epoch + behind, drain_seconds=drain
            )
        except RoleError:
            assert not right and self.switch.order is before
        else:
            assert right and order is self.switch.order

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.switch.state.value in ("drain", "unload", "load"))
    @rule()
    def phase_ends(self) -> None:
        before = self.switch.state
        try:
            phase, seconds = self.switch.advance()
        except AbandonedError:
            assert self.switch.state is before
        else:
            assert phase == before.value and seconds >= 0

    @rule(offset=st.integers(-1, 0))
    def commit(self, offset: int) -> None:
        switch, named = self.switch, str(self.ids + offset)
        could = switch.state is SwitchState.READY and named == switch.switch_id
        assert not switch.commit(named) or could

    @rule(offset=st.integers(-1, 0))
    def abort(self, offset: int) -> None:
        named, before = str(self.ids + offset), self.switch.state
        if self.switch.abandon("told to", named):
            assert named == self.switch.switch_id
            assert before not in (SwitchState.SERVING, SwitchState.COMMITTING)
        assert self.switch.state is before

    @precondition(lambda self: self.switch.state is SwitchState.COMMITTING)
    @rule()
    def publish(self) -> None:
        stages, epoch = self.switch.publish()
        assert epoch not in self.roles
        self.roles[epoch] = stages

    @precondition(lambda self: self.under_way and self.switch.state is not SwitchState.RETURNING)
    @rule()
    def accident(self) -> None:
        self.switch.turn_back()

    @precondition(lambda self: self.switch.state is SwitchState.RETURNING)
    @rule()
    def home_again(self) -> None:
        self.switch.returned()

    @invariant()
    def one_role_an_epoch(self) -> None:
        assert self.roles[self.switch.epoch] == self.switch.stages
        assert sorted(self.roles) == list(range(self.switch.epoch + 1))

    @invariant()
    def a_switch_is_under_way_unless_serving(self) -> None:
        assert self.under_way == (self.switch.state is not SwitchState.SERVING)


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
