"""The paged K and V of every layer, plain or in codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epd.kv.formats import KV_PLAIN, row_bytes, row_width
from epd_kernels import KVFormat, QuantKV

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KVPool"]

Cache = torch.Tensor | QuantKV


class _PlainLayer:
    """K and V in the dtype of the model, `[2, num_blocks, block_size, num_kv_heads, head_dim]`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._kv = torch.zeros(shape, dtype=dtype, device=device)
        self.caches: tuple[Cache, Cache] = (self._kv[0], self._kv[1])
        self.moved_dtype = dtype
        self.nbytes = self._kv.nbytes

    def fill(self, value: float) -> None:
        self._kv.fill_(value)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        return self._kv.flatten(1, 2).index_select(1, slots)

    def scatter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self._kv.flatten(1, 2).index_copy_(1, slots, rows)


class _CodedLayer:
    """K and V in codes, and a scale per token and KV head beside them.

    In memory a block holds one head after the other, each with all its rows: a program of attention
    reads one head, and the scales of eight rows then share a sector of 32 bytes.
    """

    moved_dtype = torch.uint8

    def __init__(self, shape: tuple[int, ...], target: KVFormat, device: torch.device) -> None:
        self._width = target.width(shape[-1])
        both, num_blocks, self._block_size, heads, _ = shape
        size = (both, num_blocks, heads, self._block_size)
        codes = torch.zeros((*size, self._width), dtype=torch.uint8, device=device)
        scales = torch.zeros(size, dtype=torch.float32, device=device)
        self._codes, self._scales = codes.transpose(2, 3), scales.transpose(2, 3)
        codes = self._codes.view(target.dtype)
        self.caches: tuple[Cache, Cache] = (
            QuantKV(codes[0], self._scales[0]), QuantKV(codes[1], self._scales[1])
        )  # fmt: skip
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def fill(self, value: float) -> None:
        self._codes.fill_(0x7F)
        self._scales.fill_(value)

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Codes and the bytes of their scale, side by side."""
        block, row = self._places(slots)
        codes, scales = self._codes[:, block, row], self._scales[:, block, row]
        return torch.cat((codes, scales[..., None].view(torch.uint8)), dim=-1)

    def scatter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        block, row = self._places(slots)
        scales = rows[..., self._width :].contiguous().view(torch.float32)
        self._codes[:, block, row] = rows[..., : self._width]
        self._scales[:, block, row] = scales[..., 0]

    def _places(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return slots // self._block_size, slots % self._block_size


class KVPool:
    """KV of `num_layers` layers: K and V `[num_blocks, block_size, num_kv_heads, head_dim]` each.

    `formats` names per layer how it is held (see `epd.kv.formats`); None: all plain. Only slots
    below a sequence's KV length are ever read; the rest may hold anything.
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
        formats: Sequence[str] | None = None,
    ) -> None:
        self.block_size = block_size
        self.formats = tuple(formats or (KV_PLAIN,) * num_layers)
        assert len(self.formats) == num_layers
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        self._device = torch.device(device)
        shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
        self._layers: list[_PlainLayer | _CodedLayer] = [
            _PlainLayer(shape, dtype, self._device)
            if kind == KV_PLAIN
            else _CodedLayer(shape, KVFormat(kind), self._device)
            for kind in self.formats
        ]

    @staticmethod
    def block_bytes(
        num_layers: int,
        *,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        formats: Sequence[str] | None = None,
    ) -> int:
        """Bytes one block takes over all layers, scales included."""
        kinds = formats or (KV_PLAIN,) * num_layers
        row = sum(row_bytes(kind, head_dim, dtype.itemsize) for kind in kinds)
        return 2 * block_size * num_kv_heads * row

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def fits(self, layer: int, tensor: torch.Tensor, num_tokens: int) -> bool:
        """Whether `tensor` is what `gather` returns for `num_tokens` tokens of `layer`."""
        width = row_width(self.formats[layer], self._head_dim)
        shape = (2, num_tokens, self._num_kv_heads, width)
        return tensor.shape == shape and tensor.dtype == self._layers[layer].moved_dtype

    def layer(self, index: int) -> tuple[Cache, Cache]:
        """K and V of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[index].caches

    def bytes(self) -> int:
        """Bytes of all layers, scales included."""
        return sum(layer.nbytes for layer in self._layers)

    def fill(self, value: float) -> None:
        """Overwrite everything, so that a test sees whoever reads what nobody wrote."""
        for layer in self._layers:
            layer.fill(value)

    def gather(
        self, blocks: Sequence[int], num_tokens: int, *, layers: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Per layer the KV of `num_tokens` tokens, [2, num_tokens, num_kv_heads, width].

        The width is `row_width`: plain KV moves as it is, coded KV as bytes, never coded anew.
        """
        slots = self._slots(blocks, num_tokens)
        return [self._layers[index].gather(slots) for index in self._chosen(layers)]

    def scatter(
        self,
        blocks: Sequence[int],
        tensors: Sequence[torch.Tensor],
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Write what `gather` returned into `blocks`, one tensor per layer."""
        for index, tensor in zip(self._chosen(layers), tensors, strict=True):
            assert self.fits(index, tensor, tensor.shape[1])
            slots = self._slots(blocks, tensor.shape[1])
            self._layers[index].scatter(slots, tensor.to(self._device))

    def _chosen(self, layers: Sequence[int] | None) -> Sequence[int]:
        return range(len(self._layers)) if layers is None else layers

    def _slots(self, blocks: Sequence[int], num_tokens: int) -> torch.Tensor:
        first = torch.tensor(blocks, dtype=torch.int64, device=self._device) * self.block_size
        offsets = torch.arange(self.block_size, device=self._device)
        return (first[:, None] + offsets).flatten()[:num_tokens]
