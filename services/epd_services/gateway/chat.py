"""From the body of a chat completion to its answer: parse, decode, tokenise, submit, reply."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.types import Send
from tokenizers import Tokenizer

from epd.detokenize import Detokenizer
from epd.errors import CapacityError, DeadlineError, InvalidRequestError
from epd.models.card import ModelCard
from epd.queries import image_queries
from epd_services.gateway.answer import Answer
from epd_services.gateway.auth import combine_salts
from epd_services.gateway.dispatch_api import Dispatcher, ImagePixels, Submission
from epd_services.gateway.errors import NotFoundError
from epd_services.gateway.fetch import ImageFetcher
from epd_services.gateway.images import ImageDecoder
from epd_services.gateway.intake import Lease
from epd_services.gateway.media import image_bytes
from epd_services.gateway.metrics import Exchange, GatewayMetrics
from epd_services.gateway.reply import Reply
from epd_services.gateway.schemas import ChatRequest, ImagePart, Message, parse_chat_request
from epd_services.gateway.settings import GatewaySettings

__all__ = ["Call", "ChatService", "Formatter"]

A = TypeVar("A")
R = TypeVar("R")

# above this, parsing would hold up every other request for milliseconds
_THREAD_BYTES = 256 * 1024


class Formatter(Protocol):
    """Messages to token ids: `epd.chat.ChatFormatter`."""

    @property
    def card(self) -> ModelCard:
        """The checkpoint's facts."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        ...

    def tokenize(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt with one placeholder token per image."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP call, as far as the service knows it. `arrived` is on the service's clock."""

    shown_id: str
    body: bytes
    salt: str
    deadline_s: float | None
    arrived: float
    lease: Lease
    send: Send


class ChatService:
    """Answers chat completions. Everything it talks to is a constructor argument."""

    def __init__(
        self,
        settings: GatewaySettings,
        dispatcher: Dispatcher,
        formatter: Formatter,
        decoder: ImageDecoder,
        metrics: GatewayMetrics,
        *,
        fetcher: ImageFetcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._pruning = settings.pruning_policy(formatter.card)
        self._dispatcher = dispatcher
        self._formatter = formatter
        self._decoder = decoder
        self._metrics = metrics
        self._fetcher = fetcher
        self._clock = clock

    @property
    def model_name(self) -> str:
        """The name the model is served under."""
        return self._settings.model_name or self._formatter.card.name

    async def answer(self, call: Call) -> None:
        """Send the answer. Raises `EPDError` as long as nothing was sent."""
        request = await _off_loop(len(call.body), parse_chat_request, call.body)
        self._check(request)
        deadline = call.arrived + self._seconds(request, call)
        try:
            async with asyncio.timeout(deadline - self._clock()):
                submission = await self._prepare(request, call, deadline)
        except TimeoutError:
            raise DeadlineError("The request's deadline passed.") from None
        await self._run(request, submission, call, deadline)

    def _check(self, request: ChatRequest) -> None:
        if request.model is not None and request.model != self.model_name:
            raise NotFoundError(
                "That model is not served here; GET v1/models lists what is.", "model"
            )
        images = len(request.images)
        if images > self._settings.max_images:
            limit = self._settings.max_images
            raise InvalidRequestError(f"A request takes at most {limit} images.", "messages")
        if images and not self._formatter.card.has_vision:
            raise InvalidRequestError("This model takes no images.", "messages")

    def _seconds(self, request: ChatRequest, call: Call) -> float:
        """The request's time limit; the client may only lower it."""
        wanted = (self._settings.request_seconds, request.timeout, call.deadline_s)
        return min(seconds for seconds in wanted if seconds is not None)

    async def _prepare(self, request: ChatRequest, call: Call, deadline: float) -> Submission:
        sampling = request.sampling(
            max_tokens=self._settings.default_max_tokens,
            temperature=self._settings.default_temperature,
        )
        pruning = self._pruning.resolve(request.pruning) if request.images else None
        ids = await self._tokenize(request)
        return Submission(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=ids,
            images=await self._decode(request, call),
            sampling=sampling,
            salt=combine_salts(call.salt, request.cache_salt),
            timeout_s=max(deadline - self._clock(), 0.001),
            pruning=pruning,
            queries=_queries(request, pruning.turns) if pruning is not None else [],
        )

    async def _tokenize(self, request: ChatRequest) -> list[int]:
        chars = sum(len(getattr(p, "text", "")) for m in request.messages for p in m.parts)
        if chars > self._settings.max_prompt_chars:
            raise InvalidRequestError("The prompt is too long.", "messages")
        messages = [_plain(message) for message in request.messages]
        ids = await _off_loop(chars, self._formatter.tokenize, messages)
        if len(ids) >= self._formatter.card.max_position:
            raise InvalidRequestError("The prompt is longer than the model's context.", "messages")
        return ids

    async def _decode(self, request: ChatRequest, call: Call) -> list[ImagePixels]:
        """Every image's pixels. Once one is refused, nothing goes on for the others."""
        tasks = [asyncio.create_task(self._pixels(part.url, call)) for part in request.images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # one that went on would take from a budget that was given back
            for task in tasks:
                task.cancel()

    async def _pixels(self, url: str, call: Call) -> ImagePixels:
        limit = self._settings.max_image_bytes
        data = await image_bytes(url, limit, self._fetcher, call.lease.take)
        pixels = await self._decoder.decode(data)
        call.lease.take(len(pixels.rgb))
        return pixels

    async def _run(
        self, request: ChatRequest, submission: Submission, call: Call, deadline: float
    ) -> None:
        intake = self._clock() - call.arrived
        try:
            generation = self._dispatcher.submit(submission)
        except CapacityError:
            self._metrics.shed.labels("queue_full").inc()
            raise
        self._metrics.observe("request_max_num_generation_tokens", submission.sampling.max_tokens)
        exchange = Exchange(self._metrics, self._clock, arrived=call.arrived)
        answer = Answer(
            generation,
            Detokenizer(self._formatter.tokenizer, submission.sampling.stop),
            exchange,
            prompt_tokens=len(submission.prompt_token_ids),
            timings={"intake": intake},
        )
        reply = Reply(
            request,
            answer,
            request_id=submission.request_id,
            shown_id=call.shown_id,
            model=self.model_name,
            tokenizer=self._formatter.tokenizer,
            settings=self._settings,
            metrics=self._metrics,
        )
        try:
            await reply.send(call.send, deadline - self._clock())
        finally:
            if answer.cancel():
                self._metrics.cancelled.labels("disconnect").inc()
            exchange.close()


async def _off_loop(size: int, function: Callable[[A], R], argument: A) -> R:
    """The result of `function`, computed in a thread when `size` says that it takes long."""
    if size > _THREAD_BYTES:
        return await asyncio.to_thread(function, argument)
    return function(argument)


def _queries(request: ChatRequest, turns: str) -> list[str]:
    return image_queries([_plain(message) for message in request.messages], turns)


def _plain(message: Message) -> dict[str, Any]:
    """A message as the formatter takes it: images are marks, their pixels travel beside."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = [
        {"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": p.text}
        for p in message.content
    ]
    return {"role": message.role, "content": parts}
