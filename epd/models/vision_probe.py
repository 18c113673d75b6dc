"""What pruning methods read inside a vision encoder: one layer's attention and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["AttentionProbe"]


class AttentionProbe:
    """The attention of one encoder layer of CLIP or SigLIP, whose input was `states` [B, T, E].

    Only what is asked for is computed, from the states that the forward pass hands out anyway, so
    that the encoder's own fused attention runs as ever.
    """

    def __init__(self, layer: nn.Module, states: torch.Tensor) -> None:
        self._layer: Any = layer
        self._states = states

    def keys(self) -> torch.Tensor:
        """Keys `[B, T, head_dim]` of every position, averaged over the heads."""
        return self._heads(self._layer.self_attn.k_proj).mean(1)

    def received(self, *, by_first: bool) -> torch.Tensor:
        """Attention `[B, T]` that each position gets, averaged over the heads, in fp32.

        From the first position (CLS) alone, or averaged over all.
        """
        attention = self._layer.self_attn
        queries = self._heads(attention.q_proj)
        queries = (queries[:, :, :1] if by_first else queries).float()
        scores = queries @ self._heads(attention.k_proj).float().mT * attention.scale
        received: torch.Tensor = scores.softmax(-1).mean((1, 2))
        return received

    def _heads(self, projection: nn.Module) -> torch.Tensor:
        """A projection `[B, heads, T, head_dim]` of what enters the attention."""
        projected: torch.Tensor = projection(self._layer.layer_norm1(self._states))
        heads = projected.view(*projected.shape[:-1], -1, self._layer.self_attn.head_dim)
        return heads.transpose(1, 2)
