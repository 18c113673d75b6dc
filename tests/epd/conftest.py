"""A scheduler without a model, for the tests that need one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from epd.config import EngineConfig
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
class SchedulerBench:
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


@pytest.fixture(scope="session")
def scheduler_bench() -> type[SchedulerBench]:
    """The class: each test builds its own."""
    return SchedulerBench
