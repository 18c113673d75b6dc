"""What a deployment allows of vision-token pruning. Torch-free: the gateway decides with it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from epd.errors import InvalidRequestError
from epd.pruning_spec import PruningSpec, count_of

__all__ = ["PruningPolicy", "check_served", "simplify"]

_POSITIONS = ("keep", "renumber")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPolicy:
    """`image_tokens` is what an image of this model takes, `layer_method` what its decoder prunes
    with, `default` what a request gets that does not ask.

    A budget below `min_keep` is raised to it. With `floor`, budgets fall with the load, linearly
    from what was asked for when idle to the floor when full.
    """

    image_tokens: int
    layer_method: str | None = None
    default: PruningSpec | None = None
    min_keep: int | float | None = None
    floor: int | float | None = None

    def resolve(self, asked: object | None) -> PruningSpec | None:
        """What a request with images gets; None: nothing is pruned.

        `asked` is the request's own field. Raises `InvalidRequestError` naming field and range.
        """
        spec = self.default if asked is None else PruningSpec.parse(asked)
        if spec is None:
            return None
        check_served(spec, self.layer_method)
        for name in ("keep", "layer_keep"):
            value = getattr(spec, name)
            if isinstance(value, int) and value > self.image_tokens:
                raise InvalidRequestError(
                    f"{name} must be a count in [1, {self.image_tokens}] or a share in (0, 1]",
                    f"pruning.{name}",
                )
        return simplify(self._raised(spec), self.image_tokens)

    def budget(self, spec: PruningSpec, load: float) -> int | None:
        """Tokens per image at a `load` in [0, 1], where that is less than `spec` asks for.

        It takes the place of `keep` for a method before the LLM. None: `spec` stands.
        """
        if self.floor is None or spec.token_method is None:
            return None
        asked = count_of(spec.keep, self.image_tokens)
        floor = min(asked, count_of(self.floor, self.image_tokens))
        lowered = asked - round(min(max(load, 0.0), 1.0) * (asked - floor))
        return lowered if lowered < asked else None

    def _raised(self, spec: PruningSpec) -> PruningSpec:
        if self.min_keep is None:
            return spec
        least = count_of(self.min_keep, self.image_tokens)
        low = [
            name
            for name in ("keep", "layer_keep")
            if (value := getattr(spec, name)) is not None
            and count_of(value, self.image_tokens) < least
        ]
        return msgspec.structs.replace(spec, **dict.fromkeys(low, least))


def check_served(spec: PruningSpec, layer_method: str | None) -> None:
    """Raise `InvalidRequestError` unless a pipeline with `layer_method` can do what `spec` asks."""
    if spec.positions not in _POSITIONS:
        raise InvalidRequestError(
            f"positions must be {' or '.join(_POSITIONS)}: attention is not calibrated here",
            "pruning.positions",
        )
    if spec.layer_method is not None and spec.layer_method != layer_method:
        served = f"inside the LLM only {layer_method}" if layer_method else "nothing inside the LLM"
        raise InvalidRequestError(
            f"method {spec.layer_method} is not served: this server prunes {served}",
            "pruning.method",
        )


def simplify(spec: PruningSpec, image_tokens: int) -> PruningSpec | None:
    """`spec` without a method that would keep all `image_tokens`; None if nothing is left."""
    if spec.token_method is not None and spec.num_kept(image_tokens) >= image_tokens:
        if spec.layer_method is None or spec.layer_keep is None:
            return None
        spec = msgspec.structs.replace(
            spec, method=spec.layer_method, keep=spec.layer_keep, layer_keep=None, params={}
        )
    return spec if spec.token_method or spec.layer_method else None
