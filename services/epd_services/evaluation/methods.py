"""Methods as a command line names them, and what a budget means for each of them.

script                                  before the LLM
adaptinfer[layers=[0,2,4]]              inside it, after layers of one's own choice
script[tau=0.5,pool_floor=0.5]+fastv    one after the other

A method inside the decoder takes, besides its own parameters, `layers`, `shares` (how many tokens
stay after each of them, in proportion) and, behind another, `enter`: what the first lets in, as a
multiple of the budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from epd.errors import ConfigError
from epd_pruning.errors import PruningError
from epd_pruning.registry import available, fingerprint, token_pruner
from epd_pruning.selection import keep_count
from epd_services.cli.terminal import usage_error

__all__ = ["ALL_METHODS", "DENSE", "Method", "parse_budgets", "parse_methods"]

DENSE = "none"
# behind another method one pruning layer does, and what it may still drop is little: chosen on
# validation, where letting more in or dropping later cost every method inside the decoder more
_INSIDE = "[layers=2,enter=1.05]"
ALL_METHODS = (
    "random", "uniform_stride", "low_resolution", "relevance", "dpp", "divprune", "dart",
    "visionzip", "vispruner", "cdpruner", "script", "adaptinfer", "fastv", "sparsevlm",
    "pyramiddrop", "dart_layer",
    *(
        f"{first}+{inside}{_INSIDE}"
        for first in ("dpp", "script")
        for inside in ("adaptinfer", "fastv", "sparsevlm", "pyramiddrop", "dart_layer")
    ),
)  # fmt: skip

_ENTER = 2.0


@dataclass(frozen=True, slots=True)
class Method:
    """One method, or two joined; `name` is how it was written."""

    name: str
    token: str | None
    layer: str | None
    token_params: dict[str, Any]
    layer_params: dict[str, Any]

    def fingerprint(self, places: str = "") -> str:
        """A digest of every hyper-parameter, defaults included, and of where layers are pruned."""
        before = fingerprint(token_pruner(self.token, self.token_params)) if self.token else ""
        told = json.dumps([before, self.layer, self.layer_params, places], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def entering(self, num_tokens: int, budget: float) -> int:
        """Tokens of an image of `num_tokens` that enter the decoder."""
        if self.token is None:
            return num_tokens
        average = keep_count(num_tokens, budget)
        return min(num_tokens, round(average * self._enter))

    @property
    def _enter(self) -> float:
        return 1.0 if self.layer is None else float(self.layer_params.get("enter", _ENTER))

    @property
    def schedule_params(self) -> tuple[list[int], list[float]]:
        """Layers and shares, each empty where none were given."""
        return _as_list(self.layer_params.get("layers")), _as_list(self.layer_params.get("shares"))

    @property
    def scoring_params(self) -> dict[str, Any]:
        """The layer method's own hyper-parameters."""
        own = ("layers", "shares", "enter")
        return {key: value for key, value in self.layer_params.items() if key not in own}

    def layer_average(self, num_tokens: int, budget: float) -> int | None:
        """Tokens of an image that a layer processes on average, where a method prunes inside."""
        return None if self.layer is None else keep_count(num_tokens, budget)


def parse_methods(text: str) -> list[Method]:
    """The methods of a comma-separated list, once each; "all" stands for `ALL_METHODS`."""
    names = [name for part in _split(text, ",") for name in _spelled_out(part.strip()) if name]
    methods = [_parse(name) for name in dict.fromkeys(names) if name != DENSE]
    if not methods:
        raise _refusal(text, "no method is named")
    return methods


def parse_budgets(text: str) -> list[float]:
    """Shares in (0, 1) of a comma-separated list, the largest first, once each."""
    try:
        budgets = {float(part) for part in text.split(",") if part.strip()}
    except ValueError:
        budgets = set()
    if not budgets or not all(0.0 < budget < 1.0 for budget in budgets):
        raise usage_error(
            f"Cannot prune to {text[:100]!r}.", "A budget is a share of the tokens in (0, 1).",
            "epd eval --budgets 0.25,0.11,0.056",
        )  # fmt: skip
    return sorted(budgets, reverse=True)


def _spelled_out(name: str) -> tuple[str, ...]:
    return ALL_METHODS if name == "all" else (name,)


def _parse(name: str) -> Method:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for part in _split(name, "+"):
        method, params = _params(part.strip(), name)
        kind = next((kind for kind in ("token", "layer") if method in _available(kind)), None)
        if kind is None or kind in found or (kind == "token" and found):
            known = ", ".join((*_available("token"), *_available("layer")))
            raise _refusal(name, f"it takes one of {known}, or one before the LLM + one inside")
        found[kind] = (method, params)
    token, token_params = found.get("token", (None, {}))
    layer, layer_params = found.get("layer", (None, {}))
    if token is not None:
        try:
            token_pruner(token, token_params)
        except PruningError as error:
            raise _refusal(name, str(error)) from None
    return Method(name, token, layer, token_params, layer_params)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _available(kind: str) -> tuple[str, ...]:
    return available("token" if kind == "token" else "layer")


def _params(part: str, name: str) -> tuple[str, dict[str, Any]]:
    method, bracket, rest = part.partition("[")
    if not bracket:
        return method, {}
    if not rest.endswith("]"):
        raise _refusal(name, "a bracket stays open")
    pairs = [pair.partition("=") for pair in _split(rest[:-1], ",") if pair.strip()]
    if not all(sign for _, sign, _ in pairs):
        raise _refusal(name, "brackets hold NAME=VALUE, separated by commas")
    return method, {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts of `text` between separators that stand in no bracket."""
    depth, begin = 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            yield text[begin:index]
            begin = index + 1
    yield text[begin:]


def _refusal(name: str, why: str) -> ConfigError:
    return usage_error(
        f"Cannot evaluate {name[:200]!r}.", f"{why[:1].upper()}{why[1:]}.",
        "epd eval --methods random,script,adaptinfer",
    )  # fmt: skip
