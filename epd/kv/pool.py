"""The paged K and V tensors of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KVPool"]


class KVPool:
    """KV of `num_layers` layers, each [num_blocks, block_size, num_kv_heads, head_dim] for K and V.

    Only slots below a sequence's KV length are ever read; the rest may hold anything.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
        self.block_size = block_size
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._pairs = [(kv[0], kv[1]) for kv in self._layers]

    @staticmethod
    def block_bytes(
        num_layers: int, *, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes one block takes over all layers."""
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of K and V."""
        return self._layers[0].dtype

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._pairs[index]

    def bytes(self) -> int:
        """Bytes of all layers."""
        return sum(kv.nbytes for kv in self._layers)

    def fill(self, value: float) -> None:
        """Overwrite everything, so that a test sees whoever reads what nobody wrote."""
        for kv in self._layers:
            kv.fill_(value)

    def gather(
        self, blocks: Sequence[int], num_tokens: int, *, layers: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Per layer the KV of `num_tokens` tokens, [2, num_tokens, num_kv_heads, head_dim]."""
        slots = self._slots(blocks, num_tokens)
        return [self._layers[i].flatten(1, 2).index_select(1, slots) for i in self._chosen(layers)]

    def scatter(
        self,
        blocks: Sequence[int],
        tensors: Sequence[torch.Tensor],
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Write what `gather` returned into `blocks`, one tensor per layer."""
        for index, tensor in zip(self._chosen(layers), tensors, strict=True):
            kv = self._layers[index]
            slots = self._slots(blocks, tensor.shape[1])
            kv.flatten(1, 2).index_copy_(1, slots, tensor.to(kv.device))

    def _chosen(self, layers: Sequence[int] | None) -> Sequence[int]:
        return range(len(self._layers)) if layers is None else layers

    def _slots(self, blocks: Sequence[int], num_tokens: int) -> torch.Tensor:
        device = self._layers[0].device
        first = torch.tensor(blocks, dtype=torch.int64, device=device) * self.block_size
        offsets = torch.arange(self.block_size, device=device)
        return (first[:, None] + offsets).flatten()[:num_tokens]
