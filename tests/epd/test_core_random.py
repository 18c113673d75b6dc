"""Two cores under random arrivals, cancels, moves and losses give the undisturbed answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence, StepResult
from epd.kv.handoff import KVHandoff
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import SamplingParams

CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position=256,
)  # fmt: skip
PICTURES = {
    name: torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
    for name, length in (("p", 5), ("q", 9), ("r", 13))
}
PROMPTS: list[tuple[list[int], list[str]]] = [
    ([1, 3, 20, 21], ["p"]), ([1, 3, 20, 21], ["q"]), ([1, 3, 3, 50], ["p", "q"]),
    ([1, 3, 3, 50], ["q", "p"]), ([1, *range(10, 40)], []), ([1, *range(10, 27)], []),
    ([1, 7], []), ([1, 3, *range(60, 80)], ["r"]),
]  # fmt: skip


def new(name: str, kind: int, done: list[int], **fields: Any) -> NewSequence:
    prompt, pictures = PROMPTS[kind]
    sampling = SamplingParams(
        max_tokens=6 + kind * 2, ignore_eos=True, temperature=0.8 * (kind % 2), seed=kind,
        repetition_penalty=1.2 if kind % 3 == 0 else 1.0,
    )  # fmt: skip
    return NewSequence(
        request_id=name, attempt=0, prompt_token_ids=prompt, image_token_id=3, mm_keys=pictures,
        sampling=sampling, output_token_ids=done, **fields,
    )  # fmt: skip


def pictures_of(kind: int) -> list[torch.Tensor]:
    return [PICTURES[name] for name in PROMPTS[kind][1]]


def make_core(decoder: Decoder, **settings: Any) -> EngineCore:
    card: Any = SimpleNamespace(revision="r", eos_token_ids=(2,), max_position=256)
    core = EngineCore(decoder, card, config=EngineConfig(block_size=4, **settings), device="cpu")
    core.pool.fill(float("nan"))
    return core


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder.random(CONFIG, "cpu", torch.float32, seed=2)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if not name.endswith("norm.weight"):
                weight.mul_(10)  # answers hang on every token and position, by clear margins
    return made


@pytest.fixture(scope="module")
def oracle(decoder: Decoder) -> list[list[int]]:
    """Each prompt alone in a roomy core."""
    answers = []
    for kind in range(len(PROMPTS)):
        core = make_core(decoder, num_blocks=64, prefix_cache=False)
        core.add(new("x", kind, []), pictures_of(kind))
        tokens: list[int] = []
        while core.has_work():
            tokens += [token.output.token_id for token in core.step().tokens]
        answers.append(tokens)
    return answers


@dataclass
class World:
    """What a dispatcher remembers: who asked what, and every token that came."""

    prefill: EngineCore
    decode: EngineCore
    rng: random.Random
    kinds: dict[str, int] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    offers: list[KVHandoff] = field(default_factory=list)
    reserved: list[str] = field(default_factory=list)
    evictions: int = 0

    def arrive(self) -> None:
        name = f"request{len(self.kinds)}"
        self.kinds[name], self.answers[name] = self.rng.randrange(len(PROMPTS)), []
        self.dispatch(name)

    def dispatch(self, name: str) -> None:
        kind = self.kinds[name]
        sequence = new(name, kind, list(self.answers[name]), handoff=self.rng.random() < 0.6)
        self.prefill.add(sequence, pictures_of(kind))

    def cancel(self) -> None:
        live = sorted(self.kinds.keys() - self.ended - self.cancelled)
        if live:
            name = self.rng.choice(live)
            self.cancelled.add(name)
            self.offers = [offer for offer in self.offers if offer.request_id != name]
            self.reserved = [other for other in self.reserved if other != name]
            self.prefill.cancel(name)
            self.decode.cancel(name)

    def move(self) -> None:
        """Reserve for the oldest offer, and now and then let reserved KV arrive."""
        if self.offers and self.decode.reserve(self.offers[0], 0, None):
            self.reserved.append(self.offers.pop(0).request_id)
        while self.reserved and self.rng.random() < 0.5:
            name = self.reserved.pop(0)
            if self.rng.random() < 0.1:  # the transfer is lost: start again from the tokens
                self.decode.cancel(name)
                self.prefill.release(name)
                self.dispatch(name)
                continue
            self.decode.import_kv(name, [t.clone() for t in self.prefill.export_kv(name)])
            self.prefill.release(name)

    def step(self) -> None:
        for core in (self.prefill, self.decode):
            result: StepResult = core.step()
            assert not result.failed
            assert core is self.decode or not result.evicted
            core.check()
            for token in result.tokens:
                name = token.request_id
                assert name not in self.ended | self.cancelled
                assert token.output.index == len(self.answers[name])
                self.answers[name].append(token.output.token_id)
                if token.finish_reason is not None:
                    self.ended.add(name)
            self.offers += [core.offer(name) for name in result.handoffs]
            for name in result.evicted:
                self.evictions += 1
                self.dispatch(name)

    @property
    def finished(self) -> bool:
        return self.kinds.keys() == self.ended | self.cancelled


@pytest.mark.parametrize("seed", range(12))
def test_random_worlds(decoder: Decoder, oracle: list[list[int]], seed: int):
    rng = random.Random(seed)
    world = World(
        make_core(decoder, num_blocks=rng.randint(18, 40), max_num_seqs=rng.randint(2, 6),
                  max_batched_tokens=rng.randint(8, 40), chunked_prefill=True),
        make_core(decoder, num_blocks=rng.randint(14, 20), max_num_seqs=rng.randint(2, 6)),
        rng,
    )  # fmt: skip
    for turn in range(3000):
        if len(world.kinds) < 40 and rng.random() < 0.5:
            world.arrive()
        if rng.random() < 0.04:
            world.cancel()
        world.move()
        world.step()
        if turn > 100 and world.finished:
            break
    assert world.finished, "somebody hangs"
    for name, kind in world.kinds.items():
        tokens = world.answers[name]
        if name in world.cancelled:
            assert tokens == oracle[kind][: len(tokens)]
        else:
            assert tokens == oracle[kind]
    for core in (world.prefill, world.decode):
        stats = core.stats()
        assert (stats.waiting, stats.running, stats.reserved, stats.held) == (0, 0, 0, 0)
        assert stats.blocks_free == stats.blocks_total
    assert world.evictions + world.prefill.stats().preemptions > 0, "too tame a world"
