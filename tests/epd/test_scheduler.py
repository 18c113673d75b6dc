"""The scheduler against a fake runner: order, budgets, prefixes, preemption, adoption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from epd.errors import InvalidRequestError
from epd.request import SamplingParams
from epd.scheduler import Plan
from epd.sequence import Sequence, SequenceState


def chunks(plan: Plan) -> list[tuple[str, int, bool]]:
    return [(c.sequence.request_id, c.length, c.samples) for c in plan.chunks]


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget(
    scheduler_bench: Callable[..., Any],
):
    bench = scheduler_bench(max_batched_tokens=8, num_blocks=32)
    bench.add("a", 5)
    bench.add("b", 12)
    assert chunks(bench.step()) == [("a", 5, True), ("b", 3, False)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 7, False)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 2, True)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 1, True)]


def test_a_last_chunk_of_one_token_samples_like_any_other(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_batched_tokens=4)
    bench.add("a", 9)
    assert [chunks(bench.step()) for _ in range(3)] == [
        [("a", 4, False)], [("a", 4, False)], [("a", 1, True)],
    ]  # fmt: skip


def test_without_chunking_a_prompt_runs_whole_or_waits(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_batched_tokens=8, chunked_prefill=False, num_blocks=32)
    bench.add("a", 5)
    bench.add("b", 7)
    assert chunks(bench.step()) == [("a", 5, True)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 7, True)]


def test_without_chunking_the_context_is_one_step(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_batched_tokens=8, chunked_prefill=False, num_blocks=32)
    assert bench.scheduler.max_model_len == 8
    with pytest.raises(InvalidRequestError, match="at most 7 fit"):
        bench.add("a", 8)


def test_a_prompt_that_can_never_fit_is_refused(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=3)
    with pytest.raises(InvalidRequestError):
        bench.add("a", 12)
    bench.add("b", 11)
    bench.drain()
    assert bench.blocks.num_free == 3


def test_a_sequence_stops_at_the_context_end_with_every_block_in_use(
    scheduler_bench: Callable[..., Any],
):
    bench = scheduler_bench(num_blocks=3)
    sequence = bench.add("a", 5, max_tokens=100)
    bench.drain()
    assert len(sequence.tokens) == 12
    assert bench.scheduler.preemptions == 0


def test_the_same_id_twice_is_refused(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench()
    bench.add("a", 5)
    with pytest.raises(InvalidRequestError, match="in use"):
        bench.add("a", 5)


def test_the_head_of_the_queue_is_not_overtaken(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=4)
    bench.add("a", 8, max_tokens=3)
    bench.add("large", 11, max_tokens=2)
    bench.add("small", 1, max_tokens=2)
    bench.drain()
    assert bench.started == ["a", "large", "small"]


def test_at_most_max_num_seqs_run(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, 2, max_tokens=3)
    bench.step()
    assert [s.request_id for s in bench.scheduler.running] == ["a", "b"]
    bench.drain()


def test_a_prefix_of_a_running_sequence_is_not_computed_again(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_batched_tokens=64, num_blocks=32)
    bench.add("a", list(range(10)))
    bench.step()
    bench.add("b", [*range(8), 77])
    assert chunks(bench.step()) == [("a", 1, True), ("b", 1, True)]
    assert (bench.scheduler.prefix_hits, bench.scheduler.prefix_queries) == (8, 19)


def test_a_wholly_cached_prompt_still_computes_a_block(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=32)
    bench.add("a", list(range(8)), max_tokens=1)
    bench.step()
    again = bench.add("b", list(range(8)), max_tokens=1)
    assert chunks(bench.step()) == [("b", 4, True)]
    assert again.num_cached == 4


def test_the_output_of_a_finished_turn_is_a_prefix_of_the_next(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=32, max_batched_tokens=64)
    first = bench.add("a", list(range(6)), max_tokens=7)
    bench.drain()
    assert len(first.tokens) == 13
    second = bench.add("b", [*first.tokens, 1, 2], max_tokens=1)
    bench.step()
    assert second.num_cached == 12


def test_another_tenant_shares_nothing(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=32)
    bench.add("a", list(range(9)), max_tokens=1)
    bench.step()
    sequence = Sequence(
        request_id="b", attempt=0, tokens=list(range(9)), num_prompt=9,
        sampling=SamplingParams(max_tokens=1), salt="other",
    )  # fmt: skip
    bench.scheduler.add(sequence)
    assert chunks(bench.step()) == [("b", 9, True)]


def test_the_latest_arrival_is_preempted_and_recomputed_from_its_own_prefix(
    scheduler_bench: Callable[..., Any],
):
    bench = scheduler_bench(num_blocks=6, max_batched_tokens=64)
    bench.add("a", 8, max_tokens=12)
    late = bench.add("b", 7, max_tokens=12)
    while not bench.scheduler.preemptions:
        bench.step()
    assert late.state is SequenceState.WAITING
    assert (late.num_computed, late.next_pos, late.table) == (0, 0, None)
    produced = late.num_output
    assert produced > 0
    bench.drain()
    assert late.num_output == 12
    assert late.tokens[7:] == [5000 + i for i in range(7, 19)]
    assert bench.blocks.num_free == 6


def test_an_adopted_victim_is_evicted(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=6, max_batched_tokens=64)
    bench.add("a", 8, max_tokens=12)
    bench.step()
    adopted = bench.adopt("b", 8, max_tokens=12)
    assert adopted is not None
    bench.scheduler.resume(adopted)
    evicted: list[Sequence] = []
    while not evicted:
        evicted = bench.step().evicted
    assert evicted == [adopted]
    assert adopted.state is SequenceState.FINISHED
    bench.drain()
    assert bench.blocks.num_free == 6


def test_held_blocks_are_kept_until_removed(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=4)
    held = bench.add("a", 8, handoff=True)
    bench.step()
    assert held.state is SequenceState.HELD
    assert held.table is not None
    assert held.table.lengths == [8]
    bench.add("b", 11)
    assert chunks(bench.step()) == []
    bench.scheduler.remove(held)
    assert chunks(bench.step()) == [("b", 11, True)]


def test_expired_waiting_work_never_starts(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(max_num_seqs=1)
    bench.add("a", 4, max_tokens=3)
    late = bench.add("b", 4, deadline=5.0)
    bench.step()
    bench.clock.now = 5.0
    plan = bench.step()
    assert plan.expired == [late]
    assert late.state is SequenceState.FINISHED
    bench.drain()
    assert bench.started == ["a"]


def test_a_reservation_whose_deadline_passes_is_given_back(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench()
    adopted = bench.adopt("a", 9)
    assert adopted is not None
    adopted.deadline = 1.0
    bench.clock.now = 2.0
    assert bench.step().expired == [adopted]
    assert bench.blocks.num_free == 16


def test_a_running_sequence_is_not_ended_by_its_deadline(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench()
    running = bench.add("a", 4, deadline=1.0)
    bench.step()
    bench.clock.now = 2.0
    assert bench.step().expired == []
    assert running.state is SequenceState.RUNNING


def test_adoption_waits_for_room_and_for_those_before_it(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=8)
    bench.add("a", 20, max_tokens=5)
    bench.step()
    bench.step()
    bench.add("b", 9, max_tokens=5)
    assert bench.adopt("c", 5) is None  # b came first
    bench.scheduler.remove(bench.scheduler.sequences["a"])
    bench.step()
    assert bench.started == ["a", "b"]
    assert bench.adopt("c", 5) is not None


def test_an_adoption_that_keeps_asking_is_not_overtaken_forever(
    scheduler_bench: Callable[..., Any],
):
    bench = scheduler_bench(num_blocks=8, max_num_seqs=2)
    bench.add("first", 8, max_tokens=6)
    bench.add("second", 8, max_tokens=6)
    bench.step()
    assert bench.adopt("moved", 5) is None
    for turn in range(8):
        bench.add(f"later{turn}", 4, max_tokens=8)
    for _ in range(20):
        if bench.adopt("moved", 5) is not None:
            break
        bench.step()
    assert bench.started == ["first", "second"]
    bench.scheduler.resume(bench.scheduler.sequences["moved"])
    bench.drain()


def test_a_large_adoption_is_not_starved_by_small_arrivals(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=8, max_num_seqs=8)
    bench.add("first", 8, max_tokens=8)
    bench.add("second", 8, max_tokens=3)
    bench.step()
    assert bench.adopt("moved", 21) is None
    bench.add("small", 1, max_tokens=20)
    bench.step()
    assert bench.started == ["first", "second"]  # small would fit, but moved came before it
    for _ in range(10):
        if bench.adopt("moved", 21) is not None:
            break
        bench.step()
    assert bench.started == ["first", "second"]
    bench.scheduler.resume(bench.scheduler.sequences["moved"])
    bench.step()
    assert bench.started == ["first", "second", "small"]


def test_admission_leaves_a_block_for_each_who_runs(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=6, max_batched_tokens=64)
    bench.add("a", 8, max_tokens=2)
    bench.add("b", 16, max_tokens=2)
    assert chunks(bench.step()) == [("a", 8, True)]
    assert chunks(bench.step()) == [("a", 1, True)]
    assert chunks(bench.step()) == [("b", 16, True)]
    assert bench.scheduler.preemptions == 0


def test_an_adoption_that_gave_up_blocks_nobody(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=8, max_num_seqs=1)
    bench.add("first", 8, max_tokens=3)
    bench.step()
    assert bench.adopt("moved", 5) is None
    bench.add("later", 4, max_tokens=3)
    bench.drain()
    assert bench.started == ["first", "later"]


def test_adoption_longer_than_the_pool_is_refused(scheduler_bench: Callable[..., Any]):
    bench = scheduler_bench(num_blocks=2)
    with pytest.raises(InvalidRequestError, match="longer than"):
        bench.adopt("a", 8)
