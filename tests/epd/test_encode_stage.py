"""The encode stage by itself: what it hands over, and what becomes of what it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from epd.cache.flight import SingleFlight
from epd.cache.memory import MemoryCache
from epd.errors import WireError
from epd.messages import (
    Encoded,
    EncodeFailed,
    EncodeRequest,
    Message,
    VisionTokens,
    VisionTokensReceived,
)
from epd.request import MMItem
from epd.stages import encode as stage_module
from epd.stages.base import Payload, as_tensor
from epd.stages.encode import EncodeStage
from epd.wire import Blob
from epd_pruning.base import VisionInputs

WIDTH, HEIGHT = 3, 2


class Encoder:
    """One token per image: the mean of its channels."""

    def num_tokens(self, width: int, height: int) -> int:
        return 1

    def encode_inputs(
        self, images: Sequence[np.ndarray[Any, Any]], needs: frozenset[str]
    ) -> list[VisionInputs]:
        means = [torch.from_numpy(image.reshape(-1, 3)).float().mean(0) for image in images]
        return [VisionInputs(embeddings=mean[None], grid=(1, 1)) for mean in means]

    def check_needs(self, needs: frozenset[str]) -> None:
        pass


class Host:
    """`refuse` is what posting raises, or False for a peer that cannot be reached."""

    name = "e"

    def __init__(self) -> None:
        self.emitted: list[Message] = []
        self.posted: list[tuple[str, Message, Sequence[Payload]]] = []
        self.sealed_blobs = 0
        self.refuse: Exception | bool = True

    async def sealed(self, blobs: Sequence[Blob]) -> Sequence[Blob]:
        self.sealed_blobs += len(blobs)
        return blobs

    def post(self, to: str, message: Message, payloads: Sequence[Payload] = ()) -> bool:
        if isinstance(self.refuse, Exception):
            raise self.refuse
        self.posted.append((to, message, payloads))
        return self.refuse

    def emit(self, message: Message) -> None:
        self.emitted.append(message)


class Bench:
    def __init__(self) -> None:
        self.host, self.cache = Host(), MemoryCache()
        self.stage = EncodeStage(self.host, Encoder(), SingleFlight(self.cache), clock=lambda: 0.0)

    def ask(self, consumer: str, *, item: int = 0, shade: int = 6) -> None:
        request = EncodeRequest(
            request_id="q", attempt=1, item=item, consumer=consumer, ttl=10.0,
            mm=MMItem(mm_hash=f"{shade}", cache_key=f"k{shade}", width=WIDTH, height=HEIGHT),
        )  # fmt: skip
        pixels = torch.full((HEIGHT, WIDTH, 3), shade, dtype=torch.uint8)
        self.stage.accept("gateway", request, [pixels])

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    task = asyncio.create_task(made.stage.run())
    try:
        yield made
    finally:
        task.cancel()
        await made.stage.stop()


@pytest.mark.parametrize("consumer", ["p", "e"], ids=["another", "itself"])
def test_fresh_and_cached_tokens_are_the_same(consumer: str) -> None:
    async def scenario() -> None:
        async with bench() as b:
            for item in range(2):
                b.ask(consumer, item=item)
                await b.until(lambda n=item: len(b.host.posted) > n)
                received = VisionTokensReceived(request_id="q", attempt=1, item=item)
                b.stage.received(consumer, received, ())
            sent = [as_tensor(payloads[0], "cpu") for _, _, payloads in b.host.posted]
            assert torch.equal(sent[0], torch.full((1, 3), 6.0))
            assert torch.equal(sent[0], sent[1])
            assert [m.cached for m in b.host.emitted if isinstance(m, Encoded)] == [False, True]
            # what was computed here goes to a stage of this worker as it is
            assert b.host.sealed_blobs == (2 if consumer == "p" else 1)

    asyncio.run(scenario())


def test_tokens_are_copied_to_host_memory_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[bool] = []
    whole = stage_module.to_cached

    def watched(tensors: Sequence[torch.Tensor]) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return whole(tensors)

    monkeypatch.setattr(stage_module, "to_cached", watched)

    async def scenario() -> None:
        async with bench() as b:
            b.ask("p")
            await b.until(lambda: b.host.posted)
            assert threads == [False]
            assert isinstance(b.host.posted[0][2][0], Blob)

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("refuse", "code"),
    [
        (WireError("oversized message"), WireError.code),
        (RuntimeError("boom"), "internal_error"),
        (False, "unavailable"),
    ],
)
def test_tokens_that_cannot_be_sent_end_their_image_at_once(
    refuse: Exception | bool, code: str
) -> None:
    async def scenario() -> None:
        async with bench() as b:
            b.host.refuse = refuse
            b.ask("p")
            await b.until(lambda: b.host.emitted)
            (failed,) = b.host.emitted
            assert isinstance(failed, EncodeFailed) and failed.code == code
            await b.until(lambda: not b.stage.queued)
            b.stage.received("p", VisionTokensReceived(request_id="q", attempt=1, item=0), ())
            assert b.host.emitted == [failed], "and it is not reported as done as well"
            b.host.refuse = True
            b.host.posted.clear()
            b.ask("p", shade=7)
            await b.until(lambda: b.host.posted)
            assert isinstance(b.host.posted[0][1], VisionTokens)

    asyncio.run(scenario())
