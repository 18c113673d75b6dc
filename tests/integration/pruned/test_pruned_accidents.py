"""Pruning when things go wrong: lost workers, full ledgers, what cannot be served."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from epd import LLM
from epd.config import EngineConfig
from epd.errors import EPDError, InvalidRequestError
from epd.pruning_policy import PruningPolicy
from epd_services.gateway.dispatcher import DispatchLimits
from epd_services.local_pipeline import LocalPipeline


@pytest.mark.parametrize("victim", ["w0-E", "w2-P", "w4-D"])
@pytest.mark.parametrize("after", [0, 6])
def test_a_worker_lost_in_mid_request_changes_no_token(
    model: Path, llm: LLM, victim: str, after: int, config: EngineConfig, asking: Any, go: Any
) -> None:
    asks = [
        asking("what is it?", [seed, seed + 1], tokens=40, method=method, keep=9)
        for seed, method in enumerate(("script", "cdpruner", "visionzip", "random"))
    ]

    async def run() -> None:
        async with LocalPipeline(str(model), "2E2P2D", config=config) as pipeline:
            running = asyncio.gather(*(ask.answer(pipeline) for ask in asks))
            seen = 0
            while seen < after and not running.done():
                await asyncio.sleep(0.002)
                records = pipeline.dispatcher._attempts.records.values()
                seen = max((len(r.outputs) for r in records), default=after)
            await pipeline.kill(victim)
            assert [ids for ids, _ in await running] == [ask.expected(llm) for ask in asks]

    go(run())


def test_a_filling_ledger_lowers_budgets_to_the_floor(
    model: Path, llm: LLM, config: EngineConfig, asking: Any, go: Any
) -> None:
    policy = PruningPolicy(image_tokens=64, floor=8)
    limits = DispatchLimits(max_inflight=8)
    pipeline = LocalPipeline(str(model), "1E1P1D", config=config, limits=limits, pruning=policy)

    async def run() -> None:
        async with pipeline:
            for method, least in (("script", 11), ("uniform_stride", 32)):
                ask = asking("what is it?", [1], method=method, keep=32)
                results = await asyncio.gather(*(ask.answer(pipeline) for _ in range(8)))
                assert [usage.image_tokens for _, usage in results] == (
                    [32, 29, 26, 23, 20, 17, 14, 11] if method == "script" else [32] * 8
                )
                # a smaller choice from the pool of the larger budget is the cold run's
                lowest = asking("what is it?", [1], method=method, keep=least)
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
    model: Path, spec: dict[str, Any], param: str, config: EngineConfig, asking: Any, go: Any
) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=config) as pipeline:
            with pytest.raises(InvalidRequestError) as caught:
                await asking("what?", [1], **spec).answer(pipeline)
            assert (caught.value.status, caught.value.param) == (400, param)
            await asking("what?", [1], method="dpp", keep=4).answer(pipeline)

    go(run())


def test_a_checkpoint_without_a_text_tower_names_what_is_missing(
    model: Path, tmp_path: Path, config: EngineConfig, asking: Any, go: Any
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("text_tower"))
    served = {"method": "script", "keep": 4, "params": {"query_encoder": "llm_embed_mean"}}

    async def run() -> None:
        async with LocalPipeline(str(bare), "1E1P1D", config=config) as pipeline:
            with pytest.raises(InvalidRequestError, match="text_tower") as caught:
                await asking("what?", [1], method="script", keep=4).answer(pipeline)
            assert caught.value.param == "pruning.params.query_encoder"
            ids, _ = await asking("what?", [1], **served).answer(pipeline)
            assert ids == asking("what?", [1], **served).expected(LLM(bare, config=config))

    go(run())


def test_an_llm_refuses_what_it_cannot_do(llm: LLM, asking: Any) -> None:
    for spec, param in (
        ({"method": "adaptinfer", "keep": 9}, "pruning.method"),
        ({"method": "script", "keep": 9, "positions": "keep+calibrate"}, "pruning.positions"),
        ({"method": "script", "keep": 0}, "pruning.keep"),
    ):
        with pytest.raises(EPDError) as caught:
            llm.chat("what?", images=asking("what?", [1]).images, pruning=spec)
        assert getattr(caught.value, "param", None) == param
