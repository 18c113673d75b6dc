"""Schedules of pruning inside the decoder: after which layers, and how many tokens stay."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from epd_pruning.errors import PruningError

__all__ = ["Schedule", "fit_average", "fit_like"]

_MANY = 1 << 20  # tokens at which the proportions of a schedule are read


@dataclass(frozen=True, slots=True)
class Schedule:
    """Prune after each of `layers` (0-based): it runs at the old length, the next one at the new.

    Either `counts`, or `ratios` of the tokens then present (`of` "current") or of those the decoder
    began with ("original"); `floor` is the least that stays. A stage at which fewer tokens are
    present than it would keep does nothing.
    """

    layers: tuple[int, ...]
    counts: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    of: Literal["current", "original"] = "current"
    floor: int = 0

    def __post_init__(self) -> None:
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise PruningError("schedule.layers", "strictly increasing", self.layers)
        if bool(self.counts) == bool(self.ratios) and self.layers:
            both = (self.counts, self.ratios)
            raise PruningError("schedule", "given either counts or ratios", both)
        field, values = ("counts", self.counts) if self.counts else ("ratios", self.ratios)
        if len(values) != len(self.layers):
            raise PruningError(f"schedule.{field}", f"{len(self.layers)} long, as layers", values)
        if any(count < 0 for count in self.counts):
            raise PruningError("schedule.counts", "at least 0", self.counts)
        if not all(0.0 < ratio <= 1.0 for ratio in self.ratios):
            raise PruningError("schedule.ratios", "in (0, 1]", self.ratios)
        if self.floor < 0:
            raise PruningError("schedule.floor", "at least 0", self.floor)

    def check(self, num_layers: int, *, last_injection: int | None = None) -> None:
        """Raise `PruningError` unless the schedule fits a decoder of `num_layers`.

        `last_injection` is the last layer to whose output DeepStack planes are added: tokens that
        left before it would still be waited for.
        """
        low, high = last_injection or 0, num_layers - 2
        if self.layers and not low <= self.layers[0] <= self.layers[-1] <= high:
            raise PruningError("schedule.layers", f"in [{low}, {high}]", self.layers)

    def kept(self, num_tokens: int) -> tuple[int, ...]:
        """Vision tokens left by each stage, when `num_tokens` enter the decoder."""
        left, current = [], num_tokens
        for stage in range(len(self.layers)):
            if self.counts:
                wanted = self.counts[stage]
            else:
                base = current if self.of == "current" else num_tokens
                wanted = round(self.ratios[stage] * base)
            current = min(current, max(wanted, self.floor))
            left.append(current)
        return tuple(left)

    def stage_of(self, layer: int) -> int | None:
        """The stage that follows `layer`, or None."""
        return self.layers.index(layer) if layer in self.layers else None

    def layer_groups(self, num_layers: int) -> tuple[int, ...]:
        """The group of each layer: layers up to and including a pruning layer hold the same tokens.

        Stage s lies between groups s and s + 1.
        """
        return tuple(sum(layer > last for last in self.layers) for layer in range(num_layers))

    def lengths(self, num_tokens: int, num_layers: int, *, booked: bool = False) -> tuple[int, ...]:
        """Vision tokens in every layer: those it processes, and whose keys and values it stores.

        `booked` counts a pruning layer at its length afterwards, as the published averages do.
        """
        self.check(num_layers)
        lengths, current = [], num_tokens
        after = dict(zip(self.layers, self.kept(num_tokens), strict=True))
        for layer in range(num_layers):
            then = after.get(layer, current)
            lengths.append(then if booked else current)
            current = then
        return tuple(lengths)

    def to_json(self) -> str:
        """The schedule as a JSON object, for `from_json`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule written by `to_json`; anything else is a `PruningError`."""
        try:
            told: dict[str, Any] = json.loads(text)
            known = {
                "layers": tuple(map(_whole, told.pop("layers"))),
                "counts": tuple(map(_whole, told.pop("counts", ()))),
                "ratios": tuple(map(float, told.pop("ratios", ()))),
                "of": told.pop("of", "current"),
                "floor": _whole(told.pop("floor", 0)),
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            allowed = "an object with layers and counts or ratios"
            raise PruningError("schedule", allowed, text) from error
        if told or known["of"] not in ("current", "original"):
            raise PruningError("schedule", "made of layers, counts, ratios, of, floor", text)
        return cls(**known)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


@lru_cache(maxsize=1024)  # a few sizes of images, asked for by every request
def fit_average(
    layers: tuple[int, ...],
    shares: tuple[float, ...],
    *,
    num_tokens: int,
    num_layers: int,
    average: float,
    booked: bool = False,
) -> Schedule:
    """The largest schedule whose layer-average is at most `average` tokens.

    Stage s keeps round(x·`shares`[s]) of `num_tokens`; x is searched. The average is of tokens
    processed, or `booked`.
    """

    def scaled(step: int) -> Schedule:
        counts = tuple(min(round(step * share / max(shares)), num_tokens) for share in shares)
        return Schedule(layers, counts)

    def mean(step: int) -> float:
        return sum(scaled(step).lengths(num_tokens, num_layers, booked=booked)) / num_layers

    if not mean(0) <= average <= num_tokens:
        allowed = f"in [{mean(0):.1f}, {num_tokens}] for pruning after layers {layers}"
        raise PruningError("average", allowed, average)
    low, high = 0, math.ceil(num_tokens * max(shares) / min(shares))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mean(middle) <= average else (low, middle - 1)
    return scaled(low)


def fit_like(layers: Schedule, *, num_tokens: int, num_layers: int, average: float) -> Schedule:
    """`fit_average` at the places and in the proportions of `layers`."""
    shares = tuple(max(count, 0.5) for count in layers.kept(_MANY))
    return fit_average(
        layers.layers, shares, num_tokens=num_tokens, num_layers=num_layers, average=average
    )
