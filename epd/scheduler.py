"""What runs in the next step: admission, continuous batching, chunked prefill, preemption.

Knows token counts and blocks, never tensors. One step shares a token budget: sequences that decode
come first, then prefill in order of arrival. Admission reserves the blocks of the whole prompt, so
only decoding can run out of them; then the latest arrival gives its blocks back and is recomputed.
The earliest arrival is never a victim while another runs, hence somebody always makes progress.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from epd.errors import InvalidRequestError
from epd.kv.blocks import BlockManager, extend_hashes
from epd.sequence import Sequence, SequenceState

if TYPE_CHECKING:
    from collections.abc import Callable

    from epd.config import EngineConfig

__all__ = ["Chunk", "Plan", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of one sequence to compute now; `samples` when the next token follows.

    `dropped`, where layers prune, says how many of them are gone before each layer group.
    """

    sequence: Sequence
    length: int
    samples: bool
    dropped: tuple[int, ...] = ()

    def rows(self, group: int) -> int:
        """How many of the tokens layer group `group` computes."""
        return self.length - self.dropped[group] if self.dropped else self.length


@dataclass(slots=True)
class Plan:
    """One step: what to compute, and who left without computing."""

    chunks: list[Chunk] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    evicted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Queues of one engine core. `max_model_len` is the context this core can really hold."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        *,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        limits = [max_model_len, config.max_model_len or max_model_len]
        limits.append(blocks.num_blocks * blocks.block_size)
        if not config.chunked_prefill:
            limits.append(config.max_batched_tokens)  # a prompt must fit one step whole
        self.max_model_len = min(limits)
        self.max_position = max_model_len
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.sequences: dict[str, Sequence] = {}
        self.preemptions = self.prefix_hits = self.prefix_queries = 0
        self._config = config
        self._blocks = blocks
        self._clock = clock
        self._arrivals = 0
        self._num_reserved = 0
        self._refused: tuple[str, int] | None = None  # an adoption without room, and its arrival
        self._asked = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `InvalidRequestError` if it can never run."""
        if len(sequence.tokens) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(sequence.tokens)} tokens; "
                f"at most {self.max_model_len - 1} fit the context",
                "messages",
            )
        if sequence.end_pos >= self.max_position:
            raise InvalidRequestError(
                f"the prompt reaches position {sequence.end_pos}; at most {self.max_position - 1} "
                "fit the context, dropped vision tokens included",
                "messages",
            )
        self._register(sequence, self._next_arrival())
        self.waiting.append(sequence)

    def adopt(self, sequence: Sequence, lengths: list[int]) -> bool:
        """Give blocks for KV of `lengths` that another worker computed; False if none are free.

        First come, first served with the sequences that wait here, as long as the caller asks
        again before each step. Raises `InvalidRequestError` if it can never fit.
        """
        if len(sequence.tokens) >= self.max_model_len:
            raise InvalidRequestError("the request is longer than this worker's context")
        name, arrival = sequence.request_id, self._next_arrival()
        if self._refused is not None and self._refused[0] == name:
            arrival = self._refused[1]
        behind = bool(self.waiting) and self.waiting[0].arrival < arrival
        table = self._blocks.open()
        grown_by = [length + 1 for length in lengths]
        need = self._blocks.missing(table, grown_by)
        if behind or self._num_active >= self._config.max_num_seqs or not self._fits(need):
            self._refused, self._asked = (name, arrival), True
            return False
        self._register(sequence, arrival)
        grown = self._blocks.grow(table, grown_by)
        assert grown
        table.lengths = list(lengths)
        sequence.table, sequence.state = table, SequenceState.RESERVED
        self._num_reserved += 1
        return True

    def resume(self, sequence: Sequence) -> None:
        """Let a reserved sequence, whose KV has arrived, decode."""
        assert sequence.state is SequenceState.RESERVED
        self._num_reserved -= 1
        self._run(sequence)

    def schedule(self) -> Plan:
        """The next step. Every chunk's blocks are reserved when this returns."""
        plan = Plan()
        self._expire(plan)
        budget = self._decode(plan, self._config.max_batched_tokens)
        budget = self._continue(plan, budget)
        self._admit(plan, budget)
        return plan

    def advance(self, chunk: Chunk) -> None:
        """Note that a chunk was computed; its full blocks may be shared from now on."""
        sequence, table = chunk.sequence, chunk.sequence.table
        assert table is not None
        sequence.move_to(sequence.num_computed + chunk.length)
        for group in range(len(table.lengths)):
            table.lengths[group] += chunk.rows(group)
        size = self._blocks.block_size
        if sequence.shares and sequence.num_computed // size > table.num_published:
            self._extend_hashes(sequence)
            self._blocks.publish(table, sequence.hashes)

    def hold(self, sequence: Sequence) -> None:
        """Stop a sequence but keep its blocks until it is removed."""
        self.running.remove(sequence)
        sequence.state = SequenceState.HELD

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """End a sequence in any state and give back its blocks; `forget` also their content."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.RESERVED:
            self._num_reserved -= 1
        self._finish(sequence, forget=forget)

    @property
    def _num_active(self) -> int:
        return len(self.running) + self._num_reserved

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _register(self, sequence: Sequence, arrival: int) -> None:
        if sequence.request_id in self.sequences:
            raise InvalidRequestError("the request id is in use")
        sequence.arrival, sequence.arrived_at = arrival, self._clock()
        self.sequences[sequence.request_id] = sequence

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._close(sequence, forget=forget)
        sequence.state = SequenceState.FINISHED
        del self.sequences[sequence.request_id]

    def _close(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.table is not None:
            self._blocks.close(sequence.table, forget=forget)
            sequence.table = None

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)

    def _fits(self, num_blocks: int) -> bool:
        """Whether taking blocks leaves each running sequence one to grow into."""
        return num_blocks + len(self.running) <= self._blocks.num_free

    def _expire(self, plan: Plan) -> None:
        now = self._clock()
        queued = [s for s in self.waiting if s.deadline is not None and s.deadline <= now]
        if self._num_reserved:
            queued += [
                s for s in self.sequences.values()
                if s.state is SequenceState.RESERVED and s.deadline is not None
                and s.deadline <= now
            ]  # fmt: skip
        for sequence in queued:
            self.remove(sequence)
        plan.expired += queued

    def _decode(self, plan: Plan, budget: int) -> int:
        """Plan one token for everyone who decodes, preempting where blocks run out."""
        index = 0
        while budget and index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.num_remaining != 1:
                continue
            assert sequence.table is not None
            while not self._blocks.grow(sequence.table, 1):
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is sequence:
                    return budget
            plan.chunks.append(Chunk(sequence, 1, True))
            budget -= 1
        return budget

    def _preempt(self, victim: Sequence, plan: Plan) -> None:
        """Take back the blocks of the latest arrival; what cannot be recomputed here leaves."""
        assert victim is self.running[-1]
        self.running.pop()
        self.preemptions += 1
        if victim.adopted:
            self._finish(victim)
            plan.evicted.append(victim)
            return
        self._close(victim)
        victim.restart()
        insort(self.waiting, victim, key=lambda s: s.arrival)

    def _continue(self, plan: Plan, budget: int) -> int:
        """Plan the next chunk of prompts that are under way."""
        for sequence in self.running:
            if not budget:
                break
            if sequence.num_remaining > 1:
                budget -= self._plan_chunk(sequence, plan, budget)
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        """Start waiting sequences in order until one does not fit."""
        if not self._asked:
            self._refused = None
        self._asked = False
        while self.waiting and budget > 0 and self._num_active < self._config.max_num_seqs:
            sequence = self.waiting[0]
            yields = self._refused is not None and self._refused[1] < sequence.arrival
            alone = all(chunk.length == 1 for chunk in plan.chunks)
            if yields or not self._start(sequence, budget, alone=alone):
                break
            del self.waiting[0]
            self._run(sequence)
            budget -= self._plan_chunk(sequence, plan, budget)

    def _start(self, sequence: Sequence, budget: int, *, alone: bool) -> bool:
        """Reserve the blocks of the whole sequence, sharing what the prefix cache has.

        Where layers prune, the prompt runs whole, beyond the budget if no other prefill runs.
        """
        num_tokens, size = len(sequence.tokens), self._blocks.block_size
        if sequence.shares:
            self._extend_hashes(sequence)
        # at least one token is computed: its logits give the next one
        table = self._blocks.open(sequence.hashes[: (num_tokens - 1) // size])
        cached = table.lengths[0]
        news = [num_tokens - cached - gone for gone in sequence.dropped] or num_tokens - cached
        pruned = bool(sequence.dropped)
        whole = num_tokens - cached <= budget or (pruned and alone)
        runs = whole or (self._config.chunked_prefill and not pruned)
        fits = self._fits(self._blocks.missing(table, news))
        if not (runs and fits and self._blocks.grow(table, news)):
            self._blocks.close(table)
            return False
        sequence.table = table
        sequence.move_to(cached)
        self._note_start(sequence, cached)
        return True

    def _note_start(self, sequence: Sequence, cached: int) -> None:
        self.prefix_queries += len(sequence.tokens)
        self.prefix_hits += cached
        if sequence.started_at is None:
            sequence.started_at = self._clock()
            sequence.num_cached = min(cached, sequence.num_prompt)

    def _plan_chunk(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        dropped = () if sequence.num_computed else sequence.dropped
        length = sequence.num_remaining if dropped else min(sequence.num_remaining, budget)
        plan.chunks.append(Chunk(sequence, length, length == sequence.num_remaining, dropped))
        return length

    def _extend_hashes(self, sequence: Sequence) -> None:
        if self._blocks.prefix_cache:
            extend_hashes(
                sequence.hashes, sequence.tokens, spans=sequence.spans,
                block_size=self._blocks.block_size, salt=sequence.salt,
            )  # fmt: skip
