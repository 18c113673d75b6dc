"""Workers that hold KV in codes answer as one engine does, and hand the codes over as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from epd.config import EngineConfig
from epd.engine import LLM
from epd.models.tiny import write_tiny_llava
from epd.request import SamplingParams
from epd_services.gateway.dispatch_api import ImagePixels, Submission
from epd_services.local_pipeline import LocalPipeline

SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
SIZE = (24, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=3, num_kv_heads=2)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(count)]


def prompt(count: int, image_token: int) -> list[int]:
    return [1, *[token for n in range(count) for token in (20 + n, image_token)], 30, 31, 32]


async def through_workers(
    model: Path, config: EngineConfig, topology: str
) -> tuple[list[list[int]], int]:
    """Token ids of requests with 0, 1 and 2 pictures, and the bytes between workers."""
    async with asyncio.timeout(60), LocalPipeline(str(model), topology, config=config) as pipeline:
        requests = [
            Submission(
                request_id=f"r{count}",
                prompt_token_ids=prompt(count, pipeline.card.image_token_id or 0),
                images=[ImagePixels(SIZE[1], SIZE[0], p.tobytes()) for p in pictures(count)],
                sampling=SAMPLING, salt="", timeout_s=60.0,
            )
            for count in range(3)
        ]  # fmt: skip
        results = await asyncio.gather(*(pipeline.run(request) for request in requests))
        moved = sum(worker.stats().handoff_bytes for worker in pipeline.workers.values())
        return [[token.token_id for token in tokens] for tokens, _ in results], moved


@pytest.mark.parametrize("topology", ["1E1P1D", "1EPD"])
def test_coded_kv_answers_as_one_engine(model: Path, topology: str) -> None:
    bytes_of = {}
    for kv in ("bf16", "fp8", "int4"):
        config = EngineConfig(num_blocks=128, max_batched_tokens=64, kv=kv)
        llm = LLM(model, config=config)
        image_token = llm.card.image_token_id or 0
        expected = [
            llm.generate(prompt(n, image_token), images=pictures(n), sampling=SAMPLING).token_ids
            for n in range(3)
        ]
        found, bytes_of[kv] = asyncio.run(through_workers(model, config, topology))
        assert found == expected
    if topology == "1E1P1D":
        assert bytes_of["int4"] < bytes_of["fp8"] < bytes_of["bf16"]


def test_a_worker_that_holds_kv_otherwise_gets_no_request(model: Path) -> None:
    config = EngineConfig(num_blocks=128, max_batched_tokens=64, kv="int4")

    async def scenario() -> None:
        async with (
            asyncio.timeout(60),
            LocalPipeline(str(model), "1E1P1D", config=config) as pipeline,
        ):
            pipeline._config = EngineConfig(num_blocks=128, max_batched_tokens=64, kv="bf16")
            pipeline.start_worker("w9-D")
            members = pipeline.dispatcher.membership
            while "w9-D" not in members.refused:
                await asyncio.sleep(0.01)
            assert members.refused["w9-D"] == "holds the KV of layer 0 as bf16, but w1-P as int4"
            for n in range(4):
                request = Submission(
                    request_id=f"r{n}", prompt_token_ids=prompt(0, 0), images=[],
                    sampling=SAMPLING, salt="", timeout_s=60.0,
                )  # fmt: skip
                tokens, _ = await pipeline.run(request)
                assert len(tokens) == SAMPLING.max_tokens

    asyncio.run(scenario())
