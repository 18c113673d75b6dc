"""What one method at one budget costs, by counting: tokens in every layer, MACs, KV bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epd_pruning.accounting import (
    DecoderShape,
    TokenCounts,
    count_tokens,
    kv_bytes,
    prefill_macs,
)
from epd_pruning.schedule import Schedule, fit_like
from epd_services.evaluation.journal import Tokens

if TYPE_CHECKING:
    from epd.models.text_config import DecoderConfig
    from epd_pruning.base import TokenPruner
    from epd_pruning.layer_base import LayerPruner
    from epd_services.evaluation.methods import Method

__all__ = ["Costs", "Prompt", "average_costs", "shape_of"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Sizes of one prompt: vision tokens of each image, text tokens, those after the last image."""

    images: tuple[int, ...]
    text: int
    text_after: int
    query: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Of the average question."""

    tokens: Tokens
    decoder_macs: float
    selector_macs: float
    kv_bytes: float


def shape_of(config: DecoderConfig) -> DecoderShape:
    """The sizes of a decoder, as `epd_pruning.accounting` takes them."""
    return DecoderShape(
        num_layers=config.num_layers, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    )  # fmt: skip


def average_costs(
    prompts: Sequence[Prompt],
    shape: DecoderShape,
    method: Method | None,
    budget: float,
    *,
    pruner: TokenPruner | None = None,
    layer_pruner: LayerPruner | None = None,
    query_macs: int = 0,
    element_bytes: int = 2,
) -> Costs:
    """Means over `prompts`. `query_macs` are those of the text tower for one token of a question.

    Raises `PruningError` where a layer method cannot reach the budget.
    """
    counts, selector, decoder, stored = [], 0, 0, 0
    for prompt in prompts:
        count, schedule = _tokens(prompt, shape, method, budget, layer_pruner)
        lengths = [prompt.text + processed for processed in count.processed]
        decoder += prefill_macs(shape, lengths)
        stored += kv_bytes(shape, lengths, bytes_per_element=element_bytes)
        selector += _layer_macs(prompt, shape, layer_pruner, schedule, count.actual)
        if method is not None and pruner is not None:
            selector += query_macs * prompt.query + sum(
                pruner.macs(size, method.entering(size, budget), shape.hidden_size)
                for size in prompt.images
            )
        counts.append(count)
    number = len(prompts)
    full = sum(sum(prompt.images) for prompt in prompts) / number
    return Costs(_mean(counts, full), decoder / number, selector / number, stored / number)


def _tokens(
    prompt: Prompt,
    shape: DecoderShape,
    method: Method | None,
    budget: float,
    layer_pruner: LayerPruner | None,
) -> tuple[TokenCounts, Schedule | None]:
    if method is None:
        return count_tokens(sum(prompt.images), shape.num_layers), None
    entering = sum(method.entering(size, budget) for size in prompt.images)
    schedule = None
    if layer_pruner is not None:
        average = sum(method.layer_average(size, budget) or 0 for size in prompt.images)
        if average < entering:
            schedule = fit_like(
                layer_pruner.schedule, num_tokens=entering, num_layers=shape.num_layers,
                average=average,
            )  # fmt: skip
    return count_tokens(entering, shape.num_layers, schedule), schedule


def _layer_macs(
    prompt: Prompt,
    shape: DecoderShape,
    pruner: LayerPruner | None,
    schedule: Schedule | None,
    entering: int,
) -> int:
    if pruner is None or schedule is None:
        return 0
    present = (entering, *schedule.kept(entering)[:-1])
    return sum(
        pruner.macs(num_text=prompt.text_after, num_vision=count, num_heads=shape.num_heads,
                    head_dim=shape.head_dim)
        for count in present
    )  # fmt: skip


def _mean(counts: Sequence[TokenCounts], full: float) -> Tokens:
    number = len(counts)
    return Tokens(
        full=full,
        actual=sum(count.actual for count in counts) / number,
        processed=[
            sum(layer) / number for layer in zip(*(c.processed for c in counts), strict=True)
        ],
        booked=[sum(layer) / number for layer in zip(*(c.booked for c in counts), strict=True)],
    )
