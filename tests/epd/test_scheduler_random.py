"""The scheduler under random arrivals, moves, cancels and deadlines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from epd.errors import InvalidRequestError
from epd.sequence import Sequence, SequenceState

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
    scheduler_bench: Callable[..., Any],
    num_blocks: int,
    num_groups: int,
    max_batched_tokens: int,
    max_num_seqs: int,
    chunked: bool,
    prefix: bool,
    actions: list[tuple[str, int, int]],
):
    """Every sequence ends exactly once, in order of arrival where nothing ends it early."""
    bench = scheduler_bench(
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
