"""The loop around the core: an attempt that is over changes nothing, and waiting costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from epd.errors import WireError
from epd.kv.handoff import KVHandoff
from epd.messages import KVBlocks, KVOffer, KVPull, PrefillRequest, RequestFailed, Tokens
from epd.request import FinishReason, SamplingParams, TokenOutput
from epd.stages.core_loop import CoreLoop
from epd.stages.kv_source import LEASE_SECONDS, KVSource
from epd.stages.prefill import PrefillStage
from epd.step import CoreStats, SequenceFailure, SequenceToken, StepResult

SAMPLING = SamplingParams(max_tokens=8)


def handoff(rid, first):
    return KVHandoff(
        request_id=rid, prompt_token_ids=[1], output_token_ids=[first], sampling=SAMPLING,
        kv_lengths=[1], next_pos=1, revision="r", num_layers=1, num_kv_heads=1, head_dim=2,
        dtype="float32", layer_group=[0], kv_formats=["float32"],
    )  # fmt: skip


class Core:
    """Prefills what was added, one step each; a step lasts until `go` is set."""

    def __init__(self):
        self.added: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.steps = 0
        self.blocked = False
        self.reason: FinishReason | None = None
        self.failing = False
        self.broken: Exception | None = None
        self.stepping, self.go = threading.Event(), threading.Event()

    def add(self, sequence, vision_tokens):
        self.added[sequence.request_id] = sequence.attempt

    def cancel(self, rid):
        self.added.pop(rid, None)
        self.held.pop(rid, None)

    release = cancel

    def has_work(self):
        return bool(self.added)

    def stats(self):
        return CoreStats(0, 0, 0, 0, 0, 0, 0, 0, 0)

    def step(self):
        self.steps += 1
        if self.blocked:
            return StepResult()
        self.stepping.set()
        assert self.go.wait(10)
        added, self.added = self.added, {}
        names = list(added)
        result = StepResult(num_tokens=len(names))
        if self.failing:
            result.failed = [SequenceFailure(n, added[n], "internal_error", "x") for n in names]
            return result
        tokens = [TokenOutput(0, 100 + added[n], None) for n in names]
        result.tokens = [
            SequenceToken(n, added[n], t, self.reason) for n, t in zip(names, tokens, strict=True)
        ]
        if self.reason is None:
            self.held |= added
            result.handoffs = names
        return result

    def export_kv(self, rid):
        if self.broken is not None:
            raise self.broken
        return []

    def offer(self, rid):
        return handoff(rid, 100 + self.held[rid])


class Host:
    name = "p"

    def __init__(self):
        self.emitted, self.posted = [], []
        self.sealing, self.seal = asyncio.Event(), asyncio.Event()
        self.seal.set()
        self.carries_kv = False

    def emit(self, message):
        self.emitted.append(message)

    async def sealed(self, blobs):
        self.sealing.set()
        await self.seal.wait()
        return blobs

    def post(self, to, message, payloads=()):
        if isinstance(message, KVBlocks) and not self.carries_kv:
            raise WireError("oversized message")
        self.posted.append((to, message))
        return True

    def sent(self, kind):
        return [message for _, message in self.posted if isinstance(message, kind)]

    def told(self, kind):
        return [message for message in self.emitted if isinstance(message, kind)]


class Bench:
    def __init__(self):
        self.now = 0.0
        self.host, self.core = Host(), Core()
        self.loop = CoreLoop(self.host, self.core)
        self.source = KVSource(self.host, self.loop, clock=lambda: self.now)
        self.prefill = PrefillStage(
            self.host, self.loop, None, self.source, clock=lambda: self.now, device="cpu",
            image_token_id=None,
        )  # fmt: skip

    def ask(self, attempt, consumer="d"):
        request = PrefillRequest(
            request_id="q", attempt=attempt, prompt_token_ids=[1], items=[], from_cache=[],
            output_token_ids=[], sampling=SAMPLING, salt="", consumer=consumer, ttl=60.0,
        )  # fmt: skip
        self.prefill.accept("gateway", request, ())

    def cancel(self, attempt):
        for part in (self.prefill, self.source, self.loop):
            part.cancel("q", attempt)

    async def until(self, condition):
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)


@pytest.fixture
def bench():
    @contextlib.asynccontextmanager
    async def running():
        made = Bench()
        task = asyncio.create_task(made.loop.run())
        yield made
        made.core.go.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await made.loop.stop()

    return running


async def overtake(b):
    """The second attempt begins while the first one is computed."""
    b.ask(1)
    await asyncio.to_thread(b.core.stepping.wait, 10)
    b.cancel(1)
    b.ask(2, consumer="d2")
    b.core.go.set()


def test_the_kv_of_an_attempt_that_is_over_is_not_offered(bench):
    async def scenario():
        async with bench() as b:
            await overtake(b)
            await b.until(lambda: b.host.sent(KVOffer))
            await b.until(lambda: not b.core.added)
            offers = [
                (to, m.attempt, m.handoff.output_token_ids)
                for to, m in b.host.posted
                if isinstance(m, KVOffer)
            ]
            assert offers == [("d2", 2, [102])]

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_the_end_of_an_attempt_leaves_the_next_one_alone(bench, end):
    async def scenario():
        async with bench() as b:
            b.core.reason = FinishReason.STOP
            b.core.failing = end == "failed"
            await overtake(b)
            kind = RequestFailed if b.core.failing else Tokens

            def attempts():
                told = b.host.told(kind)
                return [m.attempt if b.core.failing else m.tokens[0].attempt for m in told]

            await b.until(lambda: 2 in attempts())
            assert not b.loop.attempts

    asyncio.run(scenario())


def test_blocked_work_is_looked_at_now_and_then(bench):
    async def scenario():
        async with bench() as b:
            b.core.blocked = True
            b.ask(1)
            await b.until(lambda: b.core.steps)
            b.loop.wake()
            await asyncio.sleep(0.05)
            before = b.core.steps
            await asyncio.sleep(0.3)
            assert b.core.steps - before <= 20
            b.core.blocked = False
            b.core.go.set()
            await b.until(lambda: b.host.sent(KVOffer))

    asyncio.run(scenario())


def test_an_offer_that_nobody_took_up_is_told(bench):
    async def scenario():
        async with bench() as b:
            b.core.go.set()
            b.ask(1)
            await b.until(lambda: b.source.leases)
            b.now += LEASE_SECONDS
            b.source.sweep(lambda _: True)
            (failure,) = b.host.told(RequestFailed)
            assert (failure.attempt, failure.retryable) == (1, True)
            assert not b.source.leases and not b.loop.attempts
            await b.until(lambda: not b.core.held)

    asyncio.run(scenario())


def test_kv_that_cannot_travel_ends_its_request_alone(bench):
    async def scenario():
        async with bench() as b:
            b.core.go.set()
            b.ask(1)
            await b.until(lambda: b.source.leases)
            b.source.pull("d", KVPull(request_id="q", attempt=1), ())
            await b.until(lambda: b.host.told(RequestFailed))
            (failure,) = b.host.told(RequestFailed)
            assert not failure.retryable and "oversized" in failure.message
            assert not b.source.leases
            b.ask(2)
            await b.until(lambda: b.source.leases)

    asyncio.run(scenario())


def test_kv_whose_lease_ended_while_it_was_sealed_is_not_sent(bench):
    async def scenario():
        async with bench() as b:
            b.core.go.set()
            b.host.carries_kv = True
            b.ask(1)
            await b.until(lambda: b.source.leases)
            b.host.seal.clear()
            b.source.pull("d", KVPull(request_id="q", attempt=1), ())
            await asyncio.wait_for(b.host.sealing.wait(), 10)
            b.cancel(1)
            b.ask(2)
            await b.until(lambda: b.source.leases)
            b.host.seal.set()
            await asyncio.sleep(0.02)
            assert not b.host.sent(KVBlocks) and not b.host.told(RequestFailed)
            b.source.pull("d", KVPull(request_id="q", attempt=2), ())
            await b.until(lambda: b.host.sent(KVBlocks))
            assert [m.attempt for m in b.host.sent(KVBlocks)] == [2]

    asyncio.run(scenario())


@pytest.mark.filterwarnings("ignore")
def test_kv_that_cannot_be_copied_ends_its_attempt_at_once(bench):
    async def scenario():
        async with bench() as b:
            b.core.go.set()
            b.core.broken = MemoryError()
            b.ask(1)
            await b.until(lambda: b.source.leases)
            b.source.pull("d", KVPull(request_id="q", attempt=1), ())
            await b.until(lambda: b.host.told(RequestFailed))
            assert b.host.told(RequestFailed)[0].retryable and not b.source.leases

    asyncio.run(scenario())
