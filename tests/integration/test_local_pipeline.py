"""The pipeline on one event loop: same tokens as one core, whatever the topology, cache or
accident.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import numpy as np
import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.errors import CapacityError, DeadlineError, EPDError, UnavailableError
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder
from epd.request import SamplingParams
from epd_services.gateway.dispatch_api import ImagePixels, Submission
from epd_services.gateway.dispatcher import DispatchLimits
from epd_services.local_pipeline import LocalPipeline

CONFIG = EngineConfig(num_blocks=128, max_batched_tokens=64, max_num_seqs=32)
_ids = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=3, num_kv_heads=2)


def picture(seed: int) -> ImagePixels:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2)
    return ImagePixels(int(width), int(height), rng.bytes(int(3 * width * height)))


def submission(card: ModelCard, images: list[ImagePixels], **sampling: object) -> Submission:
    marks: list[int] = []
    for number, _ in enumerate(images):
        marks += [20 + number, card.image_token_id or 0]
    params = {"max_tokens": 32, "ignore_eos": True} | sampling
    return Submission(
        request_id=f"r{next(_ids)}", prompt_token_ids=[1, *marks, 30, 31, 32, 33], images=images,
        sampling=SamplingParams(**params), salt="", timeout_s=60.0,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle(model: Path) -> Callable[[Submission], list[int]]:
    """The answer of one core that does everything itself."""
    card = ModelCard.load(model)
    encoder = VisionEncoder.load(card, "cpu", torch.float32)
    decoder = Decoder.load(card, "cpu", torch.float32)

    def answer(request: Submission) -> list[int]:
        core = EngineCore(decoder, card, config=CONFIG, device="cpu")
        arrays = [
            np.frombuffer(i.rgb, np.uint8).reshape(i.height, i.width, 3) for i in request.images
        ]
        tokens = [encoder.encode([array])[0] for array in arrays]
        core.add(
            NewSequence(
                request_id="o", attempt=1, prompt_token_ids=request.prompt_token_ids,
                image_token_id=card.image_token_id, mm_keys=[f"k{n}" for n in range(len(tokens))],
                sampling=request.sampling, output_token_ids=[],
            ),
            tokens,
        )  # fmt: skip
        ids = []
        while core.has_work():
            ids += [t.output.token_id for t in core.step().tokens]
        return ids

    return answer


def go(work: Coroutine[object, object, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(bounded())


async def answers(pipeline: LocalPipeline, requests: list[Submission]) -> list[list[int]]:
    results = await asyncio.gather(*(pipeline.run(request) for request in requests))
    for tokens, _ in results:
        assert [t.index for t in tokens] == list(range(len(tokens)))
    return [[t.token_id for t in tokens] for tokens, _ in results]


def mixed(card: ModelCard) -> list[Submission]:
    """No, one and several distinct images, and the same two in both orders."""
    a, b, c = picture(1), picture(2), picture(3)
    groups = [[], [a], [a, b], [b, a], [a, b, c], [c], []]
    return [submission(card, images) for images in groups]


@pytest.mark.parametrize("topology", ["1E1P1D", "3E2P2D", "1E1PD", "1EPD", "1EP1D", "2EPD"])
def test_every_topology_gives_the_oracles_tokens_cold_and_warm(
    model: Path, oracle: Callable[[Submission], list[int]], topology: str
) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), topology, config=CONFIG) as pipeline:
            requests = mixed(pipeline.card)
            expected = [oracle(request) for request in requests]
            assert expected[2] != expected[3]
            assert await answers(pipeline, requests) == expected
            warm = mixed(pipeline.card)
            assert await answers(pipeline, warm) == expected
            await no_leaks(pipeline)

    go(run())


async def no_leaks(pipeline: LocalPipeline) -> None:
    """Every block, lease and queue is back where it started."""
    for _ in range(100):
        stats = [worker.stats() for worker in pipeline.workers.values()]
        if all(s.blocks_free == s.blocks_total and not s.running and not s.kv_leases
               and not s.encode_queue and not s.prefill_waiting and not s.handoff_queue
               for s in stats):  # fmt: skip
            return
        await asyncio.sleep(0.02)
    raise AssertionError(stats)


def test_a_repeated_image_is_encoded_once_and_then_never_again(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "2E1P1D", config=CONFIG) as pipeline:
            same = [submission(pipeline.card, [picture(7)], max_tokens=2) for _ in range(100)]
            first = await answers(pipeline, same)
            assert all(ids == first[0] for ids in first)
            encoded = sum(w.stats().encoded_total for w in pipeline.workers.values())
            assert encoded == 1
            await answers(pipeline, [submission(pipeline.card, [picture(7)], max_tokens=2)])
            assert sum(w.stats().encoded_total for w in pipeline.workers.values()) == 1

    go(run())


def test_text_only_requests_never_touch_an_encoder(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            await pipeline.kill("w0-E")
            await answers(pipeline, [submission(pipeline.card, [])])

    go(run())


def test_images_of_one_request_spread_over_all_encoders(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "3E1P1D", config=CONFIG) as pipeline:
            images = [picture(seed) for seed in range(3)]
            await answers(pipeline, [submission(pipeline.card, images, max_tokens=2)])
            done = [w.stats().encoded_total for n, w in pipeline.workers.items() if n[-1] == "E"]
            assert done == [1, 1, 1]

    go(run())


@pytest.mark.parametrize("victim", ["w0-E", "w2-P", "w4-D"])
@pytest.mark.parametrize("after", [0, 3, 12])
def test_losing_a_worker_with_a_peer_alive_changes_no_token(
    model: Path, oracle: Callable[[Submission], list[int]], victim: str, after: int
) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "2E2P2D", config=CONFIG) as pipeline:
            requests = mixed(pipeline.card)
            expected = [oracle(request) for request in requests]
            running = asyncio.create_task(answers(pipeline, requests))
            seen = 0
            while seen < after and not running.done():
                await asyncio.sleep(0.002)
                seen = max((len(r.outputs) for r in pipeline.dispatcher._attempts.records.values()),
                           default=after)  # fmt: skip
            await pipeline.kill(victim)
            assert await running == expected
            await no_leaks(pipeline)

    go(run())


@pytest.mark.parametrize("victim", ["w0-E", "w1-P", "w2-D"])
def test_losing_the_only_worker_of_a_stage_is_a_typed_error_soon(model: Path, victim: str) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            await pipeline.kill(victim)
            asked = asyncio.get_running_loop().time()
            with pytest.raises(EPDError) as caught:
                await pipeline.run(submission(pipeline.card, [picture(1)], max_tokens=400))
            assert caught.value.status == 503
            assert asyncio.get_running_loop().time() - asked < 3.0
            assert not pipeline.dispatcher.ready()[0]
            pipeline.start_worker(victim)
            while not pipeline.dispatcher.ready()[0]:
                await asyncio.sleep(0.01)
            await answers(pipeline, [submission(pipeline.card, [picture(1)])])

    go(run())


def test_cancelling_gives_back_every_block(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            for wait in (0.0, 0.01, 0.05, 0.2):
                generation = pipeline.dispatcher.submit(
                    submission(pipeline.card, [picture(1), picture(2)], max_tokens=900)
                )
                await asyncio.sleep(wait)
                generation.cancel()
                generation.cancel()
            await no_leaks(pipeline)
            assert pipeline.dispatcher.counters["cancelled"] == 4

    go(run())


def test_a_deadline_ends_the_request_in_every_stage(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            request = submission(pipeline.card, [picture(1)], max_tokens=1500)
            late = Submission(**{
                name: getattr(request, name) for name in Submission.__dataclass_fields__
            } | {"timeout_s": 0.3})  # fmt: skip
            started = asyncio.get_running_loop().time()
            with pytest.raises(DeadlineError):
                await pipeline.run(late)
            assert asyncio.get_running_loop().time() - started < 0.6
            await no_leaks(pipeline)

    go(run())


def test_a_full_ledger_answers_429_and_loses_nobody(model: Path) -> None:
    async def run() -> None:
        limits = DispatchLimits(max_inflight=20)
        pipeline = LocalPipeline(str(model), "1E1P1D", config=CONFIG, limits=limits)
        async with pipeline:
            results = await asyncio.gather(
                *(pipeline.run(submission(pipeline.card, [picture(n % 5)], max_tokens=4))
                  for n in range(50)),
                return_exceptions=True,
            )  # fmt: skip
            shed = [r for r in results if isinstance(r, CapacityError)]
            assert len(shed) == 30
            assert all(e.retry_after > 0 for e in shed)
            assert sum(isinstance(r, tuple) for r in results) == 20

    go(run())


def test_few_blocks_on_the_decode_worker_delay_but_change_nothing(
    model: Path, oracle: Callable[[Submission], list[int]]
) -> None:
    async def run() -> None:
        tight = EngineConfig(num_blocks=14, block_size=16, max_batched_tokens=64)
        async with LocalPipeline(str(model), "1E1P1D", config=tight) as pipeline:
            requests = [submission(pipeline.card, [picture(n)], max_tokens=48) for n in range(6)]
            expected = [oracle(request) for request in requests]
            assert await answers(pipeline, requests) == expected
            await no_leaks(pipeline)

    go(run())


def test_offers_refused_for_want_of_room_are_asked_again_when_nothing_runs(model: Path) -> None:
    async def run() -> None:
        narrow = EngineConfig(num_blocks=128, max_batched_tokens=64, max_num_seqs=2)
        async with LocalPipeline(str(model), "1E1P1D", config=narrow) as pipeline:
            requests = [submission(pipeline.card, [picture(7)], max_tokens=2) for _ in range(40)]
            assert {len(ids) for ids in await answers(pipeline, requests)} == {2}
            await no_leaks(pipeline)

    go(run())


def test_draining_refuses_new_and_finishes_old(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1EPD", config=CONFIG) as pipeline:
            old = asyncio.create_task(pipeline.run(submission(pipeline.card, [picture(1)])))
            await asyncio.sleep(0.01)
            stopping = asyncio.create_task(pipeline.dispatcher.stop())
            await asyncio.sleep(0)
            assert pipeline.dispatcher.ready() == (False, "draining")
            with pytest.raises(UnavailableError):
                pipeline.dispatcher.submit(submission(pipeline.card, []))
            tokens, _ = await old
            assert len(tokens) == 32
            await stopping

    go(run())


async def stream(pipeline: LocalPipeline, request: Submission) -> AsyncIterator[int]:
    async for event in pipeline.dispatcher.submit(request):
        for token in event.tokens:
            yield token.token_id


def test_timings_and_usage_come_with_the_last_event(model: Path) -> None:
    async def run() -> None:
        async with LocalPipeline(str(model), "1E1P1D", config=CONFIG) as pipeline:
            _, last = await pipeline.run(submission(pipeline.card, [picture(1), picture(2)]))
            assert last.timings is not None
            assert last.usage is not None
            assert {"encode", "transfer", "prefill", "ttft", "tpot", "total"} <= set(last.timings)
            assert last.timings["encode"] > 0
            assert last.usage.image_tokens == 32
            assert last.usage.prompt_tokens == 32 + 7
            assert last.usage.completion_tokens == 32

    go(run())
