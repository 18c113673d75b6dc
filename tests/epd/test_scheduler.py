"""The scheduler against a fake runner: order, budgets, preemption, and random lives."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.config import EngineConfig
from epd.errors import InvalidRequestError
from epd.kv.blocks import BlockManager
from epd.request import SamplingParams
from epd.scheduler import Plan, Scheduler
from epd.sequence import Sequence, SequenceState


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A scheduler with a runner that invents tokens and remembers what it was asked for."""

    num_blocks: int = 16
    num_groups: int = 1
    block_size: int = 4
    max_batched_tokens: int = 16
    max_num_seqs: int = 4
    chunked_prefill: bool = True
    prefix_cache: bool = True
    clock: Clock = field(default_factory=Clock)
    started: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = EngineConfig(
            block_size=self.block_size, max_batched_tokens=self.max_batched_tokens,
            max_num_seqs=self.max_num_seqs, chunked_prefill=self.chunked_prefill,
        )  # fmt: skip
        self.blocks = BlockManager(
            self.num_blocks, self.block_size, num_groups=self.num_groups,
            prefix_cache=self.prefix_cache,
        )  # fmt: skip
        self.scheduler = Scheduler(config, self.blocks, max_model_len=1000, clock=self.clock)

    def add(
        self, name: str, tokens: list[int] | int, *, max_tokens: int = 4,
        deadline: float | None = None, handoff: bool = False,
    ) -> Sequence:  # fmt: skip
        if isinstance(tokens, int):
            tokens = [hash(name) % 1000 + i for i in range(tokens)]
        sequence = Sequence(
            request_id=name, attempt=0, tokens=list(tokens), num_prompt=len(tokens),
            sampling=SamplingParams(max_tokens=max_tokens), deadline=deadline, handoff=handoff,
        )  # fmt: skip
        self.scheduler.add(sequence)
        return sequence

    def adopt(self, name: str, num_tokens: int, *, max_tokens: int = 4) -> Sequence | None:
        sequence = Sequence(
            request_id=name, attempt=0, tokens=list(range(num_tokens)), num_prompt=num_tokens - 1,
            sampling=SamplingParams(max_tokens=max_tokens), adopted=True, prefilled=True,
            num_computed=num_tokens - 1, next_pos=num_tokens - 1,
        )  # fmt: skip
        lengths = [num_tokens - 1] * self.num_groups
        return sequence if self.scheduler.adopt(sequence, lengths) else None

    def step(self) -> Plan:
        """Schedule and run one step; end what is done. Checks every promise on the way."""
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.max_batched_tokens
        assert len({chunk.sequence.request_id for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            sequence, table = chunk.sequence, chunk.sequence.table
            assert sequence.state is SequenceState.RUNNING
            assert table is not None
            for blocks, length in zip(table.blocks, table.lengths, strict=True):
                assert len(blocks) * self.block_size >= length + chunk.length
            if sequence.request_id not in self.started and not sequence.adopted:
                self.started.append(sequence.request_id)
        for chunk in plan.chunks:
            self.scheduler.advance(chunk)
            if chunk.samples:
                self._sampled(chunk.sequence)
        self.check()
        return plan

    def _sampled(self, sequence: Sequence) -> None:
        sequence.tokens.append(5000 + len(sequence.tokens))
        full = len(sequence.tokens) >= self.scheduler.max_model_len
        if full or sequence.num_output >= sequence.sampling.max_tokens:
            self.scheduler.remove(sequence)
        elif sequence.handoff:
            self.scheduler.hold(sequence)

    def check(self) -> None:
        tables = [s.table for s in self.scheduler.sequences.values() if s.table is not None]
        self.blocks.check(tables)
        running = self.scheduler.running
        reserved = [
            s for s in self.scheduler.sequences.values() if s.state is SequenceState.RESERVED
        ]
        assert len(running) + len(reserved) <= self.max_num_seqs
        for queue in (running, self.scheduler.waiting):
            assert [s.arrival for s in queue] == sorted(s.arrival for s in queue)

    def drain(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            self.step()
        raise AssertionError("the queue does not empty")


def chunks(plan: Plan) -> list[tuple[str, int, bool]]:
    return [(c.sequence.request_id, c.length, c.samples) for c in plan.chunks]


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget():
    bench = Bench(max_batched_tokens=8, num_blocks=32)
    bench.add("a", 5)
    bench.add("b", 12)
    assert chunks(bench.step()) == [("a", 5, True), ("b", 3, False)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 7, False)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 2, True)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 1, True)]


def test_a_last_chunk_of_one_token_samples_like_any_other():
    bench = Bench(max_batched_tokens=4)
    bench.add("a", 9)
    assert [chunks(bench.step()) for _ in range(3)] == [
        [("a", 4, False)], [("a", 4, False)], [("a", 1, True)],
    ]  # fmt: skip


def test_without_chunking_a_prompt_runs_whole_or_waits():
    bench = Bench(max_batched_tokens=8, chunked_prefill=False, num_blocks=32)
    bench.add("a", 5)
    bench.add("b", 7)
    assert chunks(bench.step()) == [("a", 5, True)]
    assert chunks(bench.step()) == [("a", 1, True), ("b", 7, True)]


def test_without_chunking_the_context_is_one_step():
    bench = Bench(max_batched_tokens=8, chunked_prefill=False, num_blocks=32)
    assert bench.scheduler.max_model_len == 8
    with pytest.raises(InvalidRequestError, match="at most 7 fit"):
        bench.add("a", 8)


def test_a_prompt_that_can_never_fit_is_refused():
    bench = Bench(num_blocks=3)
    with pytest.raises(InvalidRequestError):
        bench.add("a", 12)
    bench.add("b", 11)
    bench.drain()
    assert bench.blocks.num_free == 3


def test_a_sequence_stops_at_the_context_end_with_every_block_in_use():
    bench = Bench(num_blocks=3)
    sequence = bench.add("a", 5, max_tokens=100)
    bench.drain()
    assert len(sequence.tokens) == 12
    assert bench.scheduler.preemptions == 0


def test_the_same_id_twice_is_refused():
    bench = Bench()
    bench.add("a", 5)
    with pytest.raises(InvalidRequestError, match="in use"):
        bench.add("a", 5)


def test_the_head_of_the_queue_is_not_overtaken():
    bench = Bench(num_blocks=4)
    bench.add("a", 8, max_tokens=3)
    bench.add("large", 11, max_tokens=2)
    bench.add("small", 1, max_tokens=2)
    bench.drain()
    assert bench.started == ["a", "large", "small"]


def test_at_most_max_num_seqs_run():
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, 2, max_tokens=3)
    bench.step()
    assert [s.request_id for s in bench.scheduler.running] == ["a", "b"]
    bench.drain()


def test_a_prefix_of_a_running_sequence_is_not_computed_again():
    bench = Bench(max_batched_tokens=64, num_blocks=32)
    bench.add("a", list(range(10)))
    bench.step()
    bench.add("b", [*range(8), 77])
    assert chunks(bench.step()) == [("a", 1, True), ("b", 1, True)]
    assert (bench.scheduler.prefix_hits, bench.scheduler.prefix_queries) == (8, 19)


def test_a_wholly_cached_prompt_still_computes_a_block():
    bench = Bench(num_blocks=32)
    bench.add("a", list(range(8)), max_tokens=1)
    bench.step()
    again = bench.add("b", list(range(8)), max_tokens=1)
    assert chunks(bench.step()) == [("b", 4, True)]
    assert again.num_cached == 4


def test_the_output_of_a_finished_turn_is_a_prefix_of_the_next():
    bench = Bench(num_blocks=32, max_batched_tokens=64)
    first = bench.add("a", list(range(6)), max_tokens=7)
    bench.drain()
    assert len(first.tokens) == 13
    second = bench.add("b", [*first.tokens, 1, 2], max_tokens=1)
    bench.step()
    assert second.num_cached == 12


def test_another_tenant_shares_nothing():
    bench = Bench(num_blocks=32)
    bench.add("a", list(range(9)), max_tokens=1)
    bench.step()
    sequence = Sequence(
        request_id="b", attempt=0, tokens=list(range(9)), num_prompt=9,
        sampling=SamplingParams(max_tokens=1), salt="other",
    )  # fmt: skip
    bench.scheduler.add(sequence)
    assert chunks(bench.step()) == [("b", 9, True)]


def test_the_latest_arrival_is_preempted_and_recomputed_from_its_own_prefix():
    bench = Bench(num_blocks=6, max_batched_tokens=64)
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


def test_an_adopted_victim_is_evicted():
    bench = Bench(num_blocks=6, max_batched_tokens=64)
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


def test_held_blocks_are_kept_until_removed():
    bench = Bench(num_blocks=4)
    held = bench.add("a", 8, handoff=True)
    bench.step()
    assert held.state is SequenceState.HELD
    assert held.table is not None
    assert held.table.lengths == [8]
    bench.add("b", 11)
    assert chunks(bench.step()) == []
    bench.scheduler.remove(held)
    assert chunks(bench.step()) == [("b", 11, True)]


def test_expired_waiting_work_never_starts():
    bench = Bench(max_num_seqs=1)
    bench.add("a", 4, max_tokens=3)
    late = bench.add("b", 4, deadline=5.0)
    bench.step()
    bench.clock.now = 5.0
    plan = bench.step()
    assert plan.expired == [late]
    assert late.state is SequenceState.FINISHED
    bench.drain()
    assert bench.started == ["a"]


def test_a_reservation_whose_deadline_passes_is_given_back():
    bench = Bench()
    adopted = bench.adopt("a", 9)
    assert adopted is not None
    adopted.deadline = 1.0
    bench.clock.now = 2.0
    assert bench.step().expired == [adopted]
    assert bench.blocks.num_free == 16


def test_a_running_sequence_is_not_ended_by_its_deadline():
    bench = Bench()
    running = bench.add("a", 4, deadline=1.0)
    bench.step()
    bench.clock.now = 2.0
    assert bench.step().expired == []
    assert running.state is SequenceState.RUNNING


def test_adoption_waits_for_room_and_for_those_before_it():
    bench = Bench(num_blocks=8)
    bench.add("a", 20, max_tokens=5)
    bench.step()
    bench.step()
    bench.add("b", 9, max_tokens=5)
    assert bench.adopt("c", 5) is None  # b came first
    bench.scheduler.remove(bench.scheduler.sequences["a"])
    bench.step()
    assert bench.started == ["a", "b"]
    assert bench.adopt("c", 5) is not None


def test_an_adoption_that_keeps_asking_is_not_overtaken_forever():
    bench = Bench(num_blocks=8, max_num_seqs=2)
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


def test_a_large_adoption_is_not_starved_by_small_arrivals():
    bench = Bench(num_blocks=8, max_num_seqs=8)
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


def test_admission_leaves_a_block_for_each_who_runs():
    bench = Bench(num_blocks=6, max_batched_tokens=64)
    bench.add("a", 8, max_tokens=2)
    bench.add("b", 16, max_tokens=2)
    assert chunks(bench.step()) == [("a", 8, True)]
    assert chunks(bench.step()) == [("a", 1, True)]
    assert chunks(bench.step()) == [("b", 16, True)]
    assert bench.scheduler.preemptions == 0


def test_an_adoption_that_gave_up_blocks_nobody():
    bench = Bench(num_blocks=8, max_num_seqs=1)
    bench.add("first", 8, max_tokens=3)
    bench.step()
    assert bench.adopt("moved", 5) is None
    bench.add("later", 4, max_tokens=3)
    bench.drain()
    assert bench.started == ["first", "later"]


def test_adoption_longer_than_the_pool_is_refused():
    bench = Bench(num_blocks=2)
    with pytest.raises(InvalidRequestError, match="longer than"):
        bench.adopt("a", 8)


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 20), st.integers(4, 20)),
    st.tuples(st.just("hand"), st.integers(1, 30), st.integers(2, 14)),
    st.tuples(st.just("adopt"), st.integers(2, 20), st.integers(2, 14)),
    st.tuples(st.just("cancel"), st.integers(0, 1000), st.just(0)),
    st.tuples(st.just("resume"), st.just(0), st.just(0)),
    st.tuples(st.just("release"), st.just(0), st.just(0)),
    st.tuples(st.just("expire"), st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(5, 14),
    num_groups=st.integers(1, 2),
    max_batched_tokens=st.integers(4, 24),
    max_num_seqs=st.integers(2, 6),
    chunked=st.booleans(),
    prefix=st.booleans(),
    actions=st.lists(ACTIONS, min_size=50, max_size=100),
)
def test_random_lives(
    num_blocks: int,
    num_groups: int,
    max_batched_tokens: int,
    max_num_seqs: int,
    chunked: bool,
    prefix: bool,
    actions: list[tuple[str, int, int]],
):
    """Every sequence ends exactly once, in order of arrival where nothing ends it early."""
    bench = Bench(
        num_blocks=num_blocks, num_groups=num_groups, max_batched_tokens=max_batched_tokens,
        max_num_seqs=max_num_seqs, chunked_prefill=chunked, prefix_cache=prefix,
    )  # fmt: skip
    added: list[Sequence] = []
    everyone: list[Sequence] = []
    cancelled: set[str] = set()
    evicted: list[Sequence] = []
    expired: list[Sequence] = []

    def of_state(state: SequenceState) -> list[Sequence]:
        return [s for s in everyone if s.state is state]

    def run() -> None:
        plan = bench.step()
        evicted.extend(plan.evicted)
        expired.extend(plan.expired)

    for number, (action, size, length) in enumerate(actions):
        live = [s for s in everyone if s.state is not SequenceState.FINISHED]
        if action in ("add", "hand"):
            tokens = [i // 7 for i in range(size)]  # few contents: prefixes often collide
            try:
                sequence = bench.add(
                    str(number), tokens, max_tokens=length, handoff=action == "hand",
                    deadline=100.0 if size % 5 == 0 else None,
                )  # fmt: skip
            except InvalidRequestError:
                assert size >= bench.scheduler.max_model_len
                continue
            added.append(sequence)
            everyone.append(sequence)
        elif action == "adopt":
            try:
                adopted = bench.adopt(str(number), size, max_tokens=length)
            except InvalidRequestError:
                assert size >= bench.scheduler.max_model_len
                continue
            if adopted is not None:
                everyone.append(adopted)
        elif action == "cancel" and live:
            victim = live[size % len(live)]
            cancelled.add(victim.request_id)
            bench.scheduler.remove(victim)
        elif action == "resume":
            for sequence in of_state(SequenceState.RESERVED):
                bench.scheduler.resume(sequence)
        elif action == "release":
            for sequence in of_state(SequenceState.HELD):
                bench.scheduler.remove(sequence)
        elif action == "expire":
            bench.clock.now = 100.0
        else:
            run()
        bench.check()
    for _ in range(2000):
        for sequence in of_state(SequenceState.RESERVED):
            bench.scheduler.resume(sequence)
        for sequence in of_state(SequenceState.HELD):
            bench.scheduler.remove(sequence)
        if not bench.scheduler.sequences:
            break
        run()
    assert not bench.scheduler.sequences, "somebody never ended"
    assert bench.blocks.num_free == num_blocks
    assert all(s.state is SequenceState.FINISHED for s in everyone)
    early = {s.request_id for s in (*evicted, *expired)} | cancelled
    for sequence in everyone:
        whole = sequence.num_output == sequence.sampling.max_tokens
        cut = len(sequence.tokens) == bench.scheduler.max_model_len
        assert whole or cut or sequence.handoff or sequence.request_id in early
    order = [s.request_id for s in added if s.request_id in bench.started]
    assert bench.started == order, "somebody overtook"
