"""Which method prunes inside a decoder of this depth, and after which layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from epd.errors import ConfigError
from epd_pruning.errors import PruningError
from epd_pruning.registry import layer_pruner
from epd_pruning.schedule import Schedule

if TYPE_CHECKING:
    from epd_pruning.layer_base import LayerPruner

__all__ = ["SCHEDULE_FILE", "check_layer_pruner", "resolve_layer_pruner"]

SCHEDULE_FILE = "pruning_schedule.json"
_PUBLISHED_DEPTH = 32
_PRESET = "llava-1.5-7b/64"
_LONGEST_FILE = 1 << 16


def resolve_layer_pruner(setting: str, checkpoint: Path, num_layers: int) -> LayerPruner:
    """The pruner that `setting` names: "adaptinfer", or "adaptinfer:1,3,4" with its layers.

    Without layers AdaptInfer takes the schedule file of the checkpoint, if it has one; otherwise
    the published layers are scaled to the depth. Raises `ConfigError`.
    """
    name, _, told = setting.partition(":")
    try:
        published = _published(name)
        if told:
            layers = _parse_layers(told)
        elif name == "adaptinfer" and (checkpoint / SCHEDULE_FILE).is_file():
            pruner = layer_pruner(name, _read_schedule(checkpoint / SCHEDULE_FILE))
            return check_layer_pruner(pruner, num_layers)
        else:
            layers = _scaled_layers(published.layers, num_layers)
        pruner = layer_pruner(name, _spread(published, layers))
    except PruningError as error:
        raise ConfigError(f"layer_pruning: {error}") from None
    return check_layer_pruner(pruner, num_layers)


def check_layer_pruner(pruner: LayerPruner, num_layers: int) -> LayerPruner:
    """`pruner` itself; `ConfigError` unless it can run in a decoder of `num_layers`."""
    if not pruner.schedule.layers:
        raise ConfigError("layer_pruning: schedule.layers must name at least one layer")
    if getattr(pruner, "recycling", False):
        raise ConfigError(
            f"layer_pruning: {pruner.name} with recycling makes new tokens inside the decoder, "
            "which have no place in the KV cache; recycling must be false"
        )
    try:
        pruner.schedule.check(num_layers)
    except PruningError as error:
        raise ConfigError(f"layer_pruning: {error}") from None
    return pruner


def _published(name: str) -> Schedule:
    """The schedule whose proportions `name` is known for."""
    known = layer_pruner(name, Schedule(())).presets
    return known[_PRESET] if _PRESET in known else next(iter(known.values()))


def _parse_layers(told: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in told.split(","))
    except ValueError:
        raise PruningError("schedule.layers", "whole numbers joined by commas", told) from None


def _read_schedule(file: Path) -> Schedule:
    with file.open(encoding="utf-8") as opened:
        return Schedule.from_json(opened.read(_LONGEST_FILE))


def _scaled_layers(published: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The same relative depths, strictly increasing, the last layer left out."""
    layers: list[int] = []
    for layer in published:
        scaled = round((layer + 1) * num_layers / _PUBLISHED_DEPTH) - 1
        scaled = max(scaled, layers[-1] + 1 if layers else 0)
        if not layers or scaled <= num_layers - 2:
            layers.append(min(scaled, num_layers - 2))
    return tuple(layers)


def _spread(published: Schedule, layers: tuple[int, ...]) -> Schedule:
    """What is kept after each of `layers`: the published shares, geometrically between them."""
    shares = [max(count, 1) / 576 for count in published.kept(576)]
    last = len(shares) - 1
    ratios = []
    for stage in range(len(layers)):
        place = stage * last / max(len(layers) - 1, 1)
        low = min(int(place), max(last - 1, 0))
        high = min(low + 1, last)
        ratios.append(shares[low] ** (1 - place + low) * shares[high] ** (place - low))
    return Schedule(layers, ratios=tuple(ratios), of="original")
