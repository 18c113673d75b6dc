"""Records: tokens reach the client in order, once, whatever order workers' messages came in."""

import itertools
import random

import pytest

from epd.request import FinishReason, Request, RequestTimeline, TokenOutput
from epd_services.gateway.ledger import Record


def record() -> Record:
    request = Request(request_id="r", prompt_token_ids=[1])
    return Record(request, [], 60.0, RequestTimeline(lambda: 0.0))


def seen(record: Record) -> list[int]:
    events = []
    while not record.events.empty():
        event = record.events.get_nowait()
        events += [token.index for token in event.tokens]  # type: ignore[union-attr]
    return events


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_token_that_overtakes_another_waits_for_it(order: tuple[int, ...]) -> None:
    ledger = record()
    done = [
        ledger.take(TokenOutput(i, 10 + i), FinishReason.LENGTH if i == 3 else None) for i in order
    ]
    assert seen(ledger) == [0, 1, 2, 3]
    assert [output.token_id for output in ledger.outputs] == [10, 11, 12, 13]
    assert done == [False, False, False, True]
    assert ledger.early == {}


def test_the_end_is_not_told_before_every_token_is_there() -> None:
    ledger = record()
    assert not ledger.take(TokenOutput(1, 11), FinishReason.STOP)
    assert seen(ledger) == []
    assert ledger.take(TokenOutput(0, 10), None)
    assert seen(ledger) == [0, 1]


def test_a_long_answer_in_random_order_comes_out_whole() -> None:
    ledger, order = record(), list(range(500))
    random.Random(3).shuffle(order)
    for index in order:
        ledger.take(TokenOutput(index, index), None)
    assert seen(ledger) == list(range(500))
