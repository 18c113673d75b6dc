"""The dispatcher: sends each request through the stages and owns it until its one terminal state.

Dispatch is at least once with a rising attempt number; workers forget older attempts, and tokens
of an older attempt or out of turn are dropped here, so a client sees every token once. When a
worker is lost, what it was doing starts again on a peer from the tokens already produced; with no
peer the request ends at once in a typed error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog

from epd.cache.base import TokenCache
from epd.errors import CapacityError, InvalidRequestError, UnavailableError
from epd.membership import Change, Membership
from epd.messages import Heartbeat, Leaving, Peers
from epd.node import Node
from epd.pruning_policy import PruningPolicy
from epd.request import Request, RequestTimeline
from epd.roles import Stage, StageSet, format_stages, format_topology
from epd.wire import Blob, Envelope
from epd_services.gateway.attempts import Attempts, DispatchLimits
from epd_services.gateway.dispatch_api import Generation, Submission
from epd_services.gateway.ledger import LedgerGeneration, Record
from epd_services.gateway.reports import Reports
from epd_services.gateway.roles import SwitchCoordinator, SwitchLimits

__all__ = ["DispatchLimits", "PipelineDispatcher"]

_log = structlog.get_logger("epd.dispatch")


class PipelineDispatcher:
    """The `Dispatcher` over ZeroMQ (or any `Transport`) and a shared token cache.

    `roles` switches the roles of its workers; `failpoint` is told the steps of a switch by name.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        cache: TokenCache | None,
        *,
        clock: Callable[[], float],
        limits: DispatchLimits | None = None,
        pruning: PruningPolicy | None = None,
        switch_limits: SwitchLimits | None = None,
        failpoint: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._node = node
        self._pruning = pruning
        self._membership = membership
        self._cache = cache
        self._clock = clock
        self._limits = limits or DispatchLimits()
        self._attempts = Attempts(
            node,
            membership,
            cache,
            clock=clock,
            limits=self._limits,
            on_unreachable=lambda name: self._apply(membership.lost(name)),
        )
        self.roles = SwitchCoordinator(
            node,
            membership,
            self._attempts,
            clock=clock,
            limits=switch_limits,
            failpoint=failpoint,
        )
        self._services: list[asyncio.Task[None]] = []
        self._draining = False
        Reports(node, self._attempts, max_failures=self._limits.max_failures)
        node.on(Heartbeat, self._heartbeat)
        node.on(Leaving, self._leaving)

    @property
    def counters(self) -> Counter[str]:
        """What happened so far, by name."""
        return self._attempts.counters

    @property
    def attempts(self) -> Attempts:
        """The requests in flight."""
        return self._attempts

    @property
    def membership(self) -> Membership:
        """The live workers."""
        return self._membership

    @property
    def cache(self) -> TokenCache | None:
        """The token cache that all workers share, if they do."""
        return self._cache

    async def start(self) -> None:
        """Begin to listen and to watch the workers."""
        self._services = [asyncio.create_task(self._node.run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Refuse new requests, let the rest end within the drain limit, then end them as
        unavailable.
        """
        self._draining = True
        until = self._clock() + self._limits.drain
        while self._attempts.records and self._clock() < until:
            await asyncio.sleep(0.02)
        for record in list(self._attempts.records.values()):
            self._attempts.end(record, UnavailableError("the service is shutting down"))
        services, self._services = self._services, []
        if not services:
            return
        for task in services:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._attempts.stop()
        self._node.close()
        if self._cache is not None:
            await self._cache.close()

    def ready(self) -> tuple[bool, str]:
        """Whether every stage has a live worker, and if not which is missing."""
        if self._draining:
            return False, "draining"
        for stage in Stage:
            if not any(w.accepting for w in self._membership.hosting(stage)):
                return False, f"no live worker hosts {stage.name.lower()}"
        return True, "ready"

    def submit(self, submission: Submission) -> Generation:
        """Enter a request in the ledger and start it.

        Raises when full, draining, or a stage has no worker.
        """
        if self._draining:
            raise UnavailableError("the service is draining")
        if submission.request_id in self._attempts.records:
            raise InvalidRequestError("a request with this id is in flight", "request_id")
        if len(self._attempts.records) >= self._limits.max_inflight:
            self.counters["shed"] += 1
            raise CapacityError("too many requests in flight", retry_after=1.0)
        self._attempts.router.may_serve(Stage.PREFILL, Stage.DECODE)
        now = self._clock()
        request = Request(
            request_id=submission.request_id,
            prompt_token_ids=submission.prompt_token_ids,
            sampling=submission.sampling,
            salt=submission.salt,
        )
        record = Record(
            request,
            submission.images,
            now + submission.timeout_s,
            RequestTimeline(self._clock),
            pruning=submission.pruning if submission.images else None,
            queries=submission.queries,
            budget=self._budget(submission),
        )
        self._attempts.start(record)
        return LedgerGeneration(record, self._attempts.cancel)

    def _budget(self, submission: Submission) -> int | None:
        """Tokens per image when the ledger is so full that the request gets fewer than asked."""
        if submission.pruning is None or self._pruning is None:
            return None
        load = len(self._attempts.records) / self._limits.max_inflight
        return self._pruning.budget(submission.pruning, load)

    def pipeline(self) -> dict[str, Any]:
        """Workers, queues and counters, for people and for the page."""
        now = self._clock()
        workers = [
            {
                "name": w.worker_id,
                "stages": format_stages(w.stages),
                "epoch": w.epoch,
                "life": str(w.incarnation),
                "state": self.roles.state(w),
                "heartbeat_age_s": round(now - w.last_seen, 3),
                **{name: getattr(w.stats, name) for name in w.stats.__struct_fields__},
            }
            for w in sorted(
                self._membership.workers.values(),
                key=lambda w: (_stage_order(w.stages), w.worker_id),
            )
        ]
        return {
            "topology": format_topology(
                sorted((w.stages for w in self._membership.workers.values()), key=_stage_order)
            ),
            "ready": self.ready()[0],
            "inflight": len(self._attempts.records),
            "workers": workers,
            "refused": dict(self._membership.refused),
            "token_cache": {
                "queries": sum(w["cache_queries"] for w in workers),
                "hits": sum(w["cache_hits"] for w in workers),
            },
            "counters": {**self.counters, "stale_epochs": self._membership.stale_epochs},
            "frames_rejected": dict(self._node.rejected),
        }

    def _heartbeat(self, envelope: Envelope, message: Heartbeat, _: tuple[Blob, ...]) -> None:
        told = self._membership.refused.get(envelope.sender)
        self._apply(self._membership.heard(envelope, message))
        why = self._membership.refused.get(envelope.sender)
        if why is not None and why != told:
            _log.warning("worker refused", worker=envelope.sender, why=why)
        known = self._membership.workers.get(envelope.sender)
        if known and (known.incarnation, known.epoch) == (envelope.incarnation, envelope.epoch):
            self.roles.heard(envelope, message)

    def _leaving(self, envelope: Envelope, message: Leaving, _: tuple[Blob, ...]) -> None:
        self._apply(self._membership.left(envelope.sender, envelope.incarnation))

    def _apply(self, changes: list[tuple[Change, str]]) -> None:
        if not changes:
            return
        self._announce()
        for change, name in changes:
            _log.info("worker " + change.value, worker=name)
            if change is Change.LOST:
                self.counters["workers_lost"] += 1
                self.roles.lost(name)
                self._attempts.recover(name)
                continue
            worker = self._membership.workers[name]
            if Stage.ENCODE in worker.stages:
                self._attempts.encoder_key = (worker.encoder_revision, worker.dtype)
            if change is Change.SWITCHED:
                self.counters["switched"] += 1
                self.roles.switched(name)

    def _announce(self) -> None:
        peers = self._membership.peers()
        self._node.know(peers)
        for peer in peers:
            self._node.post(peer.worker_id, Peers(workers=peers))

    async def _watch(self) -> None:
        announced = 0.0
        while True:
            await asyncio.sleep(self._limits.tick)
            try:
                self._apply(self._membership.expire())
                self.roles.tick()
                if self._clock() - announced >= self._limits.peers_every:
                    announced = self._clock()
                    self._announce()
            except Exception:
                # without this watch nobody would notice a dead worker again
                _log.exception("watch failed")


def _stage_order(stages: StageSet) -> tuple[int, ...]:
    return tuple("EPD".index(letter) for letter in format_stages(stages))
