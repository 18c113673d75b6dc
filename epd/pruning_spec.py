"""What a request asks of vision-token pruning. Imports no torch: the gateway checks it too."""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from epd.errors import InvalidRequestError
from epd_pruning.errors import PruningError
from epd_pruning.registry import available, token_pruner

if TYPE_CHECKING:
    from epd_pruning.base import TokenPruner

__all__ = ["PruningSpec", "count_of"]

_MOST = 1 << 20
_PARAM_BYTES = 4096
_BUDGET = "a count of 1 or more, or a share in (0, 1]"
_RANGES = {
    "method": "the name of a method",
    "keep": _BUDGET,
    "layer_keep": _BUDGET,
    "params": "an object of the method's parameters",
    "positions": "one of keep, renumber (keep+calibrate is not served)",
    "turns": "one of reselect, sticky",
}


class PruningSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method, a budget, and how the survivors are placed.

    `method` names a method before the LLM ("script"), one inside it ("adaptinfer"), both joined by
    a plus, or "none". `keep` is a count of tokens per image (int) or a share of them (float): those
    that enter the decoder, or, for a method inside it alone, those a layer processes on average.
    With both, `layer_keep` is that average. `keep` at or above an image's tokens changes nothing.

    `turns` "reselect" chooses for every image by the last question, "sticky" by the question that
    came with it, so that later turns find the same tokens again.
    """

    method: str
    keep: int | float
    layer_keep: int | float | None = None
    params: dict[str, Any] = {}
    positions: Literal["keep", "renumber", "keep+calibrate"] = "keep"
    turns: Literal["reselect", "sticky"] = "reselect"

    @classmethod
    def parse(cls, value: object) -> PruningSpec:
        """The checked spec that JSON or TOML data describes; a spec is checked as it is.

        Method "none" needs no budget. Raises `InvalidRequestError` naming the field at fault and
        what is allowed, echoing nothing of the value.
        """
        if isinstance(value, dict) and value.get("method") == "none":
            value = {"keep": 1.0} | value
        try:
            spec = value if isinstance(value, cls) else msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise _refusal(error) from None
        spec.validate()
        return spec

    @property
    def token_method(self) -> str | None:
        """The method before the LLM, if any."""
        return next((name for name in self._names if name in available("token")), None)

    @property
    def layer_method(self) -> str | None:
        """The method inside the LLM, if any."""
        return next((name for name in self._names if name in available("layer")), None)

    @property
    def _names(self) -> list[str]:
        return [] if self.method == "none" else self.method.split("+")

    @property
    def layer_budget(self) -> int | float | None:
        """The layer average asked for, if a method inside the LLM is."""
        if self.layer_method is None:
            return None
        return self.keep if self.token_method is None else self.layer_keep

    def validate(self) -> None:
        """Raise `InvalidRequestError` naming the first field out of range, and the range."""
        token, layer = self.token_method, self.layer_method
        if len(self._names) != (token is not None) + (layer is not None):
            known = ", ".join(("none", *available("token"), *available("layer")))
            raise InvalidRequestError(
                f"method must be one of {known}, or one before and one inside the LLM joined by +",
                "pruning.method",
            )
        _check_budget(self.keep, "pruning.keep")
        if (self.layer_keep is not None) != (token is not None and layer is not None):
            raise InvalidRequestError(
                f"layer_keep must be {_BUDGET}, where method joins two, and left out otherwise",
                "pruning.layer_keep",
            )
        if self.layer_keep is not None:
            _check_budget(self.layer_keep, "pruning.layer_keep")
        if token is None and self.params:
            raise InvalidRequestError("params belong to a method before the LLM", "pruning.params")
        _check_params(self.params)

    def num_kept(self, num_tokens: int) -> int:
        """Tokens of an image of `num_tokens` that enter the decoder (all without a token method).

        `epd_pruning.selection.keep_count` says the same where there is torch.
        """
        return num_tokens if self.token_method is None else count_of(self.keep, num_tokens)

    def pruner(self) -> TokenPruner | None:
        """The method before the LLM with its hyper-parameters, if any; this loads torch.

        Raises `InvalidRequestError` for a hyper-parameter it does not take.
        """
        if self.token_method is None:
            return None
        try:
            return token_pruner(self.token_method, self.params)
        except PruningError as error:
            known = error.field.isidentifier() and len(error.field) <= 48
            param = f"pruning.params.{error.field}" if known else "pruning.params"
            text = f"{error.field[:48]} must be {error.allowed}"
            raise InvalidRequestError(text, param) from None

    def fingerprint(self) -> str:
        """A digest of what decides the tokens an encoder hands on: part of cache keys."""
        if self.token_method is None:
            return "none"
        told = msgspec.json.encode([self.token_method, self.params, self.keep], order="sorted")
        return hashlib.sha256(told).hexdigest()


def count_of(keep: int | float, num_tokens: int) -> int:
    """A budget as tokens out of `num_tokens`: a count at most all, a share rounded, at least 1."""
    if isinstance(keep, int):
        return min(keep, num_tokens)
    return min(max(round(keep * num_tokens), 1), num_tokens)


def _refusal(error: msgspec.ValidationError) -> InvalidRequestError:
    """A message of our own words: msgspec quotes unknown names and wrong values."""
    text = str(error)
    missing = re.fullmatch(r"Object missing required field `([a-z_]+)`", text)
    path = missing or re.search(r"at `\$\.([a-z_]+)", text)
    name = path.group(1) if path else ""
    if name not in _RANGES:
        fields = ", ".join(PruningSpec.__struct_fields__)
        return InvalidRequestError(f"pruning takes an object of {fields}", "pruning")
    return InvalidRequestError(f"{name} must be {_RANGES[name]}", f"pruning.{name}")


def _check_params(params: dict[str, Any]) -> None:
    try:
        size = len(msgspec.json.encode(params))
        finite = all(_finite(value) for value in params.values())
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        size, finite = _PARAM_BYTES + 1, False
    if size > _PARAM_BYTES or not finite:
        raise InvalidRequestError(
            f"params must be plain finite values of at most {_PARAM_BYTES} bytes of JSON",
            "pruning.params",
        )


def _finite(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_finite(item) for item in value)
    return isinstance(value, str | bool | int | None) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _check_budget(value: int | float, field: str) -> None:
    whole = isinstance(value, int)
    if not (1 <= value <= _MOST if whole else 0.0 < value <= 1.0):
        raise InvalidRequestError(f"{field.rpartition('.')[2]} must be {_BUDGET}", field)
