"""What pruning methods read inside a vision encoder: one layer's attention and keys."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

__all__ = ["AttentionProbe"]


class AttentionProbe:
    """Sees what enters the attention of one encoder layer of CLIP or SigLIP.

    A context manager around a forward pass; its hook comes off at the end. Only the rows that are
    asked for are recomputed, the encoder's own fused attention runs as ever.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention: Any = attention
        self._seen: torch.Tensor | None = None

    def __enter__(self) -> Self:
        self._handle = self._attention.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def keys(self) -> torch.Tensor:
        """Keys `[B, T, head_dim]` of every position, averaged over the heads."""
        return self._heads(self._attention.k_proj).mean(1)

    def received(self, *, by_first: bool) -> torch.Tensor:
        """Attention `[B, T]` that each position gets, averaged over the heads, in fp32.

        From the first position (CLS) alone, or averaged over all.
        """
        queries = self._heads(self._attention.q_proj)
        queries = (queries[:, :, :1] if by_first else queries).float()
        scores = queries @ self._heads(self._attention.k_proj).float().mT * self._attention.scale
        attention: torch.Tensor = scores.softmax(-1).mean((1, 2))
        return attention

    def _heads(self, projection: nn.Module) -> torch.Tensor:
        """A projection `[B, heads, T, head_dim]` of what entered."""
        assert self._seen is not None
        projected: torch.Tensor = projection(self._seen)
        heads = projected.view(*projected.shape[:-1], -1, self._attention.head_dim)
        return heads.transpose(1, 2)
