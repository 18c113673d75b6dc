"""What a request asks of vision-token pruning. Imports no torch: the gateway checks it too."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from epd_pruning.errors import PruningError
from epd_pruning.registry import available, token_pruner

from epd.errors import InvalidRequestError

if TYPE_CHECKING:
    from epd_pruning.base import TokenPruner

__all__ = ["PruningSpec"]

_MOST = 1 << 20


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
                "layer_keep is needed exactly when method joins two", "pruning.layer_keep"
            )
        if self.layer_keep is not None:
            _check_budget(self.layer_keep, "pruning.layer_keep")
        if token is None and self.params:
            raise InvalidRequestError("params belong to a method before the LLM", "pruning.params")

    def pruner(self) -> TokenPruner | None:
        """The method before the LLM with its hyper-parameters, if any; this loads torch.

        Raises `InvalidRequestError` for a hyper-parameter it does not take.
        """
        if self.token_method is None:
            return None
        try:
            return token_pruner(self.token_method, self.params)
        except PruningError as error:
            raise InvalidRequestError(str(error), f"pruning.params.{error.field}") from None

    def fingerprint(self) -> str:
        """A digest of what decides the tokens an encoder hands on: part of cache keys."""
        if self.token_method is None:
            return "none"
        told = msgspec.json.encode([self.token_method, self.params, self.keep], order="sorted")
        return hashlib.sha256(told).hexdigest()


def _check_budget(value: int | float, field: str) -> None:
    whole = isinstance(value, int)
    if not (1 <= value <= _MOST if whole else 0.0 < value <= 1.0):
        raise InvalidRequestError(
            f"{field.rpartition('.')[2]} must be a count of 1 or more, or a share in (0, 1]", field
        )
