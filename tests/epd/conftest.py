"""A scheduler without a model, a toy decoder pruned between its layers, a watched compiler."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, KeptTokens, NewSequence
from epd.kv.blocks import BlockManager
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import SamplingParams
from epd.scheduler import Plan, Scheduler
from epd.sequence import Sequence, SequenceState
from epd_pruning import layer_pruner
from epd_pruning.layer_base import LayerPruner
from epd_pruning.schedule import Schedule, fit_average


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


class LayerBench:
    """A toy decoder, prompts of every kind, and a core that prunes them inside the decoder."""

    image, size, new = 3, 20, 34
    layers, shares, groups = (0, 2), (0.5, 0.2), (0, 1, 1, 2, 2)
    config = DecoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position=256,
    )  # fmt: skip
    # text and images of a prompt, and the layer average asked for (None: not pruned inside)
    cases: ClassVar[dict[str, tuple[str, int | float | None]]] = {
        "one": ("a @ what is it", 7),
        "bare": ("@?", 0.3),
        "two": ("see @ and @ which", 9),
        "image last": ("no text after @", 7),
        "dense": ("a @ what is it", None),
        "text": ("no image here", 5),
        "all": ("keeps all @ of it", size),
        "gaps": ("b @ what is it", 5),  # pruned before the decoder too
    }
    gaps: ClassVar[list[int]] = [0, 1, 4, 5, 6, 8, 9, 11, 14, 15, 17, 19]

    def __init__(self) -> None:
        self.decoder = Decoder.random(self.config, "cpu", torch.float32, seed=3)
        for name, weight in self.decoder.named_parameters():
            if not name.endswith("norm.weight"):
                weight.mul_(12)  # answers hang on every token and position
        generator = torch.Generator().manual_seed(4)
        shape = (self.size, self.config.hidden_size)
        self.images = [torch.randn(shape, generator=generator) for _ in range(2)]

    @cached_property
    def alone(self) -> dict[str, list[int]]:
        """What each case answers in a core of its own."""
        found = {}
        for name in self.cases:
            core = self.core()
            core.add(self.sequence(name), self.vision(name))
            found |= self.drain(core)
        return found

    def tokenise(self, text: str) -> list[int]:
        return [1, *(self.image if c == "@" else 10 + ord(c) % 80 for c in text)]

    def rows(self, name: str) -> list[int]:
        """What is left of each image before the decoder."""
        return self.gaps if name == "gaps" else list(range(self.size))

    def schedule(self, name: str) -> Schedule | None:
        """The counts that the layer average of a case comes to; None where all stay."""
        text, keep = self.cases[name]
        num_images = text.count("@")
        if keep is None or not num_images or text.endswith("@") or name == "all":
            return None
        share = isinstance(keep, float)
        return fit_average(
            self.layers, self.shares, num_tokens=len(self.rows(name)) * num_images, num_layers=5,
            average=keep * num_images * (self.size if share else 1),
        )  # fmt: skip

    def pruner(self, name: str = "adaptinfer", schedule: Schedule | None = None) -> LayerPruner:
        params = {"num_pivots": 2} if name == "dart_layer" else {}
        ratios = Schedule(self.layers, ratios=self.shares, of="original")
        return layer_pruner(name, schedule or ratios, params=params)

    def core(self, pruner: LayerPruner | None = None, **settings: Any) -> EngineCore:
        """A core whose KV pool is poisoned: whoever reads a slot nobody wrote answers nonsense."""
        card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
        config = EngineConfig(**{"block_size": 4, "num_blocks": 200, **settings})
        core = EngineCore(
            self.decoder, card, config=config, device="cpu", layer_pruner=pruner or self.pruner()
        )
        core.pool.fill(float("nan"))
        return core

    def sequence(self, name: str, **fields: Any) -> NewSequence:
        text, keep = self.cases[name]
        return NewSequence(
            **{
                "request_id": name, "attempt": 0, "prompt_token_ids": self.tokenise(text),
                "image_token_id": self.image, "layer_keep": keep,
                "mm_keys": [f"pixels{i}" for i in range(text.count("@"))],
                "sampling": SamplingParams(max_tokens=self.new, ignore_eos=True),
                "kept": [KeptTokens(self.size, self.gaps)] if name == "gaps" else [], **fields,
            }
        )  # fmt: skip

    def vision(self, name: str) -> list[torch.Tensor]:
        num_images = self.cases[name][0].count("@")
        return [image[self.rows(name)] for image in self.images[:num_images]]

    def add_all(self, core: EngineCore, **fields: Any) -> None:
        for name in self.cases:
            core.add(self.sequence(name, **fields), self.vision(name))

    def lengths(self, name: str, num_output: int) -> list[int]:
        """KV length of each layer group when `num_output` tokens were sampled."""
        num_images = self.cases[name][0].count("@")
        text = len(self.tokenise(self.cases[name][0])) - num_images
        entering = len(self.rows(name)) * num_images
        schedule = self.schedule(name)
        kept = schedule.kept(entering) if schedule else (entering, entering)
        return [text + vision + num_output - 1 for vision in (entering, *kept)]

    def steps(self, core: EngineCore) -> Iterator[Any]:
        for _ in range(1000):
            if not core.has_work():
                return
            result = core.step()
            assert not result.failed
            core.check()
            yield result
        raise AssertionError("the core never finishes")

    def drain(
        self, core: EngineCore, found: dict[str, list[int]] | None = None
    ) -> dict[str, list[int]]:
        """`found` with all that is still to come; every block is free afterwards."""
        found = {} if found is None else found
        for result in self.steps(core):
            for token in result.tokens:
                assert token.output.index == len(found.setdefault(token.request_id, []))
                found[token.request_id].append(token.output.token_id)
        assert core.stats().blocks_free == core.stats().blocks_total
        return found


@pytest.fixture(scope="session")
def layer_bench() -> LayerBench:
    """One for all: it holds nothing but constants and a cache."""
    return LayerBench()


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What Triton compiles, or loads from its cache, as it happens."""
    knobs = importlib.import_module("triton").knobs
    names: list[str] = []

    def note(**facts: Any) -> None:
        names.append(facts["repr"])

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, note
    yield names
    knobs.runtime.jit_post_compile_hook = before
