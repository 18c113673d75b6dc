"""The breaker's states, one by one, on a clock that only the test moves."""

from __future__ import annotations

import pytest

from epd.cache.breaker import Breaker, BreakerState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(threshold=3, open_for=2.0, clock=clock)


def test_three_errors_in_a_row_open(breaker: Breaker) -> None:
    breaker.error()
    breaker.error()
    assert breaker.admits()
    breaker.error()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admits()


def test_a_success_starts_the_count_again(breaker: Breaker) -> None:
    for _ in range(5):
        breaker.error()
        breaker.error()
        breaker.success()
    assert breaker.admits()


def test_one_timeout_opens(breaker: Breaker) -> None:
    breaker.timeout()
    assert breaker.state is BreakerState.OPEN


def test_one_probe_after_the_open_time(breaker: Breaker, clock: Clock) -> None:
    breaker.timeout()
    assert breaker.remaining() == 2.0
    clock.now += 1.9
    assert not breaker.probe()
    clock.now += 0.1
    assert breaker.remaining() == 0.0
    assert not breaker.admits()
    assert breaker.probe()
    assert not breaker.probe()
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.admits()


def test_a_good_probe_closes_with_a_clean_count(breaker: Breaker, clock: Clock) -> None:
    breaker.timeout()
    clock.now += 2
    assert breaker.probe()
    breaker.settle(True)
    breaker.error()
    breaker.error()
    assert breaker.admits()


def test_a_bad_probe_opens_for_the_full_time_again(breaker: Breaker, clock: Clock) -> None:
    breaker.timeout()
    clock.now += 2.5
    assert breaker.probe()
    breaker.settle(False)
    assert breaker.state is BreakerState.OPEN
    assert breaker.remaining() == 2.0


def test_stragglers_change_nothing_while_open_or_probing(breaker: Breaker, clock: Clock) -> None:
    breaker.timeout()
    clock.now += 1
    breaker.timeout()
    breaker.error()
    breaker.success()
    assert (breaker.state, breaker.remaining()) == (BreakerState.OPEN, 1.0)
    clock.now += 1
    assert breaker.probe()
    breaker.success()
    breaker.timeout()
    assert breaker.state is BreakerState.HALF_OPEN


def test_a_probe_result_without_a_probe_is_ignored(breaker: Breaker) -> None:
    breaker.settle(False)
    assert breaker.state is BreakerState.CLOSED
    breaker.timeout()
    breaker.settle(True)
    assert breaker.state is BreakerState.OPEN
