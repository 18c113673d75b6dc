"""How much text attends to each vision token in every decoder layer, nothing pruned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from epd.kv.pool import KVPool
from epd.models.context import AttentionBatch, ForwardContext, Tap
from epd.models.decoder import Decoder, Stream
from epd_kernels.text_votes import Span, Spans, row_lse, weighted_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from epd.kv.blocks import ImageSpan

__all__ = ["text_to_vision"]


@torch.no_grad()
def text_to_vision(
    decoder: Decoder, token_ids: Sequence[int], spans: Sequence[ImageSpan], images: Sequence[Tensor]
) -> Tensor:
    """Attention [L, V] of the text after the last image, summed over its rows and all heads.

    `token_ids` is the prompt with one token for every vision token, `images` fill its `spans`.
    """
    ids = torch.tensor([max(token, 0) for token in token_ids], device=decoder.device)
    is_vision = torch.zeros(len(ids), dtype=torch.bool, device=decoder.device)
    for span in spans:
        is_vision[span.start : span.stop] = True
    hidden = decoder.embed(ids.masked_fill(is_vision, 0))
    hidden[is_vision] = torch.cat(list(images)).to(hidden.dtype)
    positions = torch.arange(len(ids), device=decoder.device)
    vision = is_vision.nonzero()[:, 0]
    num_text = len(ids) - 1 - int(vision[-1])
    text = Spans.of((Span(len(ids) - num_text, num_text, 0, len(ids)),), decoder.device)
    context, stream = _context(decoder, len(ids)), Stream(None, hidden)
    found = []
    for layer in range(decoder.config.num_layers):
        tap = Tap(layer)
        tapped = replace(context, tap=tap)
        stream = decoder.advance(stream, positions, tapped, layer, layer + 1)
        found.append(_received(tap, vision, text, decoder.config.head_dim**-0.5))
    return torch.stack(found)


def _received(tap: Tap, vision: Tensor, text: Spans, scale: float) -> Tensor:
    assert tap.queries is not None
    assert tap.keys is not None
    lse = row_lse(tap.queries, tap.keys, text, scale=scale)
    votes = torch.ones_like(lse)
    return weighted_columns(tap.queries, tap.keys, lse, votes, text, scale=scale).sum(0)[vision]


def _context(decoder: Decoder, length: int) -> ForwardContext:
    """One sequence of `length` tokens in a pool of its own."""
    shape, size = decoder.config, 16
    blocks = -(-length // size)
    pool = KVPool(
        shape.num_layers, num_blocks=blocks, block_size=size, num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    numbers = torch.arange(max(blocks, length), device=decoder.device)
    ends = torch.tensor([0, length], dtype=torch.int32, device=decoder.device)
    batch = AttentionBatch(
        cu_seqlens_q=ends, seq_lens=ends[1:], block_tables=numbers[None, :blocks].int(),
        slot_mapping=numbers[:length], max_seqlen_q=length, max_seqlen_k=length,
    )  # fmt: skip
    return ForwardContext(groups=(batch,), layer_group=(0,) * shape.num_layers, kv=pool)
