"""Pruning before the LLM through the whole pipeline: the tokens of one process, fewer bytes."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from epd import LLM
from epd.cache.memory import MemoryCache
from epd.config import EngineConfig
from epd.demo import CHECKPOINT
from epd.demo.examples import held_out
from epd.request import Usage
from epd_pruning.base import TokenPruner
from epd_pruning.registry import available
from epd_services.local_pipeline import LocalPipeline


def handed_on(pipeline: LocalPipeline, stage: str) -> int:
    """Bytes that the workers of a stage sent to peers."""
    return sum(w.stats().handoff_bytes for name, w in pipeline.workers.items() if name[-1] == stage)


SPECS: list[dict[str, Any]] = [{"method": name, "keep": 12} for name in available("token")] + [
    {"method": "script", "keep": 0.25, "params": {"query_encoder": "llm_embed_mean"}},
    {"method": "script", "keep": 9, "params": {"combine": "intersect_fill"}},
    {"method": "script", "keep": 9, "positions": "renumber"},
    {"method": "visionzip", "keep": 16, "params": {"merging": True}},
    {"method": "cdpruner", "keep": 1},
]


@pytest.mark.parametrize("topology", ["1E1P1D", "1EPD"])
def test_every_method_gives_the_oracles_tokens_cold_and_warm(
    model: Path, llm: LLM, topology: str, config: EngineConfig, asking: Any, go: Any
) -> None:
    asks = [asking("what is it?", [1], **spec) for spec in SPECS]
    asks += [asking("how many are there?", [1, 2], **spec) for spec in SPECS[-5:]]
    expected = [ask.expected(llm) for ask in asks]
    assert len({tuple(ids) for ids in expected}) > len(asks) // 2

    async def run() -> None:
        async with LocalPipeline(str(model), topology, config=config) as pipeline:
            for _ in range(2):
                results = await asyncio.gather(*(ask.answer(pipeline) for ask in asks))
                assert [ids for ids, _ in results] == expected
            for ask, (_, usage) in zip(asks, results, strict=True):
                assert ask.spec is not None
                assert usage.image_tokens == ask.spec.num_kept(64) * len(ask.images)
                assert usage.image_tokens_before == 64 * len(ask.images)

    go(run())


def test_interleaved_questions_and_budgets_equal_cold_runs(
    model: Path, config: EngineConfig, asking: Any, go: Any
) -> None:
    """Same image, two questions, two budgets, dense between them: nobody sees another's tokens."""
    asks = [
        asking(question, seeds, **spec)
        for question in ("what is left?", "what is red?")
        for seeds in ([1], [1, 2], [2, 1])
        for spec in (
            {}, {"method": "script", "keep": 16}, {"method": "script", "keep": 6},
            {"method": "cdpruner", "keep": 6}, {"method": "script", "keep": 6, "turns": "sticky"},
        )
    ]  # fmt: skip
    cold = [ask.expected(LLM(model, config=config)) for ask in asks]
    order = np.random.default_rng(0).permutation(len(asks) * 2) % len(asks)

    async def run() -> None:
        async with LocalPipeline(str(model), "2E1P1D", config=config) as pipeline:
            results = []
            for start in range(0, len(order), 10):
                some = order[start : start + 10]
                results += await asyncio.gather(*(asks[i].answer(pipeline) for i in some))
            assert [ids for ids, _ in results] == [cold[i] for i in order]
            assert sum(w.stats().cache_hits for w in pipeline.workers.values()) > 0
            assert sum(usage.cached_tokens for _, usage in results) > 0

    go(run())


def test_bytes_on_the_wire_and_in_the_cache_fall_with_the_budget(
    model: Path, config: EngineConfig, asking: Any, go: Any
) -> None:
    async def cost(spec: dict[str, Any]) -> tuple[int, int, int]:
        cache = MemoryCache()
        async with LocalPipeline(str(model), "1E1P1D", config=config, cache=cache) as pipeline:
            await asking("what is it?", [1], **spec).answer(pipeline)
            return handed_on(pipeline, "E"), handed_on(pipeline, "P"), cache.counters.stored_bytes

    async def run() -> None:
        dense = await cost({})
        by_budget = [
            await cost({"method": "dpp", "keep": keep}) for keep in (32, 16, 8, 4)
        ]  # fmt: skip
        for more, less in itertools.pairwise([dense, *by_budget]):
            assert all(fewer < many for fewer, many in zip(less, more, strict=True))
        embeddings, places = 64 * 4, 2 * 4
        assert dense[0] == 64 * embeddings
        assert [sent for sent, _, _ in by_budget] == [
            k * (embeddings + places) + 4 for k in (32, 16, 8, 4)
        ]
        # Script's pool is twice the budget, and carries the aligned tokens that the choice reads
        script = await cost({"method": "script", "keep": 8, "params": {"pool_floor": 0.0}})
        assert script[0] == 16 * (embeddings + places + 16 * 4) + 4
        assert script[1] == by_budget[2][1]

    go(run())


@pytest.mark.parametrize("keep", [64, 1.0, 0.999, 5000])
def test_a_budget_of_the_whole_image_is_the_identity(
    model: Path,
    llm: LLM,
    keep: int | float,
    monkeypatch: pytest.MonkeyPatch,
    config: EngineConfig,
    asking: Any,
    go: Any,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pruner ran")

    monkeypatch.setattr(TokenPruner, "prepare_all", never)
    monkeypatch.setattr(TokenPruner, "select_all", never)
    dense = asking("what is it?", [1])
    ask = asking("what is it?", [1], method="script", keep=keep)
    assert ask.expected(llm) == dense.expected(llm)

    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=config) as pipeline:
            ids, usage = await ask.answer(pipeline)
            assert ids == dense.expected(llm)
            assert (usage.image_tokens, usage.image_tokens_before) == (64, 64)
            assert handed_on(pipeline, "E") == 64 * 64 * 4

    go(run())


def test_text_alone_is_untouched(
    model: Path, llm: LLM, config: EngineConfig, asking: Any, go: Any
) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=config) as pipeline:
            await pipeline.kill("w0-E")
            ask = asking("what is it?", [], method="script", keep=4)
            ids, usage = await ask.answer(pipeline)
            assert ids == asking("what is it?", []).expected(llm) == ask.expected(llm)
            assert usage.image_tokens == usage.image_tokens_before == 0

    go(run())


TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is left?"}]},
    {"role": "assistant", "content": "a circle"},
    {"role": "user", "content": "and which colours are at the bottom?"},
]


def test_sticky_turns_find_the_first_turns_tokens_and_reselect_does_not(
    model: Path, llm: LLM, config: EngineConfig, asking: Any, go: Any
) -> None:
    def talk(turns: str) -> list[Any]:
        spec = {"method": "script", "keep": 16, "turns": turns}
        return [asking(TURNS[:length], [1], **spec) for length in (1, 3)]

    async def cached(turns: str) -> int:
        async with LocalPipeline(str(model), "1E1P1D", config=config) as pipeline:
            usage = Usage(prompt_tokens=0, completion_tokens=0)
            for ask in talk(turns):
                ids, usage = await ask.answer(pipeline)
                assert ids == ask.expected(llm)
            return usage.cached_tokens

    async def run() -> None:
        sticky, reselect = await cached("sticky"), await cached("reselect")
        assert sticky >= 16 + len("USER: ") > reselect

    first, second = talk("reselect")
    assert first.expected(llm) == talk("sticky")[0].expected(llm)
    assert second.expected(llm) != talk("sticky")[1].expected(llm)
    go(run())


def test_methods_inside_the_llm_and_both_kinds_joined(
    model: Path, config: EngineConfig, asking: Any, go: Any
) -> None:
    config = msgspec.structs.replace(config, layer_pruning="adaptinfer:0")
    llm = LLM(model, config=config)
    asks = [
        asking("what is it?", images, **spec)
        for images in ([1], [1, 2])
        for spec in (
            {"method": "adaptinfer", "keep": 40},
            {"method": "script+adaptinfer", "keep": 32, "layer_keep": 24},
            {"method": "script", "keep": 32},
            {"method": "script+adaptinfer", "keep": 64, "layer_keep": 40},
        )
    ]
    expected = [ask.expected(llm) for ask in asks]
    assert expected[0] == expected[3]
    assert len({tuple(ids) for ids in expected}) == 6

    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=config) as pipeline:
            for _ in range(2):
                results = await asyncio.gather(*(ask.answer(pipeline) for ask in asks))
                assert [ids for ids, _ in results] == expected

    go(run())


def test_the_built_in_model_answers_through_the_pipeline_as_alone(asking: Any, go: Any) -> None:
    """Few questions; the harness measures accuracy."""
    examples, llm = held_out(4, seed=77), LLM()
    budgets = [{"method": "script", "keep": 64}, {"method": "script", "keep": 28}]
    asks = [
        asking(example.question, list(example.images), **spec)
        for example, spec in itertools.product(examples, budgets)
    ]
    expected = [ask.expected(llm) for ask in asks]
    texts = [llm.chat(e.question, images=e.images, pruning=budgets[0]).text for e in examples]
    assert sum(t.strip() == e.answer for t, e in zip(texts, examples, strict=True)) >= 3

    async def run() -> None:
        async with LocalPipeline(str(CHECKPOINT), "1E1P1D") as pipeline:
            for _ in range(2):
                results = await asyncio.gather(*(ask.answer(pipeline) for ask in asks))
                assert [ids for ids, _ in results] == expected

    go(run())
