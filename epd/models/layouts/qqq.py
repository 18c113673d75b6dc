"""The layout of QQQ checkpoints (arXiv 2406.09904): nibbles in the order of tensor-core fragments.

    B          int32 [K / 16, 2N]    nibbles of 16 x 16 tiles, permuted in runs of 1024
    s_channel  fp32  [1, N]
    s_group    fp16  [K / 128, N]    empty when one scale per channel is all

Grouped: code = nibble - 8 and w = round(code * s_group) * s_channel, with round to int8. That
rounding belongs to their kernel; here w = code * s_group * s_channel, closer to the original.
Per channel: the nibble is two's complement and s_channel was divided by 16. Columns of scales are
stored in the order of fragments as well.
"""

from __future__ import annotations

from functools import cache

import torch

from epd.models.layouts.source import LayerSource, nibbles, to_signed
from epd_kernels import QuantWeight

__all__ = ["permutation", "read"]

_TILE = 16
_GROUP = 128
_GROUPED = (0, 2, 4, 6, 1, 3, 5, 7)
_CHANNEL = (4, 0, 5, 1, 6, 2, 7, 3)


def read(source: LayerSource) -> QuantWeight:
    """The canonical weight of a layer in this layout."""
    rows, width = source.rows, source.width
    if rows % 64 or width % 64:
        source.refuse("B", "N and K divisible by 64", f"N = {rows}, K = {width}")
    packed = source.get("B", (torch.int32,), (width // _TILE, 2 * rows))
    channel = source.get("s_channel", (torch.float32,), (1, rows)).view(-1)
    group = None
    if source.has("s_group"):
        group = source.get("s_group", (torch.float16,))
    grouped = group is not None and group.numel() > 0
    values = _unpermute(nibbles(packed, 1), rows, width, grouped=grouped)
    if group is None or not grouped:
        codes = (((values + 8) & 15) - 8).to(torch.int8)
        scales = _channel_order(channel) * 16
        return QuantWeight(codes, scales[:, None].contiguous())
    if width % _GROUP or group.shape != (width // _GROUP, rows):
        source.refuse("s_group", f"shape [{width / _GROUP:g}, {rows}]", f"{list(group.shape)}")
    scales = _group_order(group.float()) * _channel_order(channel)
    return QuantWeight(to_signed(values), scales.t().contiguous())


def _unpermute(values: torch.Tensor, rows: int, width: int, *, grouped: bool) -> torch.Tensor:
    """`[N, K]` of stored nibbles `[K / 16, 16 N]`."""
    order = permutation(grouped=grouped)
    flat = torch.empty_like(values).view(-1, len(order))
    flat[:, order] = values.view(-1, len(order))
    tiles = flat.view(width // _TILE, rows // _TILE, _TILE, _TILE)
    return tiles.transpose(1, 2).reshape(width, rows).t().contiguous()


@cache
def permutation(*, grouped: bool) -> torch.Tensor:
    """int64 `[1024]`: element p of a stored run is element `permutation[p]` of the tiles."""
    order: list[int] = []
    for lane in range(32):
        column = lane // 4
        base = [
            16 * row + column + 8 * block
            for block in (0, 1)
            for row in range(4 * (lane % 4), 4 * (lane % 4) + 4)
        ]
        order += [index + 256 * run for run in range(4) for index in base]
    inner = torch.tensor(_GROUPED if grouped else _CHANNEL)
    return torch.tensor(order).view(-1, 8)[:, inner].reshape(-1)


def _group_order(scales: torch.Tensor) -> torch.Tensor:
    """Group scales in the order of columns; stored in blocks of 64 by [i + 8j]."""
    order = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    return _undo(scales, order)


def _channel_order(scales: torch.Tensor) -> torch.Tensor:
    """Channel scales in the order of columns; stored in blocks of 32."""
    order = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    return _undo(scales, order)


def _undo(stored: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    blocks = stored.reshape(-1, len(order))
    original = torch.empty_like(blocks)
    original[:, order] = blocks
    return original.view(stored.shape)
