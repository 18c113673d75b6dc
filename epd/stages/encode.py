"""The encode stage: pixels in, vision tokens out to the prefill worker that waits for them.

Per image: token cache hit, or exactly one encode among all who ask at once (single-flight),
batched with others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch

from epd.cache.base import CachedTokens
from epd.cache.flight import SingleFlight
from epd.errors import EPDError, UnavailableError
from epd.messages import (
    Encoded,
    EncodeFailed,
    EncodeRequest,
    Returned,
    VisionTokens,
    VisionTokensReceived,
)
from epd.pruning_spec import PruningSpec
from epd.stages.base import Host, Payload, as_tensor
from epd.tensors import to_cached
from epd.vision_pool import ImageEncoder, make_pools
from epd.wire import Blob

__all__ = ["MAX_BATCH", "EncodeStage", "ImageEncoder"]

MAX_BATCH = 8

_log = structlog.get_logger("epd.encode")
Image = np.ndarray[Any, np.dtype[np.uint8]]
Tensors = list[torch.Tensor]
Encoding = tuple[Tensors, CachedTokens]  # the same twice: where it was computed, and as bytes


class _ClosedError(EPDError):
    """The stage takes no more images: this one goes back to the gateway."""


@dataclass(slots=True)
class _Job:
    image: Image
    name: str
    pruning: PruningSpec | None
    done: asyncio.Future[tuple[Encoding, float, float]]
    arrived: float


@dataclass(slots=True)
class _Transfer:
    sent: float
    report: Encoded


class EncodeStage:
    """Serves `EncodeRequest`s.

    Call `run` once; `accept`, `received` and `cancel` are message handlers.
    """

    def __init__(
        self,
        host: Host,
        encoder: ImageEncoder,
        flight: SingleFlight,
        *,
        clock: Callable[[], float],
        max_batch: int = MAX_BATCH,
    ) -> None:
        self.encoded_total = 0
        self._host = host
        self._encoder = encoder
        self._flight = flight
        self._clock = clock
        self._max_batch = max_batch
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._tasks: dict[tuple[str, int, int], asyncio.Task[None]] = {}
        self._transfers: dict[tuple[str, int, int], _Transfer] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._closed = False

    @property
    def queued(self) -> int:
        """Images accepted and not yet handed over."""
        return len(self._tasks)

    def accept(self, sender: str, request: EncodeRequest, payloads: Sequence[Payload]) -> None:
        """Start serving one image; the same (request, attempt, item) twice is served once."""
        key = (request.request_id, request.attempt, request.item)
        image = _checked_image(request, payloads)
        if image is None:
            self._fail(request, "invalid_media", "the image bytes do not match its size")
        elif key not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._serve(request, image))
            self._tasks[key] = task
            task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def received(self, sender: str, ack: VisionTokensReceived, _: Sequence[Payload]) -> None:
        """The consumer has the tokens: report the image as done, with the transfer time."""
        transfer = self._transfers.pop((ack.request_id, ack.attempt, ack.item), None)
        if transfer is None:
            return
        seconds = self._clock() - transfer.sent
        report = transfer.report
        self._host.emit(
            Encoded(
                request_id=report.request_id,
                attempt=report.attempt,
                item=report.item,
                cached=report.cached,
                queue_seconds=report.queue_seconds,
                encode_seconds=report.encode_seconds,
                transfer_seconds=seconds,
            )
        )

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop serving a request; an encode that others wait for goes on."""
        for key, task in list(self._tasks.items()):
            if key[0] == request_id and key[1] <= attempt:
                task.cancel()
        for key in [k for k in self._transfers if k[0] == request_id and k[1] <= attempt]:
            del self._transfers[key]

    def close(self) -> None:
        """Give back the images whose encoding has not begun, and whatever else will ask for it."""
        self._closed = True
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if not job.done.done():
                job.done.set_exception(_ClosedError("the stage ends"))

    def open(self) -> None:
        """Encode again after `close`."""
        self._closed = False

    def hand_back(self) -> None:
        """Give back every image that is not handed over."""
        for (request_id, attempt, item), task in list(self._tasks.items()):
            if not task.done():
                task.cancel()
                self._host.emit(Returned(request_id=request_id, attempt=attempt, items=[item]))

    async def stop(self) -> None:
        """Report what is handed over, forget the rest, end the compute thread; `run` must be
        cancelled.
        """
        for transfer in self._transfers.values():
            self._host.emit(transfer.report)
        self.reset()
        await self._flight.close()
        await asyncio.to_thread(self._thread.shutdown)

    def reset(self) -> None:
        """Forget every request."""
        for task in list(self._tasks.values()):
            task.cancel()
        self._transfers.clear()

    async def _serve(self, request: EncodeRequest, image: Image) -> None:
        started = self._clock()
        fresh: list[tuple[Encoding, float, float]] = []

        async def produce() -> CachedTokens:
            fresh.append(await self._encode(request, image))
            return fresh[0][0][1]

        try:
            async with asyncio.timeout(request.ttl):
                value = await self._flight.run(request.mm.cache_key, produce)
                if fresh:
                    encoding, queued, took = fresh[0]
                    await self._hand_over(request, value, encoding[0], queued, took)
                else:
                    await self._hand_over(request, value, None, self._clock() - started, 0.0)
        except TimeoutError:
            return
        except _ClosedError:
            rid, attempt, item = request.request_id, request.attempt, request.item
            self._host.emit(Returned(request_id=rid, attempt=attempt, items=[item]))
        except EPDError as error:
            self._fail(request, error.code, str(error), getattr(error, "param", None))
        except Exception as error:
            _log.exception("encode failed", request_id=request.request_id)
            self._fail(request, "internal_error", f"the encoder failed ({type(error).__name__})")

    async def _encode(self, request: EncodeRequest, image: Image) -> tuple[Encoding, float, float]:
        if self._closed:
            raise _ClosedError("the stage ends")
        done = asyncio.get_running_loop().create_future()
        job = _Job(image, request.mm.mm_hash, request.pruning, done, self._clock())
        self._jobs.put_nowait(job)
        return await job.done

    async def _hand_over(
        self,
        request: EncodeRequest,
        value: CachedTokens,
        fresh: Tensors | None,
        queued: float,
        took: float,
    ) -> None:
        """Send the tokens to their consumer; `fresh` are those that were encoded here just now."""
        key = (request.request_id, request.attempt, request.item)
        report = Encoded(
            request_id=request.request_id,
            attempt=request.attempt,
            item=request.item,
            cached=fresh is None,
            queue_seconds=queued,
            encode_seconds=took,
            transfer_seconds=0.0,
        )
        message = VisionTokens(
            request_id=request.request_id,
            attempt=request.attempt,
            item=request.item,
            cache_key=request.mm.cache_key,
        )
        began = self._clock()
        payloads: Sequence[Payload] | None = fresh
        if payloads is None or request.consumer != self._host.name:
            payloads = await self._host.sealed([Blob(*part) for part in value.tensors])
        if not self._host.post(request.consumer, message, payloads):
            raise UnavailableError("the prefill worker cannot be reached")
        self._transfers[key] = _Transfer(began, report)

    def _fail(
        self, request: EncodeRequest, code: str, message: str, param: str | None = None
    ) -> None:
        self._host.emit(
            EncodeFailed(
                request_id=request.request_id,
                attempt=request.attempt,
                item=request.item,
                code=code,
                message=message[:512],
                param=param,
            )
        )

    async def run(self) -> None:
        """Encode batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._jobs.get()]
            while len(batch) < self._max_batch and not self._jobs.empty():
                batch.append(self._jobs.get_nowait())
            batch = [job for job in batch if not job.done.cancelled()]
            if batch:
                began = self._clock()
                results = await loop.run_in_executor(self._thread, self._batch, batch)
                self._settle(batch, results, began)

    def _batch(self, batch: list[_Job]) -> list[Encoding | Exception]:
        """One result per job; when a batch fails its members are tried alone, so one cannot
        sink the rest.
        """
        try:
            pools = make_pools(
                self._encoder,
                [job.image for job in batch],
                [job.pruning for job in batch],
                [job.name for job in batch],
            )
            # copied to host memory here: on the event loop that waits for whatever the GPU does
            return [(pool, to_cached(pool)) for pool in pools]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [result for job in batch for result in self._batch([job])]

    def _settle(self, batch: list[_Job], results: list[Encoding | Exception], began: float) -> None:
        seconds = (self._clock() - began) / len(batch)
        for job, result in zip(batch, results, strict=True):
            if job.done.cancelled():
                continue
            if isinstance(result, Exception):
                job.done.set_exception(result)
            else:
                self.encoded_total += 1
                job.done.set_result((result, began - job.arrived, seconds))


def _checked_image(request: EncodeRequest, payloads: Sequence[Payload]) -> Image | None:
    if len(payloads) != 1:
        return None
    pixels = as_tensor(payloads[0], "cpu")
    if pixels.dtype != torch.uint8 or pixels.shape != (request.mm.height, request.mm.width, 3):
        return None
    image: Image = pixels.numpy()
    return image
