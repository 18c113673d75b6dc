"""The whole pipeline on one event loop, over in-memory inboxes: for tests and for trying things
out.

Stages, worker, wire and dispatcher are the real ones; only processes and sockets are missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch

from epd.cache.base import TokenCache
from epd.cache.memory import MemoryCache
from epd.chat import ChatFormatter
from epd.config import EngineConfig
from epd.conversation import Conversation, as_messages, place_images
from epd.failpoints import Failpoints
from epd.images import ImageInput, rgb_array
from epd.membership import Membership
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.vision import VisionEncoder
from epd.node import GATEWAY, Identity, Node
from epd.pruning_policy import PruningPolicy
from epd.pruning_spec import PruningSpec
from epd.queries import image_queries
from epd.request import FinishReason, SamplingParams, TokenOutput
from epd.roles import format_stages, parse_stages, parse_topology
from epd.transport import InMemoryTransport
from epd.wire import Codec, Frame
from epd.worker import ServedModel, Worker
from epd_services.gateway.dispatch_api import ImagePixels, Submission, TokensEvent
from epd_services.gateway.dispatcher import DispatchLimits, PipelineDispatcher
from epd_services.gateway.roles import SwitchLimits
from epd_services.stage_loader import ModelLoader

__all__ = ["LocalPipeline"]


class LocalPipeline:
    """An async context manager around a dispatcher and the workers of a topology.

    `cache` is shared by all of them, as Redis would be; weights are loaded once. `failpoints` are
    those of the workers that start after it is set.
    """

    def __init__(
        self,
        model: str,
        topology: str,
        *,
        config: EngineConfig | None = None,
        cache: TokenCache | None = None,
        limits: DispatchLimits | None = None,
        pruning: PruningPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        switch_limits: SwitchLimits | None = None,
        commit_seconds: float = 10.0,
    ) -> None:
        self.card = ModelCard.load(model)
        self.workers: dict[str, Worker] = {}
        self.failpoints = Failpoints()
        self._commit_seconds = commit_seconds
        self._stages = parse_topology(topology)
        self._config = config or EngineConfig(num_blocks=256, max_batched_tokens=512)
        self._cache = cache or MemoryCache()
        self._clock = clock
        self._network: dict[str, asyncio.Queue[list[Frame]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lives = itertools.count(1)
        self._encoder = VisionEncoder.load(self.card, "cpu", torch.float32)
        self._decoder = Decoder.load(self.card, "cpu", torch.float32)
        self._formatter = ChatFormatter(self.card)
        self.dispatcher = PipelineDispatcher(
            self._node(GATEWAY, ""),
            Membership(self.card.revision, clock),
            self._cache,
            clock=clock,
            limits=limits,
            pruning=pruning,
            switch_limits=switch_limits,
        )

    def _node(self, name: str, stages: str) -> Node:
        identity = Identity(name, next(self._lives), stages)
        return Node(identity, InMemoryTransport(name, self._network), Codec())

    async def __aenter__(self) -> LocalPipeline:
        await self.dispatcher.start()
        for number, stages in enumerate(self._stages):
            self.start_worker(f"w{number}-{format_stages(stages)}")
        while not self.dispatcher.ready()[0]:
            await asyncio.sleep(0.01)
        return self

    def start_worker(self, name: str) -> Worker:
        """Start (again) the worker called `wN-STAGES`."""
        letters = name.rpartition("-")[2]
        card = self.card
        loader = ModelLoader(
            card, device="cpu", dtype=torch.float32, config=self._config,
            encoder=lambda: self._encoder, decoder=lambda: self._decoder,
        )  # fmt: skip
        loader.load(parse_stages(letters))
        worker = Worker(
            self._node(name, letters),
            ServedModel(card.revision, card.encoder_revision, "float32", card.image_token_id),
            gateway=GATEWAY,
            cache=self._cache,
            loader=loader,
            clock=self._clock,
            heartbeat=0.05,
            commit_seconds=self._commit_seconds,
            failpoints=self.failpoints,
        )
        self.workers[name] = worker
        self._tasks[name] = asyncio.get_running_loop().create_task(worker.run())
        return worker

    async def kill(self, name: str) -> None:
        """End a worker without a word, as `kill -9` would."""
        task = self._tasks.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._network.pop(name, None)
        del self.workers[name]

    def submission(
        self,
        conversation: Conversation,
        images: Sequence[ImageInput] = (),
        *,
        sampling: SamplingParams | None = None,
        pruning: PruningSpec | None = None,
        salt: str = "",
    ) -> Submission:
        """What the gateway would submit for a conversation as `LLM.chat` takes it."""
        messages, placed = place_images(as_messages(conversation), list(images))
        arrays = [rgb_array(image) for image in placed]
        return Submission(
            request_id=f"local-{next(self._lives)}",
            prompt_token_ids=self._formatter.tokenize(messages),
            images=[ImagePixels(a.shape[1], a.shape[0], a.tobytes()) for a in arrays],
            sampling=sampling or SamplingParams(),
            salt=salt,
            timeout_s=60.0,
            pruning=pruning,
            queries=image_queries(messages, pruning.turns) if pruning is not None else [],
        )

    async def run(self, submission: Submission) -> tuple[list[TokenOutput], TokensEvent]:
        """All tokens of one request, and its last event. Raises what the request ended in."""
        tokens: list[TokenOutput] = []
        last = TokensEvent([])
        async for event in self.dispatcher.submit(submission):
            tokens += event.tokens
            last = event
        assert isinstance(last.finish_reason, FinishReason)
        return tokens, last

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.dispatcher.stop()
        for name in list(self._tasks):
            await self.kill(name)
