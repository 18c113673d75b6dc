"""Which worker gets what: least loaded, images of one request spread, a repeated image to the
same encoder.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from epd.errors import UnavailableError
from epd.membership import Membership, WorkerView
from epd.roles import Stage
from epd_services.gateway.ledger import Record

__all__ = ["Router"]

_AFFINITY_LIMIT = 4096
_WORDS = {Stage.ENCODE: "encode", Stage.PREFILL: "prefill", Stage.DECODE: "decode"}


class Router:
    """Chooses workers from the live membership and the records in flight."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._affinity: OrderedDict[str, str] = OrderedDict()

    def require(self, stage: Stage) -> list[WorkerView]:
        """The live workers of a stage. Raises `UnavailableError` when there is none."""
        live = self._membership.hosting(stage)
        if not live:
            raise UnavailableError(f"no live worker hosts {_WORDS[stage]}")
        return live

    def may_serve(self, *stages: Stage) -> None:
        """Raise `UnavailableError` unless each stage has a live worker, or a switch that is under
        way may give it back one.
        """
        for stage in stages:
            if not self._membership.unsettled(stage):
                self.require(stage)

    def pair(self, records: Iterable[Record]) -> tuple[str, str]:
        """The prefill and the decode worker for a new attempt; one worker for both when it
        hosts both.
        """
        load: Counter[str] = Counter()
        for record in records:
            load[record.decode] += 1
            if not record.adopted and record.prefill != record.decode:
                load[record.prefill] += 1
        prefill = min(self.require(Stage.PREFILL), key=lambda w: (load[w.worker_id], w.worker_id))
        decoders = self.require(Stage.DECODE)
        if any(worker.worker_id == prefill.worker_id for worker in decoders):
            return prefill.worker_id, prefill.worker_id
        decode = min(decoders, key=lambda w: (load[w.worker_id], w.worker_id))
        return prefill.worker_id, decode.worker_id

    def decoder(self, records: Iterable[Record]) -> str:
        """The decode worker with the fewest answers, for one that has to move."""
        load = Counter(record.decode for record in records)
        live = self.require(Stage.DECODE)
        return min(live, key=lambda w: (load[w.worker_id], w.worker_id)).worker_id

    def encoder(self, cache_key: str, records: Iterable[Record]) -> str:
        """The encoder for one image: where the same image went before, else the least loaded."""
        live = {w.worker_id: w for w in self.require(Stage.ENCODE)}
        known = self._affinity.get(cache_key)
        if known in live:
            self._affinity.move_to_end(cache_key)
            return known
        load = Counter(name for record in records for name in record.encoders.values())
        chosen = min(live, key=lambda name: (load[name], live[name].stats.encode_queue, name))
        self._affinity[cache_key] = chosen
        while len(self._affinity) > _AFFINITY_LIMIT:
            self._affinity.popitem(last=False)
        return chosen
