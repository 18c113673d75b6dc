"""A tiny checkpoint, and questions about pictures for the pipeline and for one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epd import LLM, SamplingParams
from epd.config import EngineConfig
from epd.models.tiny import write_tiny_llava, write_tiny_text_tower
from epd.pruning_spec import PruningSpec
from epd.request import Usage
from epd_services.local_pipeline import LocalPipeline

CONFIG = EngineConfig(num_blocks=128, max_batched_tokens=64, max_num_seqs=32)


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Blobs of colour: neighbouring tokens are alike, as in a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
    return np.kron(coarse, np.ones((12, 9, 1), np.uint8)).astype(np.uint8)


class Ask:
    """One question about pictures, for the pipeline and for the oracle."""

    def __init__(self, question: Any, images: list[Any], tokens: int = 12, **spec: Any) -> None:
        self.question = question
        self.images = [picture(i) if isinstance(i, int) else i for i in images]
        self.spec = PruningSpec.parse(spec) if spec else None
        self.sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    def expected(self, llm: LLM) -> list[int]:
        done = llm.chat(
            self.question, images=self.images, sampling=self.sampling, pruning=self.spec
        )
        return done.token_ids

    async def answer(self, pipeline: LocalPipeline) -> tuple[list[int], Usage]:
        request = pipeline.submission(
            self.question, self.images, sampling=self.sampling, pruning=self.spec
        )
        tokens, last = await pipeline.run(request)
        assert last.usage is not None
        return [token.token_id for token in tokens], last.usage


@pytest.fixture(scope="session")
def config() -> EngineConfig:
    return CONFIG


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of 64 vision tokens with a text tower."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_llava(path, seed=3, image_size=56)
    write_tiny_text_tower(path, seed=4)
    return path


@pytest.fixture(scope="session")
def llm(model: Path) -> LLM:
    return LLM(model, config=CONFIG)


@pytest.fixture(scope="session")
def asking() -> type[Ask]:
    return Ask


@pytest.fixture(scope="session")
def go() -> Callable[[Coroutine[object, object, None]], None]:
    """Runs a coroutine, for a minute at most."""

    async def bounded(work: Coroutine[object, object, None]) -> None:
        async with asyncio.timeout(60):
            await work

    return lambda work: asyncio.run(bounded(work))
