"""Bounded image intake: long-lived children decode, the gateway itself never parses an image."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from epd.errors import CapacityError, EPDError, MediaError, UnavailableError
from epd_services.gateway.dispatch_api import ImagePixels
from epd_services.gateway.image_child import REPLY, REQUEST, Status

__all__ = ["DecodeLimits", "ImageDecoder"]

_log = structlog.get_logger(__name__)

_START_SECONDS = 30.0
_MODULE = "epd_services.gateway.image_child"
_INHERITED = frozenset({"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH"})
_REFUSALS = {
    Status.UNREADABLE: "The image is damaged or incomplete.",
    Status.FORMAT: "The image must be a PNG, JPEG, WEBP or GIF.",
    Status.TOO_MANY_PIXELS: "The image has too many pixels.",
    Status.TOO_SMALL: "The image must be at least 2 pixels wide and high.",
    Status.TOO_NARROW: "The image's sides differ by a factor of more than 200.",
    Status.DEEP_TRANSPARENCY: "Transparency of a 16-bit PNG is only supported as an alpha channel.",
    Status.OUT_OF_MEMORY: "The image needs too much memory to decode.",
}
_TOO_SLOW = "The image could not be decoded within its time and memory limits."


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What one decode may cost."""

    seconds: float = 2.0
    memory_bytes: int = 512 << 20
    max_bytes: int = 20 << 20
    max_pixels: int = 40_000_000


class _ChildDied(Exception):
    """The child ended or fell out of step; its caller replaces it."""


class _Child:
    """One decode process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        if process.stdin is None or process.stdout is None:
            raise UnavailableError("the image decoder has no pipes")
        self._in, self._out = process.stdin, process.stdout

    @classmethod
    async def start(cls, limits: DecodeLimits) -> _Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-X", "utf8", "-m", _MODULE,
            str(limits.seconds), str(limits.memory_bytes), str(limits.max_pixels),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, limit=1 << 20, env=_environment(),
        )  # fmt: skip
        child = cls(process)
        try:
            async with asyncio.timeout(_START_SECONDS):
                status, _, _ = await child._reply()
        except (TimeoutError, _ChildDied):
            await child.kill()
            raise UnavailableError("the image decoder does not start") from None
        if status is not Status.READY:
            await child.kill()
            raise UnavailableError("the image decoder does not start")
        return child

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def decode(self, data: bytes, limits: DecodeLimits) -> ImagePixels:
        """The pixels of `data`. Raises `MediaError` when refused, `_ChildDied` otherwise."""
        try:
            self._in.write(REQUEST.pack(len(data)))
            self._in.write(data)
            await self._in.drain()
        except OSError:
            raise _ChildDied from None
        status, width, height = await self._reply()
        if status is not Status.OK:
            raise MediaError(_REFUSALS.get(status, _TOO_SLOW), "messages")
        if not 0 < width * height <= limits.max_pixels:
            raise _ChildDied
        return ImagePixels(width, height, await self._read(3 * width * height))

    async def _reply(self) -> tuple[Status, int, int]:
        status, width, height = REPLY.unpack(await self._read(REPLY.size))
        try:
            return Status(status), width, height
        except ValueError:
            raise _ChildDied from None

    async def _read(self, count: int) -> bytes:
        try:
            return await self._out.readexactly(count)
        except (asyncio.IncompleteReadError, OSError):
            raise _ChildDied from None

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._in.close()
        await self._process.wait()


@dataclass(slots=True)
class _Job:
    data: bytes
    result: asyncio.Future[ImagePixels]


class ImageDecoder:
    """`children` processes that decode one image at a time; a dead one is replaced.

    A decode whose caller has gone is skipped, or finished and dropped, so that the child stays in
    step. `observe` hears the seconds and outcome of each decode.
    """

    def __init__(
        self,
        limits: DecodeLimits,
        *,
        children: int = 2,
        queue_size: int = 1024,
        observe: Callable[[float, str], None] = lambda _seconds, _outcome: None,
    ) -> None:
        self._limits = limits
        self._children = children
        self._queue_size = queue_size
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(queue_size)
        self._observe = observe
        self._loops: list[asyncio.Task[None]] = []
        self.restarts = 0

    async def start(self) -> None:
        """Start the children and wait until each can decode."""
        self._jobs = asyncio.Queue(self._queue_size)
        children = await asyncio.gather(
            *(_Child.start(self._limits) for _ in range(self._children))
        )
        self._loops = [asyncio.create_task(self._serve(child)) for child in children]

    async def close(self) -> None:
        """Stop the children; waiting jobs fail."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._loops.clear()
        while not self._jobs.empty():
            _fail(self._jobs.get_nowait(), UnavailableError("The service is stopping."))

    async def decode(self, data: bytes) -> ImagePixels:
        """The canonical pixels of an encoded image. Raises `MediaError` or `CapacityError`."""
        if not data:
            raise MediaError("The image is empty.", "messages")
        if len(data) > self._limits.max_bytes:
            raise MediaError("The image has too many bytes.", "messages")
        if not self._loops:
            raise UnavailableError("The image decoder is not running.")
        job = _Job(data, asyncio.get_running_loop().create_future())
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            raise CapacityError("Too many images wait to be decoded.") from None
        try:
            return await job.result
        finally:
            job.data = b""  # who left is skipped in the queue, and its bytes are counted no more

    async def _serve(self, child: _Child | None) -> None:
        try:
            while True:
                job = await self._jobs.get()
                if job.result.done():
                    continue
                if child is None or not child.alive:
                    child = await self._replace(child, job)
                if child is not None and not await self._run(child, job):
                    await child.kill()
        finally:
            if child is not None:
                await asyncio.shield(child.kill())

    async def _replace(self, child: _Child | None, job: _Job) -> _Child | None:
        """A fresh child; None, with the job failed, when none can be had."""
        self.restarts += 1
        _log.warning("image_child_replaced", restarts=self.restarts)
        if child is not None:
            await child.kill()
        try:
            return await _Child.start(self._limits)
        except Exception as error:
            if not isinstance(error, OSError | EPDError):
                _log.exception("image_child_failed")
            _fail(job, UnavailableError("The image decoder does not start."))
            return None

    async def _run(self, child: _Child, job: _Job) -> bool:
        """Whether the child is still in step after this job."""
        began = time.perf_counter()
        outcome, in_step = "ok", True
        try:
            async with asyncio.timeout(self._limits.seconds):
                pixels = await child.decode(job.data, self._limits)
            if not job.result.done():
                job.result.set_result(pixels)
        except MediaError as error:
            outcome = "refused"
            _fail(job, error)
        except (_ChildDied, TimeoutError):
            outcome, in_step = "killed", False
            _fail(job, MediaError(_TOO_SLOW, "messages"))
        except asyncio.CancelledError:
            _fail(job, UnavailableError("The service is stopping."))
            raise
        except Exception:
            # without this loop the images that follow would wait for ever
            _log.exception("image_decode_failed")
            outcome, in_step = "failed", False
            _fail(job, EPDError("the image could not be decoded"))
        self._observe(time.perf_counter() - began, outcome)
        return in_step


def _environment() -> dict[str, str]:
    """What Python needs to start; a process that parses strangers' files gets no more."""
    return {name: value for name, value in os.environ.items() if name in _INHERITED}


def _fail(job: _Job, error: EPDError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
