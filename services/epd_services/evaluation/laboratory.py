"""A model, a benchmark and what is computed once for all methods; it makes one cell at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from epd.chat import ChatFormatter
from epd.demo import CHECKPOINT
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.layer_pruning import check_layer_pruner, resolve_layer_pruner
from epd.models.query import QueryEncoder
from epd.models.vision import VisionEncoder
from epd_pruning.base import TokenPruner
from epd_pruning.errors import PruningError
from epd_pruning.layer_base import LayerPruner
from epd_pruning.registry import layer_pruner, token_pruner
from epd_pruning.schedule import Schedule
from epd_services.cli.terminal import usage_error
from epd_services.evaluation.answering import Engine, prompt_of
from epd_services.evaluation.costs import Costs, Prompt, average_costs, shape_of
from epd_services.evaluation.features import (
    Encoded,
    encode_all,
    encoder_seconds,
    query_macs,
    with_sign,
)
from epd_services.evaluation.journal import Cell, RunFacts
from epd_services.evaluation.methods import DENSE, Method
from epd_services.evaluation.questions import matches

if TYPE_CHECKING:
    from pathlib import Path

    from epd_services.evaluation.questions import Bench

__all__ = ["Laboratory", "OutOfReach"]

_BATCH_ENCODED = 32


class OutOfReach(Exception):
    """A budget that a method inside the decoder cannot meet; the message says what it can."""


@dataclass(frozen=True, slots=True)
class _Pruners:
    token: TokenPruner | None
    layer: LayerPruner | None


class Laboratory:
    """Everything that cells share. Images are encoded when the first cell is measured."""

    def __init__(
        self,
        bench: Bench,
        methods: Sequence[Method],
        *,
        model: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        batch: int = 32,
        max_tokens: int = 64,
    ) -> None:
        self.bench, self.batch, self.max_tokens = bench, batch, max_tokens
        self.card = ModelCard.load(model if model is not None else CHECKPOINT)
        self._decoder = Decoder.load(self.card, device, dtype)
        self._encoder = VisionEncoder.load(self.card, device, dtype)
        self._queries = QueryEncoder(self.card, self._decoder)
        self._formatter = ChatFormatter(self.card)
        self._pruners = {method.name: self._build(method) for method in methods}
        self._encoder_seconds: dict[frozenset[str], float] = {}
        self.on_encoded: Callable[[int], None] = lambda done: None

    def facts(self, seed: int) -> RunFacts:
        """What names this table; `seed` is that of the benchmark."""
        return RunFacts(
            model=self.card.name, revision=self.card.revision, bench=self.bench.name,
            bench_digest=self.bench.digest, questions=len(self.bench.questions), seed=seed,
            device=self._decoder.device.type, dtype=str(self._decoder.dtype).removeprefix("torch."),
            batch=self.batch, max_tokens=self.max_tokens,
        )  # fmt: skip

    def measure(self, method: Method | None, budget: float, advance: Callable[[int], None]) -> Cell:
        """One finished cell; `method` None is the dense run. Raises `OutOfReach`."""
        pruners = self._pruners[method.name] if method is not None else _Pruners(None, None)
        costs = self._costs(method, budget, pruners)
        answers = self._engine.answer(
            method, budget, pruner=pruners.token, layer_pruner=pruners.layer, advance=advance
        )
        hits = [
            matches(t, q.answer) for t, q in zip(answers.texts, self.bench.questions, strict=True)
        ]
        count = len(hits)
        images = sum(len(question.images) for question in self.bench.questions) / count
        return Cell(
            method=DENSE if method is None else method.name, budget=budget,
            fingerprint=DENSE if method is None else self.fingerprint(method),
            right="".join("01"[hit] for hit in hits), tokens=costs.tokens,
            seconds={"encoder": images * self._encoding(pruners.token), **answers.seconds},
            decoder_macs=costs.decoder_macs, selector_macs=costs.selector_macs,
            kv_bytes=costs.kv_bytes,
        )  # fmt: skip

    def fingerprint(self, method: Method) -> str:
        """The method's hyper-parameters, and where it prunes in this decoder."""
        layer = self._pruners[method.name].layer
        return method.fingerprint("" if layer is None else layer.schedule.to_json())

    @cached_property
    def _engine(self) -> Engine:
        return Engine(
            card=self.card, decoder=self._decoder, formatter=self._formatter,
            queries=self._queries, questions=self.bench.questions, encoded=self._encoded,
            batch=self.batch, max_tokens=self.max_tokens,
        )  # fmt: skip

    @cached_property
    def _encoded(self) -> Encoded:
        needs = [_needs(pruners.token) for pruners in self._pruners.values()]
        return encode_all(
            self._encoder, self.bench.questions, frozenset().union(*needs),
            batch=_BATCH_ENCODED, advance=self.on_encoded,
        )  # fmt: skip

    @cached_property
    def _prompts(self) -> list[Prompt]:
        """Sizes of every prompt; a LLaVA has as many tokens for every image."""
        size, prompts = self._encoder.num_tokens(1, 1), []
        for question in self.bench.questions:
            ids = prompt_of(self._formatter, question)
            after = ids[::-1].index(self.card.image_token_id or -1)
            query = len(self._formatter.tokenizer.encode(question.question).ids)
            images = (size,) * len(question.images)
            prompts.append(Prompt(images, len(ids) - len(images), after, query))
        return prompts

    def _build(self, method: Method) -> _Pruners:
        try:
            return _Pruners(self._token_pruner(method), self._layer_pruner(method))
        except PruningError as error:
            raise usage_error(
                f"Cannot evaluate {method.name[:200]!r}.", f"{error}.", "epd eval --help"
            ) from None

    def _token_pruner(self, method: Method) -> TokenPruner | None:
        if method.token is None:
            return None
        return with_sign(token_pruner(method.token, method.token_params), self._queries)

    def _layer_pruner(self, method: Method) -> LayerPruner | None:
        if method.layer is None:
            return None
        depth = self._decoder.config.num_layers
        layers, shares = method.schedule_params
        places = ":" + ",".join(map(str, layers)) if layers else ""
        schedule = resolve_layer_pruner(method.layer + places, self.card.path, depth).schedule
        if shares:
            ratios = tuple(share / max(shares) for share in shares)
            schedule = Schedule(schedule.layers, ratios=ratios, of="original")
        pruner = layer_pruner(method.layer, schedule, params=method.scoring_params)
        return check_layer_pruner(pruner, depth)

    def _costs(self, method: Method | None, budget: float, pruners: _Pruners) -> Costs:
        try:
            return average_costs(
                self._prompts, shape_of(self._decoder.config), method, budget,
                pruner=pruners.token, layer_pruner=pruners.layer,
                query_macs=query_macs(1, pruners.token, self._queries) if pruners.token else 0,
                element_bytes=self._decoder.dtype.itemsize,
            )  # fmt: skip
        except PruningError as error:
            raise OutOfReach(f"a layer's average must be {error.allowed} tokens") from None

    def _encoding(self, pruner: TokenPruner | None) -> float:
        needs = _needs(pruner)
        if needs not in self._encoder_seconds:
            self._encoder_seconds[needs] = encoder_seconds(
                self._encoder, self.bench.questions, needs
            )
        return self._encoder_seconds[needs]


def _needs(pruner: TokenPruner | None) -> frozenset[str]:
    return frozenset() if pruner is None else pruner.image_needs | pruner.query_needs
