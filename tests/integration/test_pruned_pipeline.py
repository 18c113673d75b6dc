"""Pruning before the LLM through the whole pipeline: the tokens of one process, fewer bytes."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from epd_pruning.base import TokenPruner
from epd_pruning.registry import available
from epd_services.gateway.dispatch_api import ImagePixels, Submission
from epd_services.gateway.dispatcher import DispatchLimits
from epd_services.local_pipeline import LocalPipeline

from epd import LLM, SamplingParams
from epd.cache.memory import MemoryCache
from epd.chat import ChatFormatter
from epd.config import EngineConfig
from epd.conversation import as_messages, place_images
from epd.demo import CHECKPOINT
from epd.demo.examples import held_out
from epd.errors import EPDError, InvalidRequestError
from epd.images import rgb_array
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava, write_tiny_text_tower
from epd.pruning_policy import PruningPolicy
from epd.pruning_spec import PruningSpec
from epd.queries import image_queries
from epd.request import Usage

CONFIG = EngineConfig(num_blocks=128, max_batched_tokens=64, max_num_seqs=32)
TOKENS = 12
_ids = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of 64 vision tokens with a text tower."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llava(path, seed=3, image_size=56)
    write_tiny_text_tower(path, seed=4)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, config=CONFIG)


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blobs of colour: neighbouring tokens are alike, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return np.kron(coarse, np.ones((12, 9, 1), np.uint8)).astype(np.uint8)


class Ask:
    """One question about pictures, for the pipeline and for the oracle."""

    def __init__(self, question: Any, seeds: list[int], **pruning: Any) -> None:
        self.question, self.images = question, [picture(seed) for seed in seeds]
        self.spec = PruningSpec.parse(pruning) if pruning else None
        self.tokens = TOKENS

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.tokens, ignore_eos=True)

    def submission(self, formatter: ChatFormatter, **fields: Any) -> Submission:
        messages, images = place_images(as_messages(self.question), list(self.images))
        pixels = [rgb_array(image) for image in images]
        return Submission(
            request_id=f"r{next(_ids)}", prompt_token_ids=formatter.tokenize(messages),
            images=[ImagePixels(a.shape[1], a.shape[0], a.tobytes()) for a in pixels],
            sampling=self.sampling, timeout_s=60.0, pruning=self.spec,
            queries=image_queries(messages, self.spec.turns) if self.spec else [],
            **{"salt": "", **fields},
        )  # fmt: skip

    def expected(self, llm: LLM) -> list[int]:
        done = llm.chat(
            self.question, images=list(self.images), sampling=self.sampling, pruning=self.spec
        )
        return done.token_ids


async def answer(pipeline: LocalPipeline, ask: Ask, **fields: Any) -> tuple[list[int], Usage]:
    tokens, last = await pipeline.run(ask.submission(ChatFormatter(pipeline.card), **fields))
    assert last.usage is not None
    return [token.token_id for token in tokens], last.usage


def go(work: Coroutine[object, object, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


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
    model: Path, llm: LLM, topology: str
) -> None:
    asks = [Ask("what is it?", [1], **spec) for spec in SPECS]
    asks += [Ask("how many are there?", [1, 2], **spec) for spec in SPECS[-5:]]
    expected = [ask.expected(llm) for ask in asks]
    assert len({tuple(ids) for ids in expected}) > len(asks) // 2

    async def run() -> None:
        async with LocalPipeline(str(model), topology, config=CONFIG) as pipeline:
            for _ in range(2):
                results = await asyncio.gather(*(answer(pipeline, ask) for ask in asks))
                assert [ids for ids, _ in results] == expected
            for ask, (_, usage) in zip(asks, results, strict=True):
                assert ask.spec is not None
                assert usage.image_tokens == ask.spec.num_kept(64) * len(ask.images)
                assert usage.image_tokens_before == 64 * len(ask.images)

    go(run())


def test_interleaved_questions_and_budgets_equal_cold_runs(model: Path) -> None:
    """Same image, two questions, two budgets, dense between them: nobody sees another's tokens."""
    asks = [
        Ask(question, seeds, **spec)
        for question in ("what is left?", "what is red?")
        for seeds in ([1], [1, 2], [2, 1])
        for spec in (
            {}, {"method": "script", "keep": 16}, {"method": "script", "keep": 6},
            {"method": "cdpruner", "keep": 6}, {"method": "script", "keep": 6, "turns": "sticky"},
        )
    ]  # fmt: skip
    cold = [ask.expected(LLM(model, config=CONFIG)) for ask in asks]
    order = np.random.default_rng(0).permutation(len(asks) * 2) % len(asks)

    async def run() -> None:
        async with LocalPipeline(str(model), "2E1P1D", config=CONFIG) as pipeline:
            results = []
            for start in range(0, len(order), 10):
                some = order[start : start + 10]
                results += await asyncio.gather(*(answer(pipeline, asks[i]) for i in some))
            assert [ids for ids, _ in results] == [cold[i] for i in order]
            assert sum(w.stats().cache_hits for w in pipeline.workers.values()) > 0
            assert sum(usage.cached_tokens for _, usage in results) > 0

    go(run())


def test_bytes_on_the_wire_and_in_the_cache_fall_with_the_budget(model: Path) -> None:
    async def cost(spec: dict[str, Any]) -> tuple[int, int, int]:
        cache = MemoryCache()
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG, cache=cache) as pipeline:
            await answer(pipeline, Ask("what is it?", [1], **spec))
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
    model: Path, llm: LLM, keep: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pruner ran")

    monkeypatch.setattr(TokenPruner, "prepare", never)
    monkeypatch.setattr(TokenPruner, "select", never)
    dense = Ask("what is it?", [1])
    ask = Ask("what is it?", [1], method="script", keep=keep)
    assert ask.expected(llm) == dense.expected(llm)

    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            ids, usage = await answer(pipeline, ask)
            assert ids == dense.expected(llm)
            assert (usage.image_tokens, usage.image_tokens_before) == (64, 64)
            assert handed_on(pipeline, "E") == 64 * 64 * 4

    go(run())


def test_text_alone_is_untouched(model: Path, llm: LLM) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            await pipeline.kill("w0-E")
            ask = Ask("what is it?", [], method="script", keep=4)
            ids, usage = await answer(pipeline, ask)
            assert ids == Ask("what is it?", []).expected(llm) == ask.expected(llm)
            assert usage.image_tokens == usage.image_tokens_before == 0

    go(run())


TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is left?"}]},
    {"role": "assistant", "content": "a circle"},
    {"role": "user", "content": "and which colours are at the bottom?"},
]


def test_sticky_turns_find_the_first_turns_tokens_and_reselect_does_not(
    model: Path, llm: LLM
) -> None:
    def talk(turns: str) -> list[Ask]:
        spec = {"method": "script", "keep": 16, "turns": turns}
        return [Ask(TURNS[:length], [1], **spec) for length in (1, 3)]

    async def cached(turns: str) -> int:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            usage = Usage(prompt_tokens=0, completion_tokens=0)
            for ask in talk(turns):
                ids, usage = await answer(pipeline, ask)
                assert ids == ask.expected(llm)
            return usage.cached_tokens

    async def run() -> None:
        sticky, reselect = await cached("sticky"), await cached("reselect")
        assert sticky >= 16 + len("USER: ") > reselect

    first, second = talk("reselect")
    assert first.expected(llm) == talk("sticky")[0].expected(llm)
    assert second.expected(llm) != talk("sticky")[1].expected(llm)
    go(run())


@pytest.mark.parametrize("victim", ["w0-E", "w2-P", "w4-D"])
@pytest.mark.parametrize("after", [0, 6])
def test_a_worker_lost_in_mid_request_changes_no_token(
    model: Path, llm: LLM, victim: str, after: int
) -> None:
    asks = [
        Ask("what is it?", [seed, seed + 1], method=method, keep=9)
        for seed, method in enumerate(("script", "cdpruner", "visionzip", "random"))
    ]
    for ask in asks:
        ask.tokens = 40

    async def run() -> None:
        async with LocalPipeline(str(model), "2E2P2D", config=CONFIG) as pipeline:
            running = asyncio.gather(*(answer(pipeline, ask) for ask in asks))
            seen = 0
            while seen < after and not running.done():
                await asyncio.sleep(0.002)
                records = pipeline.dispatcher._attempts.records.values()
                seen = max((len(r.outputs) for r in records), default=after)
            await pipeline.kill(victim)
            assert [ids for ids, _ in await running] == [ask.expected(llm) for ask in asks]

    go(run())


def test_a_filling_ledger_lowers_budgets_to_the_floor(model: Path, llm: LLM) -> None:
    policy = PruningPolicy(image_tokens=64, floor=8)
    limits = DispatchLimits(max_inflight=8)
    pipeline = LocalPipeline(str(model), "1E1P1D", config=CONFIG, limits=limits, pruning=policy)

    async def run() -> None:
        async with pipeline:
            for method, least in (("script", 11), ("uniform_stride", 32)):
                ask = Ask("what is it?", [1], method=method, keep=32)
                results = await asyncio.gather(*(answer(pipeline, ask) for _ in range(8)))
                assert [usage.image_tokens for _, usage in results] == (
                    [32, 29, 26, 23, 20, 17, 14, 11] if method == "script" else [32] * 8
                )
                # a smaller choice from the pool of the larger budget is the cold run's
                lowest = Ask("what is it?", [1], method=method, keep=least)
                assert results[-1][0] == lowest.expected(llm)
                assert results[0][0] == ask.expected(llm)

    go(run())


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        ({"method": "script", "keep": 4, "params": {"nope": 1}}, "pruning.params.nope"),
        ({"method": "dpp", "keep": 4, "params": {"nope": 1}}, "pruning.params.nope"),
        ({"method": "script", "keep": 4, "positions": "keep+calibrate"}, "pruning.positions"),
    ],
)
def test_what_only_a_worker_can_know_is_still_a_400(
    model: Path, spec: dict[str, Any], param: str
) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            with pytest.raises(InvalidRequestError) as caught:
                await answer(pipeline, Ask("what?", [1], **spec))
            assert (caught.value.status, caught.value.param) == (400, param)
            await answer(pipeline, Ask("what?", [1], method="dpp", keep=4))

    go(run())


def test_a_checkpoint_without_a_text_tower_names_what_is_missing(
    model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("text_tower"))
    served = {"method": "script", "keep": 4, "params": {"query_encoder": "llm_embed_mean"}}

    async def run() -> None:
        async with LocalPipeline(str(bare), "1E1P1D", config=CONFIG) as pipeline:
            with pytest.raises(InvalidRequestError, match="text_tower") as caught:
                await answer(pipeline, Ask("what?", [1], method="script", keep=4))
            assert caught.value.param == "pruning.params.query_encoder"
            ids, _ = await answer(pipeline, Ask("what?", [1], **served))
            assert ids == Ask("what?", [1], **served).expected(LLM(bare, config=CONFIG))

    go(run())


def test_an_llm_refuses_what_it_cannot_do(llm: LLM) -> None:
    for spec, param in (
        ({"method": "adaptinfer", "keep": 9}, "pruning.method"),
        ({"method": "script", "keep": 9, "positions": "keep+calibrate"}, "pruning.positions"),
        ({"method": "script", "keep": 0}, "pruning.keep"),
    ):
        with pytest.raises(EPDError) as caught:
            llm.chat("what?", images=[picture(1)], pruning=spec)
        assert getattr(caught.value, "param", None) == param


def test_the_built_in_model_answers_through_the_pipeline_as_alone() -> None:
    """Few questions; the harness measures accuracy."""
    examples = held_out(4, seed=77)
    llm, formatter = LLM(), ChatFormatter(ModelCard.load(CHECKPOINT))
    specs = [{"method": "script", "keep": 64}, {"method": "script", "keep": 28}]
    asks = []
    for example, spec in itertools.product(examples, specs):
        ask = Ask(example.question, [], **spec)
        ask.images = [np.asarray(image) for image in example.images]
        asks.append(ask)
    expected = [ask.expected(llm) for ask in asks]
    right = [
        llm.chat(e.question, images=list(e.images), pruning=specs[0]).text.strip() == e.answer
        for e in examples
    ]
    assert sum(right) >= 3

    async def run() -> None:
        async with LocalPipeline(str(CHECKPOINT), "1E1P1D") as pipeline:
            for _ in range(2):
                results = await asyncio.gather(
                    *(pipeline.run(ask.submission(formatter)) for ask in asks)
                )
                assert [[t.token_id for t in tokens] for tokens, _ in results] == expected

    go(run())
